"""Priors over the code z: the standard normal, and the autoregressive flow (AF)."""

from typing import cast

import torch
from torch import Tensor, nn

from vlae.distributions import standard_normal_log_prob
from vlae.made import MADE, MapMADE

LOG_SCALE_BOUND = 3.0


class StandardNormal(nn.Module):
    """p(z) = N(0, I)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, split over the latents: (..., latents) -> (..., latents)."""
        return standard_normal_log_prob(z)

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of the same shape."""
        return noise


class AutoregressiveFlow(nn.Module):
    """p(z) of z = f_T(... f_1(noise)), each step affine and autoregressive, the order reversed between steps.

    Density runs the steps backwards, each in one parallel pass of a MADE:

        noise_i = (z_i - mean_i(z_<i)) * exp(-log_scale_i(z_<i)),   log p(z) = sum_i log N(noise_i) - sum_steps log_scale_i

    Sampling inverts each step one latent at a time. ``log_scale`` is bounded to [-3, 3] by a scaled tanh. The paper's own flow is
    ``mean_only``, log_scale = 0; an affine one reached a better bound at equal cost.

    ``latents`` is the length of z, or (channels, height, width) of codes that are maps: their steps are convolutional, and z is the
    maps flattened in this order. ``hidden`` and ``layers`` are the units (or maps) and the hidden layers of each step. With
    ``context`` features (for maps: context maps of the same height and width, flattened like z), every step sees these, too.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731, section 3.2; the form of a step
    is that of Papamakarios et al., *Masked Autoregressive Flow*, NeurIPS 2017, arXiv:1705.07057.
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

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> (noise, log |d noise / d z| split over the latents), both of shape (..., latents)."""
        self._check(context)
        log_det = torch.zeros_like(z)
        for number, step in reversed(list(enumerate(self.steps))):
            outputs = step(_turned(z, number), None if context is None else _turned(context, number))
            mean, log_scale = _mean_and_log_scale(_turned(outputs, number))
            z = (z - mean) * torch.exp(-log_scale)
            log_det = log_det - log_scale
        return z, log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, split over the latents: (..., latents) -> (..., latents).

        With one step the terms are log p(z_i | z_<i); with more, only their sum has a meaning.
        """
        noise, log_det = self.inverse(z)
        return standard_normal_log_prob(noise) + log_det

    def sample(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """z from standard normal ``noise``, both (..., latents): the other way round of ``inverse``, sequential over the latents."""
        self._check(context)
        z = noise.reshape(-1, noise.shape[-1])
        if context is not None:
            context = context.expand(*noise.shape[:-1], -1).reshape(len(z), -1)
        for number, step in enumerate(cast("list[MADE | MapMADE]", list(self.steps))):
            said = None if context is None else _turned(context, number)
            z = _turned(step.solve(_turned(z, number), _scale_and_shift, said), number)
        return z.reshape(noise.shape)

    def _check(self, context: Tensor | None) -> None:
        if (context is None) != (self.context == 0):
            raise ValueError(f"the flow was made with context={self.context}; give it a context if and only if that is not 0")


def _turned(vector: Tensor, number: int) -> Tensor:
    """A vector as a step sees it, or back: odd steps see it turned round, which reverses the order between steps.

    Maps are flattened, so turning the vector also turns the maps by half a circle; so the context maps have to be turned, too.
    """
    return vector.flip(-1) if number % 2 else vector


def _scale_and_shift(noise: Tensor, outputs: Tensor) -> Tensor:
    """A step forwards: (..., latents), (..., outputs, latents) -> (..., latents)."""
    mean, log_scale = _mean_and_log_scale(outputs)
    return noise * torch.exp(log_scale) + mean


def _mean_and_log_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a step's outputs, (..., 1 or 2, latents), mean: two of (..., latents); mean-only steps have a log scale of 0."""
    mean, *raw = outputs.unbind(-2)
    return mean, LOG_SCALE_BOUND * torch.tanh(raw[0] / LOG_SCALE_BOUND) if raw else torch.zeros_like(mean)
