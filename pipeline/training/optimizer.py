"""Optimizers, their schedule, and the guard that skips steps whose gradients are not finite.

The device decides whether a step is taken; the host does not wait for it.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.config.run import (
    FREE_NATS_RAMP,
    Algorithm,
    FreeBits,
    OptimOptions,
    TrainOptions,
)
from pipeline.errors import UserError


def make(optim: OptimOptions, weights: nn.Parameter, hidden: Sequence[nn.Parameter]) -> Optimizer:
    """The optimizer of a model's weights, as ``vlae.flatten`` returns them.

    ``hidden`` are those of hidden layers, which are parts of ``weights`` (``VLAE.hidden_weights``).
    If its attribute ``found_inf``, a tensor on the device, is 1.0, ``step`` changes nothing.
    """
    if optim.algorithm is Algorithm.muon:
        return Muon(weights, hidden, optim.learning_rate)
    if optim.algorithm is Algorithm.adamax:
        return Adamax([weights], optim.learning_rate, capturable=weights.is_cuda)
    return Adam([weights], optim.learning_rate, fused=True)


class Eager(Optimizer):
    """PyTorch's optimizers without the wrappers that load its compiler, which nothing here uses.

    Loading it takes a process two seconds of processor time.
    """

    found_inf: Tensor

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class Adam(Eager, torch.optim.Adam):
    """Adam, see ``Eager``."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class Muon(Adam):
    """Adam, except that the weights of hidden layers step along their orthogonalized gradient.

    The step of a matrix has all singular values nearly equal, so that directions in which the
    gradient is small are learned as fast as the others. The gradient is Nesterov's: Adam's first
    moment with the last gradient added once more. Steps are scaled to a root mean square of 0.2,
    which is about that of Adam's, so that learning rates carry over. Convolutions are matrices with
    a row for each output channel.

    ``hidden`` are parts of ``weights``, as ``vlae.flatten`` makes them. Adam's second moment of
    them is not used.

    References: Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024,
    https://kellerjordan.github.io/posts/muon; the scale is that of Liu et al., *Muon is Scalable
    for LLM Training*, 2025, arXiv:2502.16982.
    """

    RMS = 0.2

    def __init__(
        self, weights: nn.Parameter, hidden: Sequence[nn.Parameter], learning_rate: float
    ) -> None:
        super().__init__([weights], learning_rate, fused=True)
        self.hidden = hidden

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [weight.clone() for weight in self.hidden]
        loss = super().step(closure)
        (group,) = self.param_groups
        (weights,) = group["params"]
        moments = self.state[weights]["exp_avg"]
        skip = self.found_inf.bool()
        for weight, old in zip(self.hidden, before, strict=True):
            assert weight.grad is not None
            begin = weight.storage_offset()
            moment = moments[begin : begin + weight.numel()].view_as(weight)
            direction = orthogonalized(weight.grad.lerp(moment, group["betas"][0]).flatten(1))
            length = group["lr"] * self.RMS * math.sqrt(max(direction.shape))
            torch.where(skip, old, old - length * direction.view_as(weight), out=weight)
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, (rows, columns): its singular values become 0.7 to 1.2.

    By five Newton-Schulz iterations with the coefficients of Jordan et al. (see ``Muon``), which
    prefer speed to values of exactly 1. Values below about a thousandth of the matrix's norm stay
    smaller.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if wide is not matrix else x


class Adamax(Eager, torch.optim.Adamax):
    """Adamax that changes nothing if ``found_inf`` is 1, as the fused Adam does.

    PyTorch has no fused Adamax. So each step copies the weights and the state, and restores them if
    it is skipped.

    Reference: Kingma, Ba, *Adam: a method for stochastic optimization*, ICLR 2015, arXiv:1412.6980,
    section 7.1.
    """

    _update = inspect.unwrap(torch.optim.Adamax.step)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [
            (p.clone(), {name: value.clone() for name, value in self.state[p].items()})
            for p in parameters
        ]
        loss = self._update(closure)
        skip = self.found_inf.bool()
        for parameter, (weights, state) in zip(parameters, before, strict=True):
            torch.where(skip, weights, parameter, out=parameter)
            # Before the first step the state was empty, which means zeros.
            for name, value in self.state[parameter].items():
                torch.where(skip, state.get(name, torch.zeros_like(value)), value, out=value)
        return loss


class Guard:
    """Takes an optimizer's step only if its gradients are finite, and counts the skipped steps.

    A skipped step leaves the weights and the optimizer's state unchanged, so that a bad batch does
    no lasting harm. After DDP's all-reduce all ranks have the same gradients, and so decide alike.
    """

    MAX_SKIPPED = 20
    """After this many skipped steps in a row the weights themselves are taken to be bad."""
    ADVICE = "lower optim.learning_rate or optim.clip_norm"

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def step(self, optimizer: Optimizer, *values: Tensor) -> Tensor:
        """Call ``optimizer.step()`` if all ``values`` are finite; returns whether they are.

        One of the values must be the norm of the gradients.
        """
        taken = torch.stack([value.isfinite().all() for value in values]).all()
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
        skipped = (~taken).long()
        self.counts = torch.stack([self.counts[0] + skipped, (self.counts[1] + 1) * skipped])
        return taken

    def check(self, run: str, step: int) -> None:
        """Raise UserError if the last MAX_SKIPPED steps were skipped. This waits for the device."""
        _, in_a_row = self.read()
        if in_a_row >= self.MAX_SKIPPED:
            raise UserError(
                f"run {run}: the gradients of the last {in_a_row} steps up to step {step} are not"
                f" finite; {self.ADVICE}"
            )

    def read(self) -> tuple[int, int]:
        """The numbers of skipped steps: in the whole run, and in a row up to the last step.

        This waits for the device.
        """
        skipped, in_a_row = self.counts.tolist()
        return skipped, in_a_row

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"].to(self.counts.device)


def learning_rate(optim: OptimOptions, train: TrainOptions, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises over ``warmup_steps``, stays constant, and falls to zero over the last
    ``decay_fraction`` of the run.
    """
    rise = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    fall = (
        min(1.0, (1 - step / train.num_steps) / optim.decay_fraction)
        if optim.decay_fraction
        else 1.0
    )
    return optim.learning_rate * rise * fall


def free_nats(train: TrainOptions, step: int) -> float:
    """The floor under the rate at a step, in nats per image.

    It is ``free_nats`` during the first ``free_fraction`` of the run, and then falls to zero over
    FREE_NATS_RAMP of the run. With soft free bits there is no floor.
    """
    if train.free_bits is FreeBits.soft:
        return 0.0
    beyond = step / train.num_steps - train.free_fraction
    return train.free_nats * min(1.0, max(0.0, 1 - beyond / FREE_NATS_RAMP))


def rate_weight(train: TrainOptions, step: int) -> float:
    """The weight of the rate in the loss at a step.

    It rises from 0 to 1 over the first ``rate_warmup_fraction`` of the run.
    """
    if not train.rate_warmup_fraction:
        return 1.0
    return min(1.0, step / (train.rate_warmup_fraction * train.num_steps))
