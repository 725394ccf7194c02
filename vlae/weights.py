"""A model's weights as one tensor, and their exponential moving average."""

import copy
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

ALIGNMENT = 16
"""Each weight starts at a multiple of this many elements: kernels read aligned memory faster."""


def flatten(module: nn.Module) -> nn.Parameter:
    """Move all weights of a module into one tensor, (size,), and their gradients into its gradient.

    Returns that tensor. Optimizer, clipping and average then take one operation a step instead of
    dozens on small tensors. The module does not change: its parameters are views of the tensor,
    under their old names and shapes. The padding between them is zero and stays zero.

    Gradients start at zero and must be zeroed in place (``zero_grad(set_to_none=False)``). Without
    ``set_to_none=False``, or after the module has moved to another device or dtype, an optimizer of
    the tensor would train nothing. So the next backward pass raises RuntimeError.
    """
    parameters = list(module.parameters())
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    flat = nn.Parameter(parameters[0].detach().new_zeros(sum(sizes)))
    flat.grad = torch.zeros_like(flat)
    slots = zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True)
    for parameter, slot, gradient in slots:
        weights = slot[: parameter.numel()].view_as(parameter)
        weights.copy_(parameter.detach())
        parameter.data = weights
        parameter.grad = gradient[: parameter.numel()].view_as(parameter)
        if parameter.requires_grad:
            check = _stays_flat(weights, parameter.grad, flat, flat.grad)
            parameter.register_post_accumulate_grad_hook(check)
    return flat


def _stays_flat(
    weights: Tensor, gradient: Tensor, flat: nn.Parameter, flat_gradient: Tensor
) -> Callable[[Tensor], None]:
    """A hook of a parameter that raises RuntimeError if it no longer belongs to ``flat``.

    ``weights`` and ``gradient`` are the parameter's parts of ``flat`` and of ``flat_gradient``. The
    hook does not keep ``flat`` alive; without it there is nothing to check.
    """
    place, tensor = weights.data_ptr(), weakref.ref(flat)

    def check(parameter: Tensor) -> None:
        whole = tensor()
        if whole is None:
            return
        if whole.grad is not flat_gradient or parameter.grad is not gradient:
            raise RuntimeError(
                "the gradients of flattened weights were replaced, so the tensor that vlae.flatten "
                "returned would not be trained; use zero_grad(set_to_none=False)"
            )
        if parameter.data_ptr() != place:
            raise RuntimeError(
                "flattened weights were moved, so the tensor that vlae.flatten returned would not "
                "be trained; call vlae.flatten after module.to(...)"
            )

    return check


class EMA(Generic[Module]):
    """The moving average of the weights, evaluated and registered in place of the last weights.

        average <- average + (1 - decay_t) (weights - average)   after each step
        decay_t = min(decay, (1 + t) / (10 + t))                 at step t = 1, 2, ...

    The average starts from the initial weights; the smaller decay of the first steps lets it
    forget them soon. ``module`` is a copy of the model with the averaged weights, in evaluation
    mode. Buffers are not averaged: those of the model are constant.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module)
        self.module.eval().requires_grad_(False)
        self._average = flatten(self.module).detach()
        self.module.zero_grad()

    @torch.no_grad()
    def update(self, weights: Tensor, step: int) -> None:
        """Add the weights after step number ``step`` to the average.

        ``weights`` is the tensor that ``flatten`` returned for the model; the first step is 1.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        self._average.lerp_(weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the module's names."""
        return self.module.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Restore averaged weights.

        Raises RuntimeError on missing or unknown names, and on other shapes.
        """
        self.module.load_state_dict(weights)
