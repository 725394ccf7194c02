"""An exponential moving average of the weights: what is evaluated and registered in place of the last step's."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vlae.flat import flatten

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """average <- average + (1 - decay_t) (weights - average) after each step, starting from the initial weights.

    decay_t = min(decay, (1 + t) / (10 + t)) at step t = 1, 2, ..., so that the start is soon forgotten.
    ``module`` is a copy of the model that holds the averaged weights, in evaluation mode. Buffers
    are not averaged: the model has only constant ones.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module)
        self._average = flatten(self.module).detach()
        self.module.eval().requires_grad_(False).zero_grad()

    @torch.no_grad()
    def update(self, weights: Tensor, step: int) -> None:
        """Take in the weights of the model after step number ``step`` (the first is 1), all of them as ``vlae.flatten`` returned them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self._average.lerp_(weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by the module's own names."""
        return self.module.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Take over averaged weights. Raises RuntimeError on missing or unknown names and on other shapes."""
        self.module.load_state_dict(weights)
