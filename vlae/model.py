"""The Variational Lossy Autoencoder: its three parts put together, and its bound."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlae.decoder import Decoder
from vlae.encoder import Encoder
from vlae.flow import AutoregressiveFlow, StandardNormal


class Bound(NamedTuple):
    """The evidence lower bound of a batch in nats per image, estimated from one sample of z.

    Shapes are those of one code for each image; with several, all have the samples in front: (samples, batch, ...).
    ``elbo = -(distortion + rate)`` is a lower bound on log p(x) in expectation; its negative, the *code length*, is what
    bits-back coding achieves.
    """

    distortion: Tensor
    """-log p(x|z): (batch,)."""
    rate_per_latent: Tensor
    """log q(z|x) - log p(z), split over the latents: (batch, latents).

    With a flow of more than one step only the sum over the latents is a rate; single terms are not, and may be negative.
    """

    @property
    def rate(self) -> Tensor:
        """log q(z|x) - log p(z): (batch,)."""
        return self.rate_per_latent.sum(-1)

    @property
    def elbo(self) -> Tensor:
        """log p(x|z) + log p(z) - log q(z|x): (batch,)."""
        return -(self.distortion + self.rate)


class VLAE(nn.Module):
    """A VAE whose autoregressive decoder sees a window, with an autoregressive-flow prior.

    ``forward`` is the evaluation of the bound, so that wrapping the module in DistributedDataParallel is all that
    distributed training needs.

    Reference: Chen, Kingma, Salimans, Duan, Dhariwal, Schulman, Sutskever, Abbeel, *Variational Lossy Autoencoder*,
    ICLR 2017, arXiv:1611.02731.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, prior: StandardNormal | AutoregressiveFlow, latents: int) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        """What ``vlae.build`` was called with, if it made this model."""
        self.encoder, self.decoder, self.prior, self.latents = encoder, decoder, prior, latents

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.decoder.image_shape

    def forward(self, x: Tensor, noise: Tensor) -> Bound:
        """The bound of images, pixels in [0, 1] (0 or 1, or k / 255, as the likelihood wants them).

        x: (batch, channels, height, width). noise: standard normal, (batch, latents), or (samples, batch, latents) for several
        codes of each image; then the terms are (samples, batch), and what does not depend on z, the encoder and the
        decoder's window, is evaluated once for all of them.
        """
        z, log_posterior = self.encoder(x).sample_with_log_prob(noise)
        pixels = self.decoder(z, x)
        with torch.autocast(x.device.type, enabled=False):  # a sum of hundreds of terms, of which each needs its digits
            distortion = -pixels.log_prob(x.permute(0, 2, 3, 1))
        return Bound(distortion, log_posterior - self.prior.log_prob(z))

    def rate_per_latent(self, x: Tensor, noise: Tensor) -> Tensor:
        """That term of the bound alone, which needs no decoder: (batch, latents)."""
        z, log_posterior = self.encoder(x).sample_with_log_prob(noise)
        return log_posterior - self.prior.log_prob(z)
