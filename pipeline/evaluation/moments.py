"""Sums and counts of per-image quantities, added up over batches and ranks and divided once."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.values import Measured


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place and without gradient; with one rank it is unchanged."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class Moments:
    """Mean and standard error of per-image quantities, from sums in float64.

    The sums add up over batches and ranks. A quantity has one value per image, or one per image
    and latent: the latter are for ``add``, ``means``, ``variances`` and ``standard_errors``.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value per image for each name: tensors of shape (batch,) or (batch, latents)."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            moments = torch.stack(
                [torch.ones_like(value).sum(0), value.sum(0), value.square().sum(0)]
            )
            self.sums[name] = self.sums.get(name, 0) + moments

    def reduce(self, names: list[str], device: torch.device) -> None:
        """Add up over all ranks; a rank without images contributes zeros."""
        zero = torch.zeros(3, dtype=torch.float64)
        table = sum_over_ranks(
            torch.stack([self.sums.get(name, zero) for name in names]).to(device)
        )
        self.sums = dict(zip(names, table.cpu(), strict=True))

    def count(self, name: str) -> int:
        return int(self.sums[name][0])

    def mean(self, name: str) -> float:
        count, total, _ = self.sums[name].tolist()
        return total / count

    def standard_error(self, name: str) -> float | None:
        """Standard deviation over images / sqrt(images); none for a single image."""
        count, total, squares = self.sums[name].tolist()
        if count < 2:
            return None
        variance = max(0.0, squares / count - (total / count) ** 2) * count / (count - 1)
        return math.sqrt(variance / count)

    def measured(self, name: str, unit: str = "") -> Measured:
        """The mean with its standard error."""
        return Measured(self.mean(name), self.standard_error(name), unit, self.count(name))

    def standard_errors(self, name: str) -> list[float | None]:
        """The standard error for each latent; none for a single image."""
        count = int(self.sums[name][0, 0])
        if count < 2:
            return [None] * self.sums[name].shape[1]
        return (self.variances(name) / (count - 1)).sqrt().tolist()

    def means(self, name: str) -> Tensor:
        """The mean over images, for each latent: (latents,)."""
        count, total, _ = self.sums[name]
        return total / count

    def variances(self, name: str) -> Tensor:
        """The variance over images (the mean squared deviation), for each latent: (latents,)."""
        count, total, squares = self.sums[name]
        return (squares / count - (total / count).square()).clamp(min=0)
