r"""Integers as binary decisions: how every pixel and every latent is coded.

An integer of n bits is n decisions, the most significant bit first. Each has the probability of a 1
given the bits before it. A decision is exact whatever rounding its probability suffered: encoder
and decoder only need the same number. That makes one binary entropy coder sufficient for pixels,
for Gaussian latents and for mixtures, and no table of probabilities is needed.

The integers here are *cells*: the real line cut at equidistant edges. With :math:`F` the cumulative
distribution function and :math:`[a, b)` the cells that agree with the bits so far, the next bit is
1 with the probability

.. math:: \frac{F(b) - F(m)}{F(b) - F(a)}, \quad m = \frac{a + b}{2}.

The differences are taken in the tail that is nearer, where they do not cancel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PRECISION = 24
"""Probabilities are multiples of 2^-24, and neither 0 nor 1."""

Decide = Callable[[Tensor], Tensor]
"""The probability of a 1, float64 of any shape -> the bit, int64 of the same shape."""
Integers = npt.NDArray[np.int64]


class Coder(Protocol):
    """A stack of bits on which decisions are pushed, and from which they are popped."""

    def push(self, bits: Integers, ones: Integers) -> None:
        """Push decisions, (n,), whose probabilities of a 1 are ``ones / 2^PRECISION``."""

    def pop(self, ones: Integers) -> Integers:
        """Undo ``push``: returns the bits and leaves the stack as it was before."""


def quantize(probability: Tensor) -> Integers:
    """Probabilities of a 1 as integers from 1 to 2^PRECISION - 1, flattened."""
    scaled = torch.nan_to_num(probability, nan=0.5).flatten() * (1 << PRECISION)
    return scaled.round().clamp(1, (1 << PRECISION) - 1).to(torch.int64).numpy()


def pop(coder: Coder) -> Decide:
    """Decisions that are popped from the stack."""

    def decide(probability: Tensor) -> Tensor:
        bits = coder.pop(quantize(probability))
        return torch.from_numpy(bits).view(probability.shape)

    return decide


class Known:
    """Decisions that are known, recorded to be pushed.

    The decoder pops the decision that was pushed last, so ``push`` starts with the last one.
    """

    def __init__(self, bits: Iterator[Tensor] | None = None) -> None:
        self.bits: Iterator[Tensor] = bits or iter(())
        self.made: list[tuple[Integers, Integers]] = []

    def __call__(self, probability: Tensor) -> Tensor:
        bits = next(self.bits).view(probability.shape)
        self.made.append((bits.flatten().numpy(), quantize(probability)))
        return bits

    def push(self, coder: Coder) -> None:
        """Push all decisions made so far."""
        for bits, ones in reversed(self.made):
            coder.push(bits, ones)


def digits(values: Tensor, levels: int) -> Iterator[Tensor]:
    """The bits of integers, from the most significant of ``levels``."""
    for level in range(levels - 1, -1, -1):
        yield (values >> level) & 1


@dataclass(frozen=True)
class Cells:
    """Distributions over the integers from 0 to 2^levels - 1: mixtures on the cut real line.

    Edge v lies at ``offset + slope * v`` in units of the component's scale, where its cumulative
    distribution function is ``tail``. The first and the last cell also take the tails. ``offset``,
    ``slope`` and ``weight`` are float64, (n, components); weights need not sum to 1.
    """

    offset: Tensor
    slope: Tensor
    weight: Tensor
    levels: int
    tail: Callable[[Tensor], Tensor]
    """The cumulative distribution function of a symmetric distribution; it is called for negative
    arguments only.
    """

    def draw(self, decide: Decide) -> Tensor:
        """Integers, int64 (n,), by ``levels`` decisions each."""
        first = torch.zeros(len(self.offset), dtype=torch.int64)
        nothing = torch.zeros_like(self.weight)
        low, high = (nothing, self.weight), (self.weight, nothing)
        for level in range(self.levels - 1, -1, -1):
            middle, is_left = self._masses(first + (1 << level))
            # Tuples hold what lies below and what lies above an edge.
            below = torch.where(is_left, middle[0] - low[0], low[1] - middle[1]).sum(-1)
            above = torch.where(is_left, high[0] - middle[0], middle[1] - high[1]).sum(-1)
            bit = decide(above / (below + above))
            first += bit << level
            is_one = bit.bool()[:, None]
            low, high = (
                (
                    torch.where(is_one, middle[0], low[0]),
                    torch.where(is_one, middle[1], low[1]),
                ),
                (
                    torch.where(is_one, high[0], middle[0]),
                    torch.where(is_one, high[1], middle[1]),
                ),
            )
        return first

    def masses(self, values: Tensor) -> Tensor:
        """The weighted mass that each component has in a cell: (n,) -> (n, components)."""
        nothing, last = torch.zeros_like(self.weight), (1 << self.levels) - 1
        at_start, at_end = (values == 0)[:, None], (values == last)[:, None]
        (below, above), is_left = self._masses(values)
        (below_next, above_next), _ = self._masses(values + 1)
        below = torch.where(at_start, nothing, below)
        above = torch.where(at_start, self.weight, above)
        below_next = torch.where(at_end, self.weight, below_next)
        above_next = torch.where(at_end, nothing, above_next)
        return torch.where(is_left, below_next - below, above - above_next)

    def _masses(self, edge: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The mass below and above an edge, and whether it lies left of the centre."""
        at = torch.addcmul(self.offset, self.slope, edge[:, None].to(self.slope.dtype))
        is_left = at < 0
        small = self.weight * self.tail(-at.abs())
        large = self.weight - small
        return (torch.where(is_left, small, large), torch.where(is_left, large, small)), is_left
