"""Priors p(z) over the code. The autoregressive flow has a module of its own, ``vlae.flow``."""

from typing import Protocol

import torch
from torch import Tensor, nn

from vlae.distributions import standard_normal_log_prob


class Prior(Protocol):
    """A distribution of codes. One with weights is a ``torch.nn.Module``."""

    @property
    def splits_over_latents(self) -> bool:
        """Whether each term of ``log_prob`` is the log density of a single latent.

        It may be conditional on the latents before it. Where it is not, only the sum of the terms
        has a meaning.
        """

    def log_prob(self, z: Tensor) -> Tensor:
        """Terms that sum to log p(z), in nats: (..., latents) -> (..., latents)."""

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of the same shape."""

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that ``sample`` turns into z, and log |d noise / d z| split over the latents.

        Both have the shape of ``z``, (..., latents).
        """


class StandardNormal(nn.Module):
    """p(z) = N(0, I)."""

    splits_over_latents = True

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z_i) of each latent, in nats: (..., latents) -> (..., latents)."""
        return standard_normal_log_prob(z)

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of the same shape: the noise itself."""
        return noise

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> (noise, log |d noise / d z|): z itself and zeros, both (..., latents)."""
        return z, torch.zeros_like(z)
