"""What a model makes of one image: its bits, its redrawings, and the way to another image.

All noise is a function of the seed and the number of a drawing. So the same question has the same
answer, and while a latent moves, the drawings change with it and not by chance.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.records import Integers
from pipeline.machine import device
from pipeline.noise import Purpose, normal, uniform
from pipeline.runs import OpenedModel
from pipeline.values import Measured
from vlae.distributions import DiagonalGaussian
from vlae.posterior import Posterior
from vlae.sampling import draw_pixels

SAMPLES = 16
"""Codes of an image that its bits are averaged over."""
SEED = 0
"""The seed of binarization and of the codes that bits are averaged over: an image looks the same
each time it is shown, and has the same bits."""


@dataclass(frozen=True)
class Bits:
    """The bound of one image, in bits, with the standard error over ``SAMPLES`` codes."""

    rate: Measured
    distortion: Measured
    code_length: Measured


class Explored:
    """A model, and what it makes of an image x: float32 (1, channels, height, width)."""

    def __init__(self, opened: OpenedModel) -> None:
        self.opened, self.network = opened, opened.network.to(device()).eval()

    @property
    def raw_bits(self) -> int:
        """The bits of an image that is stored as it is."""
        return self.network.decoder.likelihood.levels * math.prod(self.network.image_shape)

    def see(self, batch: Batch) -> Tensor:
        """Images as the model sees them: (batch, channels, height, width)."""
        return binarize(batch, self.opened.binarization, SEED).to(device())

    @property
    def is_binary(self) -> bool:
        """Whether the model sees black and white pixels."""
        return self.opened.binarization is not Binarization.none

    @torch.no_grad()
    def encode(self, x: Tensor) -> Posterior:
        """The posterior of each image."""
        return self.network.encoder(x)

    @torch.no_grad()
    def measure(self, x: Tensor) -> Bits:
        """The bits of an image's code, of its pixels given the code, and their sum."""
        noise = normal(
            (SEED, Purpose.IMPORTANCE), np.zeros(1, np.int64), SAMPLES * self.network.latents
        )
        bound = self.network(x, torch.from_numpy(noise).view(SAMPLES, 1, -1).to(x))
        return Bits(*map(_in_bits, (bound.rate, bound.distortion, -bound.elbo)))

    @torch.no_grad()
    def redraw(self, x: Tensor, seed: int, draws: int, moved: Mapping[int, float]) -> Tensor:
        """Drawings of an image from its code: z ~ q(z|x), then x' ~ p(x'|z).

        ``moved`` is added to the latents with these numbers. The first drawings are the same
        however many there are. Returns (draws, channels, height, width).
        """
        z = self._codes(x, seed, draws)
        for latent, distance in moved.items():
            z[:, latent] += distance
        return self._draw(z, seed, np.arange(draws))

    @torch.no_grad()
    def walk(self, x: Tensor, to: Tensor, seed: int, steps: int) -> Tensor:
        """Drawings on the way from one image's code to another's, both included.

        The way leads through the noise that the prior makes codes of, where the prior is a standard
        normal: there ``between`` passes through codes that the prior finds likely, and the flow
        keeps latents that depend on each other together. All drawings share their noise, so the
        first and the last are the first drawing of either image. Returns (steps, channels, height,
        width).
        """
        ends = torch.cat([self._codes(each, seed, 1) for each in (x, to)])
        start, end = self.network.prior.inverse(ends)[0]
        way = between(start, end, torch.linspace(0, 1, steps, device=x.device))
        z = self.network.prior.sample(way)
        z[0], z[-1] = ends  # exactly: the flow's inverse rounds
        return self._draw(z, seed, np.zeros(steps, np.int64))

    def _codes(self, x: Tensor, seed: int, draws: int) -> Tensor:
        """Codes of one image: (draws, latents)."""
        noise = normal((seed, Purpose.CODE), np.arange(draws), self.network.latents)
        return self.network.encoder(x).sample(torch.from_numpy(noise).to(x)[:, None])[:, 0]

    def _draw(self, z: Tensor, seed: int, numbers: Integers) -> Tensor:
        """x ~ p(x|z), with the noise of the drawings with these numbers."""
        shape = (self.network.decoder.likelihood.num_uniforms, *self.network.image_shape[1:])
        noise = uniform((seed, Purpose.REDRAWING), numbers, math.prod(shape))
        return draw_pixels(
            self.network.decoder, z, torch.from_numpy(noise).to(z).unflatten(1, shape)
        )


def scale(posterior: Posterior) -> Tensor | None:
    """The standard deviations of a posterior, (batch, latents); None if it is not Gaussian."""
    return posterior.log_scale.exp() if isinstance(posterior, DiagonalGaussian) else None


def between(start: Tensor, end: Tensor, places: Tensor) -> Tensor:
    """Spherical interpolation: the direction turns evenly, and the length grows evenly.

    start, end: (latents,); places: (steps,) in 0..1. Returns (steps, latents). A standard normal of
    many dimensions has nearly all its mass near a sphere, which a straight line between two of its
    points leaves. Where the directions are equal or opposite, the line is straight.

    Reference: White, *Sampling Generative Networks*, 2016, arXiv:1609.04468.
    """
    lengths = torch.stack([start.norm(), end.norm()])
    t = places[:, None]
    directions = torch.stack([start, end]) / lengths.clamp(min=1e-12)[:, None]
    angle = torch.arccos((directions[0] @ directions[1]).clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(start, end, t)
    turned = torch.sin((1 - t) * angle) * directions[0] + torch.sin(t * angle) * directions[1]
    return turned / angle.sin() * torch.lerp(lengths[0], lengths[1], t)


def _in_bits(nats: Tensor) -> Measured:
    """The mean of ``SAMPLES`` values, and its standard error."""
    bits = nats.double().flatten() / math.log(2)
    return Measured(bits.mean().item(), (bits.std() / math.sqrt(len(bits))).item(), "bits")
