"""The posterior q(z|x) of an inverse autoregressive flow (IAF)."""

from dataclasses import dataclass

from torch import Tensor

from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow


@dataclass(frozen=True)
class IAFPosterior:
    """q(z|x) of z = g_T(... g_1(z_0)), z_0 from the encoder's diagonal Gaussian, each step autoregressive in what goes into it.

        z_0 = mean(x) + scale(x) * noise,   z = flow.inverse(z_0, context(x)),   log q(z|x) = log q(z_0|x) - log |d z / d z_0|

    These are the steps of ``AutoregressiveFlow`` in their parallel direction, so sampling, which is what training needs, takes one
    pass for each, and the density of a z that was not just drawn is sequential over the latents. ``context``, what the encoder
    says to every step, is (batch, features), or None.

    A standard normal prior with this posterior and an unconditional flow is the same bound as the diagonal Gaussian posterior with
    that flow as its prior; there, however, the flow is also part of the way from noise to image (section 3.2 of the VLAE paper).

    Reference: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, *Improving Variational Inference with Inverse
    Autoregressive Flow*, NeurIPS 2016, arXiv:1606.04934.
    """

    base: DiagonalGaussian
    flow: AutoregressiveFlow
    context: Tensor | None = None

    @property
    def code(self) -> Tensor:
        """The one code that stands for the image: what the mean of z_0 becomes, (batch, latents)."""
        return self.flow.inverse(self.base.mean, self.context)[0]

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of shape (..., batch, latents)."""
        return self.flow.inverse(self.base.sample(noise), self.context)[0]

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``sample(noise)`` and terms that sum to its log density in nats, both (..., batch, latents).

        With one step the terms are log q(z_i | the latents before it); with more, only their sum has a meaning.
        """
        start, log_prob = self.base.sample_with_log_prob(noise)
        z, log_det = self.flow.inverse(start, self.context)
        return z, log_prob - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """Terms that sum to the log density in nats, of the shape of ``z``, (..., batch, latents); sequential over the latents."""
        start = self.flow.sample(z, self.context)
        return self.base.log_prob(start) - self.flow.inverse(start, self.context)[1]
