"""With every optimizer, a step whose gradients are not finite changes nothing but its count."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vlae
from pipeline import commands
from pipeline.config.run import Algorithm
from pipeline.errors import UserError
from pipeline.training import optimizer
from pipeline.training.optimizer import Guard

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


class Training:
    """A small network trained on noise, drawn for each step."""

    def __init__(self, algorithm: Algorithm) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.weights = vlae.flatten(self.model)
        self.hidden = [self.model[0].weight]
        self.optimizer = optimizer.make(
            commands.load("train", [f"optim={algorithm.value}"]).optim, self.weights, self.hidden
        )
        self.guard = Guard(CPU)

    def gradients(self, number: int, bad: float | None = None) -> Tensor:
        """Compute the gradients of step ``number``; returns their norm.

        ``bad`` replaces one of their values.
        """
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad(set_to_none=False)
        self.model(x).square().sum().backward()
        if bad is not None:
            gradient = self.model[0].weight.grad
            assert gradient is not None
            gradient[2, 1] = bad
        return torch.nn.utils.clip_grad_norm_(self.weights, 1.0)

    def step(self, number: int, bad: float | None = None) -> bool:
        """Whether step ``number`` was taken."""
        return bool(self.guard.step(self.optimizer, self.gradients(number, bad)))

    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [value for each in state.values() for _, value in sorted(each.items())]
        return copy.deepcopy([*self.model.state_dict().values(), *moments])


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_changes_neither_weights_nor_optimizer(
    algorithm: Algorithm, bad: float
) -> None:
    guarded, undisturbed = Training(algorithm), Training(algorithm)
    for number in range(6):
        if number in (0, 3, 4):  # the first, when the optimizer has no state yet, and others
            assert not guarded.step(100 + number, bad)
        assert guarded.step(number)
        assert undisturbed.step(number)
        for one, other in zip(guarded.tensors(), undisturbed.tensors(), strict=True):
            assert torch.equal(one, other)
    assert guarded.guard.read() == (3, 0)
    assert undisturbed.guard.read() == (0, 0)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [(Algorithm.adam, torch.optim.Adam), (Algorithm.adamax, torch.optim.Adamax)],
)
def test_steps_equal_those_of_pytorchs_own_optimizer(
    algorithm: Algorithm, kind: type[torch.optim.Adam | torch.optim.Adamax]
) -> None:
    training, plain = Training(algorithm), Training(algorithm)
    learning_rate = plain.optimizer.param_groups[0]["lr"]
    plain.optimizer = kind(plain.model.parameters(), learning_rate)
    for number in range(20):
        training.step(number)
        plain.gradients(number)
        plain.optimizer.step()
    state = training.optimizer.state[training.weights]
    for weights, expected in zip(
        training.model.parameters(), plain.model.parameters(), strict=True
    ):
        torch.testing.assert_close(weights, expected)
        begin, moments = weights.storage_offset(), plain.optimizer.state[expected]
        assert moments.keys() == state.keys()
        for name, moment in moments.items():
            own = (
                state[name][begin : begin + weights.numel()].view_as(weights)
                if moment.ndim
                else state[name]
            )
            torch.testing.assert_close(own, moment)


def test_steps_of_muon_equal_those_of_pytorchs_own() -> None:
    training, plain = Training(Algorithm.muon), Training(Algorithm.muon)
    learning_rate = plain.optimizer.param_groups[0]["lr"]
    others = [weight for weight in plain.model.parameters() if weight is not plain.model[0].weight]
    adam = torch.optim.Adam(others, learning_rate)
    muon = torch.optim.Muon(
        plain.hidden,
        learning_rate,
        weight_decay=0,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    before = plain.model[0].weight.detach().clone()
    for number in range(20):
        training.step(number)
        plain.gradients(number)
        adam.step()
        muon.step()
    for weight, expected in zip(training.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-4)  # PyTorch's is in bfloat16
    assert (plain.model[0].weight - before).abs().max() > 2e-3


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), log_scale=st.integers(-3, 6), seed=seeds
)
def test_an_orthogonalized_matrix_keeps_only_the_directions(
    rows: int, columns: int, log_scale: int, seed: int
) -> None:
    generator, rank = torch.Generator().manual_seed(seed), min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))
    sizes = torch.rand(rank, generator=generator, dtype=torch.float64) + 0.05
    found = optimizer.orthogonalized(10.0**log_scale * u * sizes @ v.T)
    inside = u.T @ found @ v
    torch.testing.assert_close(u @ inside @ v.T, found)
    torch.testing.assert_close(inside, inside.diagonal().diag())
    assert inside.diagonal().min() > 0.65
    assert inside.diagonal().max() < 1.25


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not optimizer.orthogonalized(torch.zeros(3, 5)).any()


def test_any_value_that_is_not_finite_skips_the_step() -> None:
    training = Training(Algorithm.adam)
    training.step(0)
    before = training.tensors()
    assert not training.guard.step(
        training.optimizer, torch.tensor(1.0), torch.tensor([80.0, math.nan])
    )
    assert all(
        torch.equal(one, other) for one, other in zip(training.tensors(), before, strict=True)
    )
    assert training.guard.step(training.optimizer, torch.tensor(1.0), torch.tensor([80.0, 10.0]))


def test_too_many_skipped_steps_in_a_row_are_an_error() -> None:
    training = Training(Algorithm.adam)
    for number in range(3 * Guard.MAX_SKIPPED):  # every other step is skipped, which is no error
        training.step(number, math.nan if number % 2 else None)
        training.guard.check("mine", number)
    training.step(0)
    for number in range(Guard.MAX_SKIPPED - 1):
        training.step(number, math.nan)
    training.guard.check("mine", 7)
    training.step(0, math.nan)
    with pytest.raises(
        UserError,
        match=(
            r"^run mine: the gradients of the last 20 steps up to step 7 are not finite; lower"
            r" optim\."
        ),
    ):
        training.guard.check("mine", 7)
    assert training.guard.read() == (
        3 * Guard.MAX_SKIPPED // 2 + Guard.MAX_SKIPPED,
        Guard.MAX_SKIPPED,
    )


def test_counts_are_restored() -> None:
    training, resumed = Training(Algorithm.adam), Guard(CPU)
    training.step(0, math.nan)
    training.step(1)
    training.step(2, math.nan)
    resumed.load_state_dict(training.guard.state_dict())
    assert resumed.read() == (2, 1)


@pytest.mark.parametrize("algorithm", [Algorithm.adam, Algorithm.muon])
def test_a_step_reads_no_value_from_the_device(algorithm: Algorithm) -> None:
    optim = commands.load("train", [f"optim={algorithm.value}"]).optim
    with FakeTensorMode():  # tensors without values: asking for one is an error
        layer, guard = nn.Linear(3, 2), Guard(CPU)
        weights = vlae.flatten(layer)
        made = optimizer.make(optim, weights, [layer.weight])
        for _ in range(2):
            taken = guard.step(made, torch.nn.utils.clip_grad_norm_(weights, 1.0))
        with pytest.raises(DataDependentOutputException):
            bool(taken)
