"""The codes of many images: how far each latent varies, what it tells, and whose code is near."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.information import LN_2, capacities, posterior_terms
from pipeline.evaluation.moments import Moments
from pipeline.retrieval.nearest import nearest
from vlae.posterior import Posterior

LEAST_SPREAD = 1e-6
"""The spread of a latent that is the same for all images: sliders are in units of the spread."""


@dataclass(frozen=True)
class Latents:
    """What the codes say about each latent; tensors of shape (latents,), in float64."""

    center: Tensor
    """The mean of the codes."""
    spread: Tensor
    """The standard deviation of z over the images: that of the aggregate posterior."""
    capacity_bits: Tensor | None
    """The most that the latent alone tells about an image; None if an IAF makes the posterior
    non-Gaussian."""

    @property
    def order(self) -> list[int]:
        """The latents by capacity, the largest first; by variance where there is no capacity."""
        key = self.spread if self.capacity_bits is None else self.capacity_bits
        return torch.argsort(key, descending=True, stable=True).tolist()


class Population:
    """The codes of a split's first images, which are added batch by batch. Thread-safe."""

    def __init__(self, num_images: int, latents: int) -> None:
        self._codes, self._count = torch.empty(num_images, latents), 0
        self._moments, self._lock = Moments(), threading.Lock()

    def add(self, posterior: Posterior) -> None:
        """Add the posteriors of the next images."""
        code, terms = posterior.code.cpu(), posterior_terms(posterior)
        with self._lock:
            self._codes[self._count : self._count + len(code)] = code
            self._count += len(code)
            self._moments.add(terms)

    def latents(self) -> Latents:
        """What the codes so far say about each latent."""
        with self._lock:
            variance, center = self._moments.variances("code"), self._moments.means("code")
            nats = capacities(self._moments)
            if nats is None:
                return Latents(center, variance.sqrt().clamp(min=LEAST_SPREAD), None)
            spread = (variance + self._moments.means("square_scale")).sqrt()
        return Latents(center, spread, nats / LN_2)

    def nearest(self, code: Tensor, count: int, skip: int | None = None) -> list[tuple[int, float]]:
        """The images whose codes are nearest to ``code``, (latents,): number and distance.

        The nearest first; the distance is Euclidean. ``skip`` is an image to leave out.
        """
        codes = self._codes[: self._count]
        own = torch.tensor([-1 if skip is None or skip >= len(codes) else skip])
        ((_, distances, numbers),) = nearest(code[None].cpu(), codes, count, own)
        return list(zip(numbers[0].tolist(), distances[0].tolist(), strict=True))
