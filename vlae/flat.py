"""All weights of a module in one tensor."""

import torch
from torch import nn

ALIGNMENT = 16
"""Each weight begins at a multiple of so many numbers, since kernels read aligned memory faster."""


def flatten(module: nn.Module) -> nn.Parameter:
    """Move all weights of a module into one tensor, which is returned, and their gradients into its gradient.

    What is done to every weight at each step, by optimizer, clipping and average, is one operation then instead of dozens on small
    tensors. For the module itself nothing changes: its parameters are parts of that tensor, (size,), under their old names and shapes, with
    zeros between them that stay zero. Gradients are zero at first, and have to be zeroed in place (``zero_grad(set_to_none=False)``);
    moving the module to another device or type afterwards undoes all of it.
    """
    parameters = list(module.parameters())
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    flat = nn.Parameter(parameters[0].detach().new_zeros(sum(sizes)))
    flat.grad = torch.zeros_like(flat)
    for parameter, room, gradient in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        weights = room[: parameter.numel()].view_as(parameter)
        weights.copy_(parameter.detach())
        parameter.data, parameter.grad = weights, gradient[: parameter.numel()].view_as(parameter)
    return flat
