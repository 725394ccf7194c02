"""Drawing images: from the prior, or from the code of a given image.

An autoregressive decoder draws pixels in order, but not every pixel depends on every earlier one.
With a window that reaches ``right`` columns to the right, pixel (row, column) needs the rows above
only up to column + right. So the pixels with equal ``column + (right + 1) row``, a sheared diagonal
or *wavefront*, can be drawn together once the wavefronts before them are drawn. This takes
width + (right + 1)(height - 1) rounds on a few pixels each, instead of width * height.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlae.distributions import at_least_float32
from vlae.likelihood import Distribution
from vlae.model import VLAE
from vlae.networks.decoder import Decoder

Draw = Callable[[Distribution, Tensor, Tensor], Tensor]
"""The distribution of some pixels, (batch, points, channels), and their rows and columns, (points,)
-> the pixels."""


@torch.no_grad()
def draw_pixels(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z), exactly, in as few rounds as the decoder's window allows.

    z: (batch, latents). uniform: noise in [0, 1), (batch, ``likelihood.num_uniforms``, height,
    width). Returns (batch, channels, height, width), of the dtype of ``uniform``. The same noise
    gives the same images as ``decode_naively``, up to the rounding of a probability. Raises
    ValueError on noise of another shape, or in half precision: there 0.999 is 1, which would draw
    an improbable pixel now and then.
    """
    shape = (len(z), decoder.likelihood.num_uniforms, *decoder.image_shape[1:])
    if uniform.shape != shape or uniform.dtype != at_least_float32(uniform.dtype):
        raise ValueError(
            f"uniform is {uniform.dtype} of the shape {tuple(uniform.shape)}; it must be float32 "
            f"or float64 of the shape {shape}"
        )
    noise = uniform.permute(0, 2, 3, 1)

    def draw(distribution: Distribution, row: Tensor, column: Tensor) -> Tensor:
        return distribution.sample(noise[:, row, column])

    return walk(decoder, z, draw, uniform.dtype)


def walk(decoder: Decoder, z: Tensor, draw: Draw, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images whose pixels ``draw`` chooses given the code and the pixels before them.

    z: (batch, latents). ``draw`` is called for one wavefront after the other. Returns (batch,
    channels, height, width), of the given dtype.
    """
    channels, height, width = decoder.image_shape
    condition = decoder.condition(z)
    rows = torch.arange(height, device=z.device)
    if decoder.context is None:
        row, column = rows.repeat_interleave(width), rows.new_tensor(range(width)).repeat(height)
        pixels = draw(decoder.predict(condition.flatten(1, 2)), row, column)
        return pixels.transpose(1, 2).unflatten(-1, (height, width)).to(dtype)
    front = decoder.context.front(len(z), height, width)
    x = condition.new_zeros(len(z), channels, height, width, dtype=dtype)
    for wave in range(-front.ahead, width + front.shear * (height - 1)):
        column = wave - front.shear * rows
        inside = (column >= -front.ahead) & (column < width)
        row, column = rows[inside], column[inside]
        seen = front.features(row, column)
        row, column = row[column >= 0], column[column >= 0]
        if not len(row):
            continue
        distribution = decoder.predict(condition[:, row, column] + seen)
        pixels = draw(distribution, row, column).transpose(1, 2)
        x[:, :, row, column] = pixels.to(x.dtype)
        front.draw(row, column, decoder.show(pixels))
    return x


@torch.no_grad()
def decode_naively(decoder: Decoder, z: Tensor, uniform: Tensor) -> Tensor:
    """x ~ p(x|z), with a whole pass of the decoder for every pixel; called as ``draw_pixels``."""
    channels, height, width = decoder.image_shape
    condition, noise = decoder.condition(z), uniform.permute(0, 2, 3, 1)
    x = uniform.new_zeros(len(z), channels, height, width)
    for row in range(height):
        for column in range(width):
            drawn = decoder.predict(condition + decoder.see(x)).sample(noise)
            x[:, :, row, column] = drawn[:, row, column].to(x.dtype)
    return x


@torch.no_grad()
def sample(model: VLAE, num_images: int, generator: torch.Generator | None = None) -> Tensor:
    """Images from the model: z ~ p(z), then x ~ p(x|z).

    Returns (num_images, channels, height, width), pixels in [0, 1], in float32, or in float64 if
    the model is. The generator is a CPU generator, so that a seed gives the same noise on every
    device; by default it is PyTorch's own.
    """
    noise = torch.randn(num_images, model.latents, generator=generator)
    weight = next(model.parameters())
    uniform = _uniform(model.decoder, noise.to(weight), generator)
    return draw_pixels(model.decoder, model.prior.sample(noise.to(weight)), uniform)


@torch.no_grad()
def reconstruct(
    model: VLAE, x: Tensor, generator: torch.Generator | None = None, sent: int | None = None
) -> Tensor:
    """Reconstructions of ``x`` from its code: z ~ q(z|x), then x' ~ p(x'|z).

    The paper calls this decompression. ``sent`` is how many latents are sent, the first ones; by
    default all (see ``VLAE.truncated``). Returns the shape of ``x``, and the dtype that ``sample``
    would. The generator is as for ``sample``.
    """
    noise = torch.randn(len(x), model.latents, generator=generator)
    uniform = _uniform(model.decoder, x, generator)
    z = model.encoder(x).sample(noise.to(x))
    return draw_pixels(model.decoder, z if sent is None else model.truncated(z, sent), uniform)


@torch.no_grad()
def decode(model: VLAE, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images from codes: x ~ p(x|z).

    codes: (batch, latents), such as ``model.encoder(x).code``, or posterior samples. Returns
    (batch, channels, height, width) as ``sample`` does, whose generator this has, too. Raises
    ValueError on codes of another shape.
    """
    if codes.dim() != 2 or codes.shape[1] != model.latents:
        raise ValueError(
            f"codes have the shape {tuple(codes.shape)}; it must be (batch, {model.latents})"
        )
    z = codes.to(next(model.parameters()))
    return draw_pixels(model.decoder, z, _uniform(model.decoder, z, generator))


def _uniform(decoder: Decoder, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """The noise of ``draw_pixels``, for as many images as ``like`` has rows, on its device."""
    _, height, width = decoder.image_shape
    shape = (len(like), decoder.likelihood.num_uniforms, height, width)
    noise = torch.rand(shape, generator=generator)
    return noise.to(like.device, at_least_float32(like.dtype))
