"""Distributions of codes: objects with ``log_prob`` and ``sample``, given their noise explicitly.

Noise is an argument, never drawn inside, so that a model's output is a pure function of its inputs: the same noise gives
the same bound on any number of devices, and the same sample from any sampler.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Elementwise log N(z; 0, 1), in nats."""
    return -0.5 * z.square() - HALF_LOG_2PI


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_scale)^2), elementwise; both of shape (..., latents)."""

    mean: Tensor
    log_scale: Tensor

    @property
    def code(self) -> Tensor:
        """The one code that stands for the image: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + scale * noise, for standard normal ``noise`` that broadcasts against the mean."""
        return self.mean + self.log_scale.exp() * noise

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``sample(noise)`` and its elementwise log density in nats, free of the rounding of going back from z to the noise."""
        return self.sample(noise), standard_normal_log_prob(noise) - self.log_scale

    def log_prob(self, z: Tensor) -> Tensor:
        """Elementwise log density, in nats, of the shape of ``z``."""
        return standard_normal_log_prob((z - self.mean) * torch.exp(-self.log_scale)) - self.log_scale
