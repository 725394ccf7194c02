"""The standard normal and the diagonal Gaussian, with ``log_prob`` and ``sample``.

Noise is always an argument and never drawn inside. A model's output is therefore a pure function
of its inputs: the same noise gives the same bound on any number of devices, and the same sample
from any sampler.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of half precision, in which numbers near 1 become 1; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Elementwise log N(z; 0, 1), in nats."""
    return -0.5 * z.square() - HALF_LOG_2PI


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_scale)^2), elementwise; both of shape (..., latents)."""

    splits_over_latents: ClassVar[bool] = True

    mean: Tensor
    log_scale: Tensor

    @property
    def code(self) -> Tensor:
        """The code that represents each image: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + scale * noise, for standard normal ``noise`` that broadcasts with the mean."""
        return self.mean + self.log_scale.exp() * noise

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``sample(noise)`` and its elementwise log density in nats.

        The density is computed from the noise, which avoids the rounding of recovering it from z.
        """
        return self.sample(noise), standard_normal_log_prob(noise) - self.log_scale

    def log_prob(self, z: Tensor) -> Tensor:
        """Elementwise log density in nats, of the shape of ``z``."""
        return (
            standard_normal_log_prob((z - self.mean) * torch.exp(-self.log_scale)) - self.log_scale
        )
