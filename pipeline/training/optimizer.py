"""Optimizers, and the guard that has them pass over a step whose gradients are not finite.

Whether a step is taken is decided on the device, and the host does not wait to be told.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.run import Algorithm, FreeBits, OptimOptions, TrainOptions
from pipeline.errors import UserError


def make(optim: OptimOptions, weights: nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer of a model's weights, as ``vlae.flatten`` returns them.

    Its attribute ``found_inf``, 1.0 on the device, has ``step`` change nothing at all.
    """
    if optim.algorithm is Algorithm.adamax:
        return Adamax([weights], optim.learning_rate, capturable=weights.is_cuda)
    return torch.optim.Adam([weights], optim.learning_rate, fused=True)


class Adamax(torch.optim.Adamax):
    """Adamax that leaves everything as it was where ``found_inf`` is 1, as the fused Adam does.

    PyTorch has no fused form of it. So what a step changes is copied before, and put back.

    Reference: Kingma, Ba, *Adam: a method for stochastic optimization*, ICLR 2015, arXiv:1412.6980,
    section 7.1.
    """

    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [
            (p.clone(), {name: value.clone() for name, value in self.state[p].items()})
            for p in parameters
        ]
        loss = super().step(closure)
        skip = self.found_inf.bool()
        for parameter, (weights, state) in zip(parameters, before, strict=True):
            torch.where(skip, weights, parameter, out=parameter)
            for name, value in self.state[
                parameter
            ].items():  # which the first step makes, out of zeros
                torch.where(skip, state.get(name, torch.zeros_like(value)), value, out=value)
        return loss


class Guard:
    """Takes an optimizer's step only if all is finite, and counts the steps that it skips.

    A skipped step leaves the weights and the optimizer's state as they are, so that one bad batch
    costs no more than itself. After DDP's all-reduce all ranks have the same gradients, and so
    decide alike.
    """

    PATIENCE = 20
    """If so many steps in a row are skipped, it is the weights that are bad, and no later batch
    will mend them.
    """
    ADVICE = "lower optim.learning_rate or optim.clip_norm"

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def step(self, optimizer: torch.optim.Optimizer, *values: Tensor) -> Tensor:
        """``optimizer.step()`` if all ``values``, of which one has to be the gradients' norm, are
        finite. Returns whether they are.
        """
        taken = torch.stack([value.isfinite().all() for value in values]).all()
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
        skipped = (~taken).long()
        self.counts = torch.stack([self.counts[0] + skipped, (self.counts[1] + 1) * skipped])
        return taken

    def check(self, run: str, step: int) -> None:
        """Raise UserError if the last steps up to this one, as many as PATIENCE, were skipped. This
        waits for the device.
        """
        _, in_a_row = self.read()
        if in_a_row >= self.PATIENCE:
            raise UserError(
                f"run {run}: the gradients of the last {in_a_row} steps up to step {step} are not"
                f" finite; {self.ADVICE}"
            )

    def read(self) -> tuple[int, int]:
        """How many steps were skipped in the run, and how many in a row up to the last one. This
        waits for the device.
        """
        skipped, in_a_row = self.counts.tolist()
        return skipped, in_a_row

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"].to(self.counts.device)


FREE_NATS_RAMP = 0.2
"""The part of a run over which the floor under the rate falls to zero."""


def learning_rate(optim: OptimOptions, train: TrainOptions, step: int) -> float:
    """Rises over ``warmup_steps``, stays, and falls to zero over the last ``decay_fraction`` of the
    run; ``step`` counts from 0.
    """
    rise = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    fall = (
        min(1.0, (1 - step / train.num_steps) / optim.decay_fraction)
        if optim.decay_fraction
        else 1.0
    )
    return optim.learning_rate * rise * fall


def free_nats(train: TrainOptions, step: int) -> float:
    """The floor under the rate: ``free_nats`` during ``free_fraction`` of the run, then falling to
    zero over the next fifth.

    There is none with soft free bits.
    """
    if train.free_bits is FreeBits.soft:
        return 0.0
    beyond = step / train.num_steps - train.free_fraction
    return train.free_nats * min(1.0, max(0.0, 1 - beyond / FREE_NATS_RAMP))


def rate_weight(train: TrainOptions, step: int) -> float:
    """The weight of the rate in the loss: from 0 to 1 over the first ``rate_warmup_fraction`` of
    the run.
    """
    if not train.rate_warmup_fraction:
        return 1.0
    return min(1.0, step / (train.rate_warmup_fraction * train.num_steps))
