"""MADE: networks whose i-th output depends only on the inputs that come before i.

Reference: Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*, ICML 2015,
arXiv:1502.03509.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed 0/1 mask of shape (out_features, in_features)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)

    def part(self, rows: slice, input: Tensor) -> Tensor:
        """Some of the outputs, from as many of the first inputs as are given: those after them must be masked for these rows."""
        return F.linear(input, self.weight[rows, : input.shape[-1]], self.bias[rows])


class MADE(nn.Module):
    """A masked autoencoder over a vector: (..., size) -> (..., outputs, size).

    Output ``[..., k, i]`` depends on the inputs ``j < i``. The last layer starts at zero, so that what is built on it starts as
    the identity. With ``context`` features, (..., context), every output may depend on these, too.

    Raises ValueError if ``hidden`` is below ``size - 1``: with fewer units some dependencies could not be represented.
    """

    def __init__(self, size: int, outputs: int, hidden: int, layers: int = 2, context: int = 0) -> None:
        super().__init__()
        if hidden < size - 1:
            raise ValueError(
                f"a MADE over {size} inputs needs at least {size - 1} hidden units, not {hidden}; widen it (flow_hidden)"
            )
        self.size, self.outputs = size, outputs
        position = torch.arange(size)
        # A hidden unit of degree d sees the inputs up to d, and serves the outputs after d. Units are in the order of their
        # degrees, so that what is known after the first few inputs is a slice of each layer.
        degree = torch.arange(hidden) * max(1, size - 1) // hidden
        masks = [degree[:, None] >= position[None, :]]
        masks += [degree[:, None] >= degree[None, :]] * (layers - 1)
        masks += [(position[:, None, None] > degree).expand(-1, outputs, -1).flatten(0, 1)]
        self.units = [int((degree < d).sum()) for d in range(size + 1)]
        """How many units of a hidden layer have a degree below 0, 1, ..., size."""
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in masks[:-1])
        self.head = MaskedLinear(masks[-1])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.from_context = nn.Linear(context, hidden, bias=False) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for number, layer in enumerate(self.hidden):
            x = layer(x)
            if number == 0 and self.from_context is not None:
                x = x + self.from_context(context)
            x = F.relu(x)
        return self.head(x).unflatten(-1, (self.size, self.outputs)).transpose(-1, -2)

    def solve(self, step: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The x with x_i = step(i, forward(x)[..., i]) for every i, found one i after the other: (batch, size).

        ``step`` gets outputs of shape (batch or 1, outputs). Each unit is evaluated once, as soon as the inputs it sees are
        known, so that all of it costs as much as one ``forward``.
        """
        known = [self.head.weight.new_empty(1, 0) for _ in self.hidden]
        x = self.head.weight.new_empty(1, 0)
        for i in range(self.size):
            if i:
                rows, below = slice(self.units[i - 1], self.units[i]), x
                for number, layer in enumerate(self.hidden):
                    known[number] = torch.cat([known[number].expand(len(x), -1), F.relu(layer.part(rows, below))], -1)
                    below = known[number]
            value = step(i, self.head.part(slice(i * self.outputs, (i + 1) * self.outputs), known[-1]))
            x = torch.cat([x.expand(len(value), -1), value[:, None]], -1)
        return x
