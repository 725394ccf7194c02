"""The autoregressive flow (AF): a prior over the code, and the steps of an IAF posterior."""

from typing import cast

import torch
from torch import Tensor, nn

from vlae.distributions import standard_normal_log_prob
from vlae.networks.made import MADE, MapMADE

LOG_SCALE_BOUND = 3.0
"""The log scale of a step lies between minus this and this."""


class AutoregressiveFlow(nn.Module):
    """p(z) of z = f_T(... f_1(noise)), affine autoregressive steps in alternating order.

    The density runs the steps backwards, each in one parallel pass of a MADE:

        noise_i = (z_i - mean_i(z_<i)) * exp(-log_scale_i(z_<i))
        log p(z) = sum_i log N(noise_i) - sum over steps and latents of log_scale

    Sampling inverts each step one latent at a time. A scaled tanh bounds ``log_scale`` to [-3, 3].
    The paper's own flow is ``mean_only``, with log_scale = 0; an affine one reached a better bound
    at equal cost.

    ``latents`` is the length of z, or the (channels, height, width) of a code of maps. Steps over
    maps are convolutional, and z is the maps flattened in this order. ``hidden`` is the number of
    hidden units (or maps) of a step, ``layers`` the number of its hidden layers. With ``context``
    features every step also depends on these; for codes of maps they are context maps of the same
    height and width, flattened as z is.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731,
    section 3.2. The form of a step is that of Papamakarios et al., *Masked Autoregressive Flow*,
    NeurIPS 2017, arXiv:1705.07057.
    """

    def __init__(
        self,
        latents: int | tuple[int, int, int],
        depth: int,
        hidden: int,
        *,
        layers: int = 2,
        mean_only: bool = False,
        context: int = 0,
    ) -> None:
        super().__init__()
        outputs = 1 if mean_only else 2
        self.context = context
        self.steps = nn.ModuleList(
            MADE(latents, outputs, hidden, layers, context)
            if isinstance(latents, int)
            else MapMADE(latents, outputs, hidden, layers, context)
            for _ in range(depth)
        )

    @property
    def splits_over_latents(self) -> bool:
        """Whether each term of ``log_prob`` is the log density of a single latent.

        With one step it is log p(z_i | z_<i). With more steps only the sum has a meaning.
        """
        return len(self.steps) <= 1

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> (noise, log |d noise / d z| split over the latents), both (..., latents)."""
        self._check(context)
        log_det = torch.zeros_like(z)
        for number, step in reversed(list(enumerate(self.steps))):
            outputs = step(turned(z, number), None if context is None else turned(context, number))
            mean, log_scale = mean_and_log_scale(turned(outputs, number))
            z = (z - mean) * torch.exp(-log_scale)
            log_det = log_det - log_scale
        return z, log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """Terms that sum to log p(z), in nats: (..., latents) -> (..., latents)."""
        noise, log_det = self.inverse(z)
        return standard_normal_log_prob(noise) + log_det

    def sample(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """z from standard normal ``noise``, both (..., latents): undoes ``inverse``.

        Sequential over the latents.
        """
        self._check(context)
        z = noise.reshape(-1, noise.shape[-1])
        if context is not None:
            context = context.expand(*noise.shape[:-1], -1).reshape(len(z), -1)
        for number, step in enumerate(cast("list[MADE | MapMADE]", list(self.steps))):
            turned_context = None if context is None else turned(context, number)
            z = turned(step.solve(turned(z, number), _scale_and_shift, turned_context), number)
        return z.reshape(noise.shape)

    def _check(self, context: Tensor | None) -> None:
        if (context is None) != (self.context == 0):
            given = "none was given" if context is None else "one was given"
            raise ValueError(
                f"the flow has context={self.context}, but {given}; pass a context to a flow "
                "that has one, and to no other"
            )


def turned(vector: Tensor, number: int) -> Tensor:
    """A vector in the order of step ``number``, or back: odd steps take it reversed.

    Maps are flattened, so reversing the vector also rotates the maps by 180 degrees. The context
    maps have to be rotated with them.
    """
    return vector.flip(-1) if number % 2 else vector


def _scale_and_shift(noise: Tensor, outputs: Tensor) -> Tensor:
    """One step from noise to z: (..., latents), (..., outputs, latents) -> (..., latents)."""
    mean, log_scale = mean_and_log_scale(outputs)
    return noise * torch.exp(log_scale) + mean


def mean_and_log_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and log scale in a step's outputs: (..., 1 or 2, latents) -> two (..., latents).

    The log scale of a mean-only step is 0.
    """
    mean, *raw = outputs.unbind(-2)
    if not raw:
        return mean, torch.zeros_like(mean)
    return mean, LOG_SCALE_BOUND * torch.tanh(raw[0] / LOG_SCALE_BOUND)
