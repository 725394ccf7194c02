"""Posteriors q(z|x), as the encoder returns them, and the inverse autoregressive flow (IAF)."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow


class Posterior(Protocol):
    """The distributions of a batch's codes, one for each image."""

    @property
    def code(self) -> Tensor:
        """The code that represents each image, without noise: (batch, latents)."""

    @property
    def splits_over_latents(self) -> bool:
        """Whether each term of the log density is that of a single latent.

        It may be conditional on the latents before it. Where it is not, only the sum of the terms
        has a meaning.
        """

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of shape (..., batch, latents)."""

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``sample(noise)``, and terms that sum to its log density in nats.

        Both have the shape (..., batch, latents).
        """

    def log_prob(self, z: Tensor) -> Tensor:
        """Terms that sum to the log density of any z, in nats, of the shape of ``z``."""


@dataclass(frozen=True)
class IAFPosterior:
    """q(z|x) of z = g_T(... g_1(z_0)): a diagonal Gaussian followed by an autoregressive flow.

        z_0 = mean(x) + scale(x) * noise,   z = flow.inverse(z_0, context(x))
        log q(z|x) = log q(z_0|x) - log |d z / d z_0|

    Each step is autoregressive in its input. The steps are those of ``AutoregressiveFlow`` in the
    parallel direction: sampling, which is what training needs, takes one pass a step. The density
    of a z that was not just sampled is sequential over the latents. ``context``, the features of
    the image that every step sees, is (batch, features), or None.

    A standard normal prior with this posterior and a flow without context gives the same bound as
    the diagonal Gaussian posterior with that flow as its prior. With the prior, however, the flow
    is also part of the way from noise to image (section 3.2 of the VLAE paper).

    Reference: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, *Improving Variational
    Inference with Inverse Autoregressive Flow*, NeurIPS 2016, arXiv:1606.04934.
    """

    base: DiagonalGaussian
    flow: AutoregressiveFlow
    context: Tensor | None = None

    @property
    def code(self) -> Tensor:
        """The image of the mean of z_0 under the flow: (batch, latents)."""
        return self.flow.inverse(self.base.mean, self.context)[0]

    @property
    def splits_over_latents(self) -> bool:
        """Whether each term of the log density is log q(z_i | z_<i, x): with one step at most."""
        return self.flow.splits_over_latents

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of shape (..., batch, latents)."""
        return self.flow.inverse(self.base.sample(noise), self.context)[0]

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``sample(noise)``, and terms that sum to its log density in nats.

        Both have the shape (..., batch, latents).
        """
        start, log_prob = self.base.sample_with_log_prob(noise)
        z, log_det = self.flow.inverse(start, self.context)
        return z, log_prob - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """Terms that sum to the log density in nats: (..., batch, latents) -> the same shape.

        Sequential over the latents.
        """
        start = self.flow.sample(z, self.context)
        return self.base.log_prob(start) - self.flow.inverse(start, self.context)[1]
