"""Drawing images: from the prior, or from the code of a given image.

An autoregressive decoder draws pixels one after the other, but not all of them depend on each other. With a window that
reaches ``right`` columns to the right, pixel (row, column) needs the row above only up to column + right. So the pixels
with equal ``column + (right + 1) row``, a sheared diagonal or *wavefront*, can be drawn together once the wavefronts before
them are known: width + (right + 1)(height - 1) rounds instead of width * height, each on a few pixels only.
"""

import torch
from torch import Tensor

from vlae.decoder import Decoder
from vlae.model import VLAE


@torch.no_grad()
def decode(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z), exactly, by the shortest way that the decoder's window allows.

    z: (batch, latents); uniform: noise in [0, 1), (batch, uniforms that the likelihood takes for a pixel, height, width).
    Returns (batch, channels, height, width). The same noise gives the same image as ``decode_naively``, up to the rounding of
    a probability.
    """
    channels, height, width = decoder.image_shape
    condition, noise = decoder.condition(z), uniform.permute(0, 2, 3, 1)
    if decoder.context is None:
        return decoder.predict(condition).sample(noise).permute(0, 3, 1, 2).to(uniform.dtype)
    front = decoder.context.front(len(z), height, width)
    x = uniform.new_zeros(len(z), channels, height, width)
    rows = torch.arange(height, device=z.device)
    for wave in range(-front.ahead, width + front.shear * (height - 1)):
        column = wave - front.shear * rows
        inside = (column >= -front.ahead) & (column < width)
        row, column = rows[inside], column[inside]
        seen = front.features(row, column)
        row, column = row[column >= 0], column[column >= 0]
        if not len(row):
            continue
        pixels = decoder.predict(condition[:, row, column] + seen).sample(noise[:, row, column]).transpose(1, 2)
        x[:, :, row, column] = pixels.to(x.dtype)
        front.draw(row, column, decoder.show(pixels))
    return x


@torch.no_grad()
def decode_naively(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z) by one whole pass of the decoder for every pixel; arguments as for ``decode``."""
    channels, height, width = decoder.image_shape
    condition, noise = decoder.condition(z), uniform.permute(0, 2, 3, 1)
    x = uniform.new_zeros(len(z), channels, height, width)
    for row in range(height):
        for column in range(width):
            drawn = decoder.predict(condition + decoder.see(x)).sample(noise)
            x[:, :, row, column] = drawn[:, row, column].to(x.dtype)
    return x


@torch.no_grad()
def sample(model: VLAE, num_images: int, generator: torch.Generator) -> Tensor:
    """``num_images`` images from the model: z ~ p(z), x ~ p(x|z); (num_images, channels, height, width), pixels in [0, 1].

    The generator is one of the CPU's, so that it draws the same images on every device.
    """
    noise = torch.randn(num_images, model.latents, generator=generator)
    weight = next(model.parameters())
    uniform = _uniform(model.decoder, num_images, generator).to(weight)
    return decode(model.decoder, model.prior.sample(noise.to(weight)), uniform)


@torch.no_grad()
def reconstruct(model: VLAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """What the code keeps of ``x``: z ~ q(z|x), then a new x ~ p(x|z) (the paper's "decompression"). Same shape as x.

    The generator is one of the CPU's, as for ``sample``.
    """
    noise = torch.randn(len(x), model.latents, generator=generator)
    uniform = _uniform(model.decoder, len(x), generator).to(x)
    return decode(model.decoder, model.encoder(x).sample(noise.to(x)), uniform)


def _uniform(decoder: Decoder, num_images: int, generator: torch.Generator) -> Tensor:
    _, height, width = decoder.image_shape
    return torch.rand(num_images, decoder.likelihood.num_uniforms, height, width, generator=generator)
