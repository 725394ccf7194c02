"""The training loss with its free bits, and the bounds that are reported."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vlae.model import Bound


def group_rates(rate_per_latent: Tensor, groups: int) -> Tensor:
    """The batch's mean rate of each of ``groups`` equal parts of the code, in nats.

    (..., batch, latents) -> (groups,). A group is a run of neighbouring latents. Its value is a
    rate, log q(z_g|x) - log p(z_g|...), only if the rate splits over latents
    (``VLAE.rate_splits``).
    """
    return rate_per_latent.unflatten(-1, (groups, -1)).sum(-1).flatten(0, -2).mean(0)


def training_loss(
    bound: Bound, mean_rates: Tensor, free_nats: float, rate_weight: float | Tensor
) -> Tensor:
    """The scalar to minimise, in nats per image.

        mean distortion + rate_weight * sum_g max(mean rate of group g, free_nats / groups)

    ``free_nats`` is the floor under the rate of the whole code; the groups share it equally. While
    the rate of a group is below its floor, the rate's gradient vanishes, so that nothing pushes
    the group's rate further down.

    ``mean_rates`` is ``group_rates`` averaged over the *global* batch, without gradient, (groups,);
    or a scalar, the mean rate of the whole code. It decides whether a floor is active. So every
    rank takes the same branch, and the gradient does not depend on how the batch is split.

    With several codes of each image the means are also over the codes. Raises ValueError on
    ``mean_rates`` of another shape.

    Reference for free bits: Kingma et al., *Improved Variational Inference with Inverse
    Autoregressive Flow*, NeurIPS 2016, arXiv:1606.04934.
    """
    groups, latents = mean_rates.numel(), bound.rate_per_latent.shape[-1]
    if mean_rates.dim() > 1 or groups == 0 or latents % groups:
        raise ValueError(
            f"mean_rates has the shape {tuple(mean_rates.shape)}; it must be a scalar, or "
            f"(groups,) for a number of groups that divides {latents} latents"
        )
    rates, floor = group_rates(bound.rate_per_latent, groups), free_nats / groups
    floored = torch.where(mean_rates < floor, torch.full_like(rates, floor), rates)
    return bound.distortion.mean() + rate_weight * floored.sum()


def draw_sent(uniform: Tensor, latents: int) -> Tensor:
    """How many latents are sent of each image's two codes in nested training: (2, batch), int64.

    The first is sent whole. The second is cut to a number drawn from uniform noise in [0, 1),
    (batch,): its logarithm, before it is rounded down, is uniform from 0 to log(latents). So a code
    is as likely to be cut between 1 and 2 as between 8 and 16.

    Reference: Rippel, Gelbart, Adams, *Learning Ordered Representations with Nested Dropout*,
    ICML 2014, arXiv:1402.0915, where the number is geometric.
    """
    cut = (latents ** uniform.double()).floor().long()
    return torch.stack([torch.full_like(cut, latents), cut])


class SoftFreeBits:
    """Soft free bits: adapts gamma in (0, 1], the weight of the rate in the loss.

        loss = distortion + gamma * rate

    Every ``INTERVAL`` steps gamma falls by 10 % if the rate is below ``target`` nats, and rises by
    10 % if the rate is more than 5 % above it. At gamma = 1 the loss is the code length itself, so
    a target below the rate that the model would choose anyway changes nothing in the end. Unlike
    the hard floor, the loss has no kink, and the rate's gradient never vanishes.

    The paper does not say how often gamma changes, nor which rate decides. The rate of a single
    mini-batch is noisy, so we average it over about ``INTERVAL`` steps. If gamma changes at every
    step, it oscillates widely; if it changes every 20 steps, it lags and overshoots.

    The state is tensors on ``device``, and no operation waits for the device. ``state_dict`` is
    part of a run's state.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731,
    appendix C.
    """

    FACTOR = 1.1
    """Gamma is multiplied or divided by this."""
    TOLERANCE = 0.05
    """How far above the target the rate may lie, relative to it, before gamma rises."""
    INTERVAL = 5
    """Steps between two changes of gamma, and over which the rate is averaged."""

    def __init__(self, target: float, device: torch.device | None = None) -> None:
        self.target = target
        self.gamma = torch.ones((), device=device)
        self.rate = torch.full((), target, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, mean_rate: Tensor) -> None:
        """Update gamma from a step's rate in nats, averaged over the global batch.

        ``mean_rate`` is a scalar without gradient. If it is not finite, the step is ignored. Raises
        ValueError if it is not a scalar.
        """
        if mean_rate.dim():
            raise ValueError(
                f"mean_rate has the shape {tuple(mean_rate.shape)}; it must be a scalar, the mean "
                "rate of the whole code"
            )
        finite = mean_rate.isfinite()
        self.steps = self.steps + finite
        average = self.rate.lerp(mean_rate.to(self.rate), 1 / self.INTERVAL)
        self.rate = torch.where(finite, average, self.rate)
        high = self.rate > (1 + self.TOLERANCE) * self.target
        low = self.rate < self.target
        lowered = torch.where(low, self.gamma / self.FACTOR, self.gamma)
        changed = torch.where(high, self.gamma * self.FACTOR, lowered)
        due = finite & (self.steps % self.INTERVAL == 0)
        self.gamma = torch.where(due, changed.clamp(max=1.0), self.gamma)

    def state_dict(self) -> dict[str, Tensor]:
        return {"gamma": self.gamma, "rate": self.rate, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.gamma, self.rate, self.steps = (
            state[name].to(self.gamma.device) for name in ("gamma", "rate", "steps")
        )


class Estimate(NamedTuple):
    """Bounds of each image from k samples of z, in nats per image.

    All are (batch,), except ``rate_per_latent``, and float64.
    """

    distortion: Tensor
    """-log p(x|z), averaged over the samples."""
    rate_per_latent: Tensor
    """log q(z|x) - log p(z), averaged over the samples and split over the latents.

    (batch, latents). Single terms are rates only where those of ``Bound`` are.
    """
    iwae: Tensor
    """The importance-weighted bound log (1/k) sum_j p(x, z_j) / q(z_j|x).

    A lower bound on log p(x) in expectation, tighter as k grows; with k = 1 it is the ELBO.

    Reference: Burda, Grosse, Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016,
    arXiv:1509.00519.
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
        """The cost of the approximate posterior: iwae - elbo.

        Never negative, and in expectation at most KL(q(z|x) || p(z|x)).
        """
        return self.iwae - self.elbo


@torch.no_grad()
def estimate(
    model: Callable[[Tensor, Tensor], Bound],
    x: Tensor,
    noise: Tensor | Iterable[Tensor],
    max_pairs: int = 128,
) -> Estimate:
    """Estimate the bounds of images x, (batch, channels, height, width).

    ``noise`` is standard normal, (k, batch, latents), or such tensors one after the other, whose
    samples all count: then memory does not grow with k. ``max_pairs``, the number of (image,
    sample) pairs evaluated at once, limits the memory. Sums over samples are in float64. Raises
    ValueError on noise of another shape, or without a sample.
    """
    images = min(len(x), max_pairs)
    samples = max(1, max_pairs // max(1, images))
    count, sums = 0, _Sums(len(x), x.device)
    for part in (noise,) if isinstance(noise, Tensor) else noise:
        if part.dim() != 3 or part.shape[1] != len(x):
            raise ValueError(
                f"noise has the shape {tuple(part.shape)}; it must be (samples, {len(x)}, latents),"
                " with one row for each image"
            )
        count += len(part)
        for start in range(0, len(x), max(1, images)):
            rows = slice(start, start + images)
            for some in part[:, rows].split(samples):
                sums.add(rows, model(x[rows], some))
    if not count:
        raise ValueError("noise has no sample; give at least one for each image")
    return Estimate(
        sums.distortion / count, sums.rate_per_latent / count, sums.log_weights - math.log(count)
    )


class _Sums:
    """Sums of the bounds' terms over samples, for each image, in float64."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.distortion = torch.zeros(images, dtype=torch.float64, device=device)
        self.rate_per_latent = self.distortion.new_zeros(images, 0)
        self.log_weights = self.distortion - math.inf
        """The logarithm of the sum of exp(elbo)."""

    def add(self, rows: slice, bound: Bound) -> None:
        """Add samples of some images: a bound whose terms are (samples, rows)."""
        distortion, rate = bound.distortion.double(), bound.rate_per_latent.double()
        if not self.rate_per_latent.shape[1]:
            self.rate_per_latent = rate.new_zeros(len(self.distortion), rate.shape[-1])
        self.distortion[rows] += distortion.sum(0)
        self.rate_per_latent[rows] += rate.sum(0)
        weights = torch.logsumexp(-(distortion + rate.sum(-1)), 0)
        self.log_weights[rows] = torch.logaddexp(self.log_weights[rows], weights)
