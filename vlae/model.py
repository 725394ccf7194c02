"""The Variational Lossy Autoencoder: encoder, decoder and prior put together, and the bound."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlae.networks.decoder import Decoder
from vlae.networks.encoder import Encoder
from vlae.prior import Prior


class Bound(NamedTuple):
    """The evidence lower bound of a batch in nats per image, estimated from one sample of z.

    Shapes are those of one code for each image. With several, the samples are the first dimension
    of all: (samples, batch, ...). ``elbo = -(distortion + rate)`` is a lower bound on log p(x) in
    expectation. Its negative, the *code length*, is what bits-back coding achieves.
    """

    distortion: Tensor
    """-log p(x|z): (batch,)."""
    rate_per_latent: Tensor
    """log q(z|x) - log p(z), split over the latents: (batch, latents).

    Unless ``VLAE.rate_splits``, only the sum over the latents is a rate: single terms are not, and
    may be negative.
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
    """A VAE whose autoregressive decoder sees only a window, with a flexible prior over the code.

    ``forward`` evaluates the bound, so distributed training only has to wrap the module in
    DistributedDataParallel.

    Reference: Chen, Kingma, Salimans, Duan, Dhariwal, Schulman, Sutskever, Abbeel, *Variational
    Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, prior: Prior, latents: int) -> None:
        super().__init__()
        self.arguments: Mapping[str, object] = {}
        """The arguments of ``vlae.build``, if it made this model."""
        self.encoder, self.decoder, self.prior, self.latents = encoder, decoder, prior, latents

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.decoder.image_shape

    @property
    def rate_splits(self) -> bool:
        """Whether each term of ``rate_per_latent`` is the rate of a single latent."""
        return self.prior.splits_over_latents and self.encoder.splits_over_latents

    def hidden_weights(self) -> list[nn.Parameter]:
        """The weights of hidden layers that have two or more dimensions, for optimizers like Muon.

        These are the weights of the encoder and the decoder, without the layer that sees the image
        and the one that returns the parameters of the pixels. Autoregressive flows are left out,
        because their weights are masked.
        """
        flow = self.encoder.flow.parameters() if self.encoder.flow else ()
        others = {self.encoder.layers[0].weight, self.decoder.head.weight, *flow}
        parts = (*self.encoder.parameters(), *self.decoder.parameters())
        return [weight for weight in parts if weight.dim() > 1 and weight not in others]

    def forward(self, x: Tensor, noise: Tensor, sent: Tensor | int | None = None) -> Bound:
        """The bound of images, whose pixels are 0 or 1, or k / 255, as the likelihood requires.

        x: (batch, channels, height, width). noise: standard normal, (batch, latents); or
        (samples, batch, latents) for several codes of each image. Then the terms of the bound are
        (samples, batch), and the encoder and the decoder's window, which do not depend on z, are
        evaluated once for all samples. Raises ValueError on images or noise of another shape.

        ``sent`` is how many latents of each code are sent, the first ones; by default all. See
        ``truncated``.
        """
        z, log_posterior = self._sample(x, noise)
        # The decoder first: gradients of z are summed in the order of its uses, to the last bit.
        distortion = -self.decoder.log_prob(self._cut(z, sent), x)
        return Bound(distortion, self._cut(log_posterior - self.prior.log_prob(z), sent))

    def rate_per_latent(self, x: Tensor, noise: Tensor, sent: Tensor | int | None = None) -> Tensor:
        """The same term of the bound, without evaluating the decoder: (batch, latents)."""
        z, log_posterior = self._sample(x, noise)
        return self._cut(log_posterior - self.prior.log_prob(z), sent)

    def truncated(self, values: Tensor, sent: Tensor | int) -> Tensor:
        r"""Codes of which only the first latents are sent, or rates of these: the others are 0.

        The first k latents and the decoder given them and zeros are a model of their own,

        .. math:: p_k(x, z_{\le k}) = p(z_{\le k})\, p(x | z_{\le k}, 0),

        whose bound has the distortion of the truncated code and the rate of its latents. It holds
        if both densities split over the latents in their order: then the first terms are those of
        p(z_1, ..., z_k) and q(z_1, ..., z_k | x). With k = latents it is the model itself.

        values: (..., batch, latents). sent: one number, or numbers that broadcast to (..., batch).
        Raises ValueError if the densities do not split in this order: flows of more than one step
        do not, nor do maps, whose flows go from position to position.
        """
        if not self.rate_splits or self.decoder.code_shape:
            raise ValueError(
                "the first latents of this model have no density of their own; use a code that is "
                "a vector, and flow_depth and posterior_depth of 0 or 1"
            )
        number = torch.as_tensor(sent, device=values.device)[..., None]
        return values * (torch.arange(self.latents, device=values.device) < number)

    def _cut(self, values: Tensor, sent: Tensor | int | None) -> Tensor:
        return values if sent is None else self.truncated(values, sent)

    def _sample(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z, and log q(z|x) split over the latents, both of the shape of ``noise``."""
        # Noise of another shape would broadcast: all images would share it, or all latents.
        if noise.dim() not in (2, 3) or noise.shape[-2:] != (len(x), self.latents):
            raise ValueError(
                f"noise has the shape {tuple(noise.shape)}; it must be ({len(x)}, {self.latents}), "
                f"or (samples, {len(x)}, {self.latents}) for several codes of each image"
            )
        return self.encoder(x).sample_with_log_prob(noise)
