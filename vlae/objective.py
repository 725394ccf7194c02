"""What is minimised in training, and the bounds that are reported."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlae.model import Bound


def group_rates(rate_per_latent: Tensor, groups: int) -> Tensor:
    """The batch's mean rate of each of ``groups`` equal parts of the code, in nats: (batch, latents) -> (groups,).

    A group is a run of neighbouring latents. Its rate is one, log q(z_g|x) - log p(z_g|...), where the prior's log density splits
    over the latents: with no flow, or a flow of one step.
    """
    return rate_per_latent.unflatten(-1, (groups, -1)).sum(-1).mean(0)


def training_loss(bound: Bound, mean_rates: Tensor, free_nats: float, rate_weight: float | Tensor) -> Tensor:
    """The scalar to minimise, in nats per image: mean distortion + rate_weight * sum_g max(mean rate of group g, free_nats / groups).

    ``mean_rates`` is ``group_rates`` averaged over the *global* batch, without gradient, (groups,); or a scalar, the mean rate of all
    latents together. It decides whether a group's floor is active, so that every rank takes the same branch and the gradient does
    not depend on how the batch is split. While a group's rate is below its floor its gradient vanishes, and the decoder has no reason
    yet to stop using it. ``free_nats`` is the floor of the whole code, shared equally by the groups. Free bits: Kingma et al.,
    *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS 2016, arXiv:1606.04934.
    """
    groups = mean_rates.numel()
    rates, floor = group_rates(bound.rate_per_latent, groups), free_nats / groups
    floored = torch.where(mean_rates < floor, torch.full_like(rates, floor), rates)
    return bound.distortion.mean() + rate_weight * floored.sum()


class Estimate(NamedTuple):
    """What k samples of z tell about each image, in nats per image; all of shape (batch,) but ``rate_per_latent``."""

    distortion: Tensor
    """-log p(x|z), averaged over the samples."""
    rate_per_latent: Tensor
    """log q(z|x) - log p(z), averaged over the samples and split over the latents, as far as ``Bound`` says: (batch, latents)."""
    iwae: Tensor
    """The importance-weighted bound log (1/k) sum_j p(x, z_j) / q(z_j|x): a lower bound on log p(x) in expectation, tighter as
    k grows; with k = 1 it is the ELBO.

    Reference: Burda, Grosse, Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016, arXiv:1509.00519.
    """

    @property
    def rate(self) -> Tensor:
        """log q(z|x) - log p(z), averaged over the samples."""
        return self.rate_per_latent.sum(-1)

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound, averaged over the samples."""
        return -(self.distortion + self.rate)

    @property
    def slack(self) -> Tensor:
        """What the posterior costs: iwae - elbo, never negative, in expectation at most KL(q(z|x) || p(z|x))."""
        return self.iwae - self.elbo


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
    distortion, rate = (torch.cat([getattr(bound, name) for bound in bounds]) for name in ("distortion", "rate_per_latent"))
    iwae = torch.logsumexp(-(distortion + rate.sum(-1)), 0) - math.log(len(noise))
    return Estimate(distortion.mean(0), rate.mean(0), iwae)
