"""What is minimised in training, and the bounds that are reported."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlae.model import Bound


def training_loss(bound: Bound, mean_rate: Tensor, free_nats: float, rate_weight: float) -> Tensor:
    """The scalar to minimise, in nats per image: mean distortion + rate_weight * max(mean rate, free_nats).

    ``mean_rate`` is the rate in nats averaged over the *global* batch, a scalar without gradient: it decides whether the
    floor is active, so that every rank takes the same branch and the gradient does not depend on how the batch is split.
    While the rate is below the floor its gradient vanishes, and the decoder has no reason yet to stop using z. Free
    bits: Kingma et al., *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS 2016, arXiv:1606.04934.
    """
    rate = bound.rate.mean()
    floored = torch.where(mean_rate < free_nats, torch.full_like(rate, free_nats), rate)
    return bound.distortion.mean() + rate_weight * floored


class Estimate(NamedTuple):
    """What k samples of z tell about each image, in nats per image; all of shape (batch,)."""

    distortion: Tensor
    """-log p(x|z), averaged over the samples."""
    rate: Tensor
    """log q(z|x) - log p(z), averaged over the samples."""
    iwae: Tensor
    """The importance-weighted bound log (1/k) sum_j p(x, z_j) / q(z_j|x): a lower bound on log p(x) in expectation, tighter as
    k grows; with k = 1 it is the ELBO.

    Reference: Burda, Grosse, Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016, arXiv:1509.00519.
    """

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, averaged over the samples."""
        return -(self.distortion + self.rate)


@torch.no_grad()
def estimate(model: Callable[[Tensor, Tensor], Bound], x: Tensor, noise: Tensor, max_pairs: int = 64) -> Estimate:
    """Measure the bounds of images x (batch, channels, height, width) with standard normal ``noise`` (k, batch, latents).

    ``max_pairs`` bounds the memory: the number of (image, sample) pairs evaluated at once.
    Raises ValueError if the noise is not of that shape.
    """
    if noise.dim() != 3 or noise.shape[1] != len(x):
        raise ValueError(
            f"noise has the shape {tuple(noise.shape)}; it must be (samples, {len(x)}, latents), one row for each image"
        )
    if len(x) > max_pairs:
        parts = [estimate(model, *pair, max_pairs) for pair in zip(x.split(max_pairs), noise.split(max_pairs, 1), strict=True)]
        return Estimate(*(torch.cat(values) for values in zip(*parts, strict=True)))
    bounds = [model(x, part) for part in noise.split(max(1, max_pairs // max(1, len(x))))]
    distortion, rate = (torch.cat([getattr(bound, name) for bound in bounds]) for name in ("distortion", "rate"))
    iwae = torch.logsumexp(-(distortion + rate), 0) - math.log(len(noise))
    return Estimate(distortion.mean(0), rate.mean(0), iwae)
