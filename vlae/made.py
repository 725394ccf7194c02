"""MADE: a network whose i-th output depends only on the inputs that come before i in a given order."""

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


class MADE(nn.Module):
    """Masked autoencoder for distribution estimation: (batch, size) -> (batch, outputs, size).

    Output ``[:, k, i]`` depends on the inputs ``j`` with ``j < i``, or ``j > i`` if ``reverse``. The last layer starts
    at zero, so that what is built on it starts as the identity.

    Raises ValueError if ``hidden`` is below ``size - 1``: with fewer units some dependencies could not be represented.

    Reference: Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*, ICML 2015,
    arXiv:1502.03509.
    """

    def __init__(self, size: int, outputs: int, hidden: int, layers: int = 2, *, reverse: bool = False) -> None:
        super().__init__()
        if hidden < size - 1:
            raise ValueError(
                f"a MADE over {size} inputs needs at least {size - 1} hidden units, not {hidden}; widen it (flow_hidden)"
            )
        self.size, self.outputs = size, outputs
        position = torch.arange(size)
        if reverse:
            position = position.flip(0)
        # A hidden unit of degree d sees the inputs at positions <= d, and serves the outputs at positions > d.
        degree = torch.arange(hidden) % max(1, size - 1)
        masks = [degree[:, None] >= position[None, :]]
        masks += [degree[:, None] >= degree[None, :]] * (layers - 1)
        masks += [(position[:, None] > degree[None, :]).repeat(outputs, 1)]
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in masks[:-1])
        self.head = MaskedLinear(masks[-1])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x).unflatten(-1, (self.outputs, self.size))
