"""Priors over the code z: the standard normal, and the autoregressive flow (AF)."""

import torch
from torch import Tensor, nn

from vlae.distributions import standard_normal_log_prob
from vlae.made import MADE

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

    Sampling inverts each step one latent at a time. ``log_scale`` is bounded to [-3, 3] by a scaled tanh; the paper's own
    prior has no scale at all, an affine one reached a better bound at equal cost.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731, section 3.2; the form of a step
    is that of Papamakarios et al., *Masked Autoregressive Flow*, NeurIPS 2017, arXiv:1705.07057.
    """

    def __init__(self, latents: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(MADE(latents, 2, hidden) for _ in range(depth))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> (noise, log |d noise / d z| split over the latents), both of shape (..., latents)."""
        log_det = torch.zeros_like(z)
        for step in reversed(self.steps):
            # Each step works in its own order: turning the vector round before each is what reverses the orders between them.
            z, log_det = z.flip(-1), log_det.flip(-1)
            mean, log_scale = _mean_and_log_scale(step(z))
            z = (z - mean) * torch.exp(-log_scale)
            log_det = log_det - log_scale
        return z, log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, split over the latents: (..., latents) -> (..., latents).

        With one step the terms are log p(z_i | z_>i); with more, only their sum has a meaning.
        """
        noise, log_det = self.inverse(z)
        return standard_normal_log_prob(noise) + log_det

    def sample(self, noise: Tensor) -> Tensor:
        """z from standard normal ``noise`` of shape (batch, latents); sequential over the latents."""
        z = noise
        for step in self.steps:
            z = step.solve(_Affine(z)).flip(-1)
        return z


class _Affine:
    """One latent of a step's inverse: its noise, scaled and shifted by what the latents before it say."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, i: int, outputs: Tensor) -> Tensor:
        mean, log_scale = _mean_and_log_scale(outputs[..., None])
        return self.noise[:, i] * torch.exp(log_scale[..., 0]) + mean[..., 0]


def _mean_and_log_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2, latents) -> two of (..., latents)."""
    mean, raw = outputs.unbind(-2)
    return mean, LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)
