"""Priors p(z) over the code. The autoregressive flow has a module of its own, ``vlae.flow``."""

from typing import Protocol

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


class StandardNormal(nn.Module):
    """p(z) = N(0, I)."""

    splits_over_latents = True

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z_i) of each latent, in nats: (..., latents) -> (..., latents)."""
        return standard_normal_log_prob(z)

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of the same shape: the noise itself."""
        return noise
