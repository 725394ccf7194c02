r"""Codes z on a stack: priors and posteriors, flows of any depth by local bits-back coding.

A flow step relates two codes, both on the grid, by

.. math:: w_i = m_i(w_{<i}) + s_i(w_{<i})\, b_i .

For a prior, w is the side of z and b that of the noise. For an IAF posterior, whose steps run the
other way, w is the side of the noise. ``exchange`` replaces w by b on the stack's account: it pops
:math:`b_i \sim N((w_i - m_i)/s_i, \beta_i^2)` and pushes :math:`w_i` with
:math:`N(m_i + s_i b_i, (s_i \beta_i)^2)`. The two Gaussians have the same exponent, so the stack
grows by

.. math:: \log_2 s_i \ \text{bits}

for each latent: exactly the step's Jacobian, up to the rounding of the grid. What is left is b, one
step nearer to the noise. The jitter :math:`\beta_i` costs :math:`\beta_i^2 / 2` nats under the
standard normal. It is chosen so that both Gaussians are two grid steps wide or wider.

The first step of a prior needs no exchange: given the latents before it, a latent is a Gaussian.

Reference: Ho, Lohn, Abbeel, *Compression with Flows via Local Bits-Back Coding*, NeurIPS 2019,
arXiv:1905.08500, section 3.4.2 (autoregressive flows).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlae.coding.decisions import Coder
from vlae.coding.grid import STEP, pop_normal, push_normal
from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow, mean_and_log_scale, turned
from vlae.networks.made import MADE, MapMADE
from vlae.posterior import IAFPosterior, Posterior
from vlae.prior import Prior, StandardNormal

JITTER = 2 * STEP
"""The least standard deviation of the Gaussians of an exchange: two grid steps."""
Part = tuple[Tensor, Tensor, Tensor]
"""Latents that are solved together, their means and the scales of the step; float64, (rows,)."""


def check(prior: Prior) -> None:
    """Raise ValueError, naming it, if there is no exact code for a prior."""
    if not isinstance(prior, StandardNormal | AutoregressiveFlow):
        raise ValueError(
            f"there is no exact code for the prior {type(prior).__name__}; use a standard normal "
            "prior or an autoregressive flow"
        )


def push_prior(coder: Coder, prior: Prior, z: Tensor) -> None:
    """Push codes with p(z): (batch, latents), on the grid."""
    if isinstance(prior, AutoregressiveFlow):
        for number in range(len(prior.steps) - 1, 0, -1):
            z = turned(_exchange(coder, _step(prior, number), turned(z, number), None), number)
        for w, mean, scale in reversed(_parts(_step(prior, 0), z, None)):
            push_normal(coder, w, mean, scale)
    else:
        push_normal(coder, z, torch.zeros_like(z), torch.ones_like(z))


def pop_prior(coder: Coder, prior: Prior, batch: int, latents: int) -> Tensor:
    """Undo ``push_prior``: (batch, latents)."""
    start = torch.zeros(batch, latents)
    if not isinstance(prior, AutoregressiveFlow):
        return pop_normal(coder, start, torch.ones_like(start))

    def draw(noise: Tensor, outputs: Tensor) -> Tensor:
        mean, scale = _mean_and_scale(outputs)
        return pop_normal(coder, mean, scale).view(noise.shape)

    z = _step(prior, 0).solve(start, draw)
    for number in range(1, len(prior.steps)):
        z = turned(_exchange_back(coder, _step(prior, number), turned(z, number), None), number)
    return z


def pop_posterior(coder: Coder, posterior: Posterior) -> Tensor:
    """Pop z ~ q(z|x): (batch, latents)."""
    if not isinstance(posterior, IAFPosterior):
        gaussian = _gaussian(posterior)
        return pop_normal(coder, gaussian.mean, gaussian.log_scale.double().exp())
    z = pop_posterior(coder, posterior.base)
    for number in range(len(posterior.flow.steps) - 1, -1, -1):
        context = None if posterior.context is None else turned(posterior.context, number)
        step = _step(posterior.flow, number)
        z = turned(_exchange(coder, step, turned(z, number), context), number)
    return z


def push_posterior(coder: Coder, posterior: Posterior, z: Tensor) -> None:
    """Undo ``pop_posterior``."""
    if not isinstance(posterior, IAFPosterior):
        gaussian = _gaussian(posterior)
        push_normal(coder, z, gaussian.mean, gaussian.log_scale.double().exp())
        return
    for number in range(len(posterior.flow.steps)):
        context = None if posterior.context is None else turned(posterior.context, number)
        step = _step(posterior.flow, number)
        z = turned(_exchange_back(coder, step, turned(z, number), context), number)
    push_posterior(coder, posterior.base, z)


def _exchange(coder: Coder, step: MADE | MapMADE, w: Tensor, context: Tensor | None) -> Tensor:
    """Replace w by b; both are (batch, latents)."""
    parts = _parts(step, w, context)
    values, mean, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    jitter = JITTER * torch.clamp(1 / scale, min=1)
    b = pop_normal(coder, (values - mean) / scale, jitter)
    at = [len(part[0]) for part in parts]
    split = zip(parts, b.double().split(at), jitter.split(at), strict=True)
    for (values, mean, scale), drawn, narrow in reversed(list(split)):
        push_normal(coder, values, mean + scale * drawn, scale * narrow)
    return _from_parts(step, b.split(at), context, len(w))


def _exchange_back(coder: Coder, step: MADE | MapMADE, b: Tensor, context: Tensor | None) -> Tensor:
    """Undo ``_exchange``."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def draw(noise: Tensor, outputs: Tensor) -> Tensor:
        mean, scale = _mean_and_scale(outputs)
        values = noise.double().flatten()
        jitter = JITTER * torch.clamp(1 / scale, min=1)
        w = pop_normal(coder, mean + scale * values, scale * jitter)
        found.append((w.double(), mean, scale, values))
        return w.view(noise.shape)

    solved = step.solve(b, draw, context)
    w, mean, scale, values = (torch.cat(each) for each in zip(*found, strict=True))
    push_normal(coder, values, (w - mean) / scale, JITTER * torch.clamp(1 / scale, min=1))
    return solved


def _from_parts(
    step: MADE | MapMADE, parts: Sequence[Tensor], context: Tensor | None, batch: int
) -> Tensor:
    """The parts of a code, each (rows,), as one tensor, (batch, latents)."""
    size = step.size if isinstance(step, MADE) else math.prod(step.shape)
    code = parts[0].new_empty(batch, size)
    places: list[Tensor] = []

    def look(noise: Tensor, outputs: Tensor) -> Tensor:
        places.append(noise.flatten().long())
        return noise

    # The parts of a single row whose values are their own places.
    numbers = torch.arange(size, dtype=code.dtype)[None]
    step.solve(numbers, look, None if context is None else context[:1])
    # A part's rows are the places of the first image, then those of the second.
    for place, part in zip(places, parts, strict=True):
        code[:, place] = part.view(batch, -1)
    return code


def _parts(step: MADE | MapMADE, w: Tensor, context: Tensor | None) -> list[Part]:
    """The parts of a known w, in the order in which ``solve`` finds them.

    ``solve`` computes the outputs, as it does when w is popped: one parallel pass would round
    them differently.
    """
    parts: list[Part] = []

    def look(noise: Tensor, outputs: Tensor) -> Tensor:
        mean, scale = _mean_and_scale(outputs)
        parts.append((noise.double().flatten(), mean, scale))
        return noise

    step.solve(w, look, context)
    return parts


def _mean_and_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each latent in float64, flattened."""
    mean, log_scale = mean_and_log_scale(outputs)
    return mean.double().flatten(), log_scale.double().flatten().exp()


def _gaussian(posterior: Posterior) -> DiagonalGaussian:
    if not isinstance(posterior, DiagonalGaussian):
        raise ValueError(
            f"there is no exact code for the posterior {type(posterior).__name__}; use a diagonal "
            "Gaussian or an inverse autoregressive flow"
        )
    return posterior


def _step(flow: AutoregressiveFlow, number: int) -> MADE | MapMADE:
    step = flow.steps[number]
    assert isinstance(step, MADE | MapMADE)
    return step
