"""Drawing images: from the prior, or from the code of a given image.

An autoregressive decoder draws pixels one after the other, but not all of them depend on each other. With a window that
reaches ``right`` columns to the right, pixel (row, column) needs the row above only up to column + right. So the pixels
with equal ``column + (right + 1) row``, a sheared diagonal or *wavefront*, can be drawn together once the wavefronts before
them are known: width + (right + 1)(height - 1) rounds instead of width * height, each on a few pixels only.
"""

import torch
from torch import Tensor

from vlae.context import WindowContext
from vlae.decoder import Decoder
from vlae.model import VLAE


@torch.no_grad()
def decode(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z), exactly, by the shortest way that the decoder's window allows.

    z: (batch, latents); uniform: noise in [0, 1) of the shape of the result, (batch, channels, height, width).
    The same noise gives the same image as ``decode_naively``, up to the rounding of a logit.
    """
    if decoder.context is None:  # and the second argument, an image, is not looked at
        return decoder(z, uniform).sample(uniform.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if isinstance(decoder.context, WindowContext):
        return _decode_by_wavefront(decoder, decoder.context, z, uniform)
    return decode_naively(decoder, z, uniform)


def _decode_by_wavefront(decoder: Decoder, context: WindowContext, z: Tensor, uniform: Tensor) -> Tensor:
    window, (_, height, width) = context.window, decoder.image_shape
    condition = decoder.condition(z)
    noise = uniform.permute(0, 2, 3, 1)
    # In the context, pixels are scaled to [-1, 1] and surrounded by zeros.
    canvas = context.pad(torch.zeros_like(uniform))
    x = torch.zeros_like(uniform)
    rows = torch.arange(height, device=z.device)
    shear = window.right + 1 if window.height else 0
    for wave in range(width + shear * (height - 1)):
        column = wave - shear * rows
        inside = (column >= 0) & (column < width)
        row, column = rows[inside], column[inside]
        hidden = condition[:, row, column] + context.at(canvas, row, column)
        # The distribution has an image's axes: give it a height of 1.
        drawn = decoder.predict(hidden[:, None]).sample(noise[:, None, row, column])[:, 0].permute(0, 2, 1).to(x.dtype)
        x[:, :, row, column] = drawn
        canvas[:, :, row + window.height, column + window.left] = 2 * drawn - 1
    return x


@torch.no_grad()
def decode_naively(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z) by one whole pass of the decoder for every pixel; arguments as for ``decode``."""
    _, height, width = decoder.image_shape
    condition = decoder.condition(z)
    noise = uniform.permute(0, 2, 3, 1)
    x = torch.zeros_like(uniform)
    for row in range(height):
        for column in range(width):
            drawn = decoder.predict(condition + decoder.see(x)).sample(noise)
            x[:, :, row, column] = drawn[:, row, column]
    return x


@torch.no_grad()
def sample(model: VLAE, num_images: int, generator: torch.Generator) -> Tensor:
    """``num_images`` images from the model: z ~ p(z), x ~ p(x|z); (num_images, channels, height, width), pixels 0 or 1.

    The generator is one of the CPU's, so that it draws the same images on every device.
    """
    noise = torch.randn(num_images, model.latents, generator=generator)
    uniform = torch.rand(num_images, *model.image_shape, generator=generator)
    weight = next(model.parameters())
    return decode(model.decoder, model.prior.sample(noise.to(weight)), uniform.to(weight))


@torch.no_grad()
def reconstruct(model: VLAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """What the code keeps of ``x``: z ~ q(z|x), then a new x ~ p(x|z) (the paper's "decompression"). Same shape as x.

    The generator is one of the CPU's, as for ``sample``.
    """
    noise = torch.randn(len(x), model.latents, generator=generator)
    uniform = torch.rand(x.shape, generator=generator)
    return decode(model.decoder, model.encoder(x).sample(noise.to(x)), uniform.to(x))
