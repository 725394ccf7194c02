"""The schedules of learning rate, free nats and rate weight."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import commands
from pipeline.config.run import FreeBits
from pipeline.training import optimizer

LOADED = commands.load(
    "train", ["train.images=16000", "train.free_fraction=0.4", "train.rate_warmup_fraction=0.1"]
)
OPTIM, TRAIN = LOADED.optim, LOADED.train


def test_the_learning_rate_rises_stays_and_falls_to_nearly_zero() -> None:
    rates = [optimizer.learning_rate(OPTIM, TRAIN, step) for step in range(TRAIN.num_steps)]
    rise = OPTIM.warmup_steps
    assert rates[0] == pytest.approx(OPTIM.learning_rate / rise)
    assert rates[rise - 1 : 500] == [OPTIM.learning_rate] * (501 - rise)
    assert rates[750] == pytest.approx(OPTIM.learning_rate / 2)
    assert rates[-1] == pytest.approx(OPTIM.learning_rate * 2 / TRAIN.num_steps)
    constant = dataclasses.replace(OPTIM, decay_fraction=0.0)
    assert optimizer.learning_rate(constant, TRAIN, TRAIN.num_steps - 1) == OPTIM.learning_rate


def test_the_floor_under_the_rate_is_zero_after_its_ramp() -> None:
    floors = [optimizer.free_nats(TRAIN, step) for step in range(TRAIN.num_steps)]
    assert floors[:401] == [TRAIN.free_nats] * 401
    assert floors[500] == pytest.approx(TRAIN.free_nats / 2)
    assert max(floors[600:]) == pytest.approx(0, abs=1e-12)


def test_the_weight_of_the_rate_rises_to_one() -> None:
    assert [optimizer.rate_weight(TRAIN, step) for step in (0, 50, 100, 999)] == [0, 0.5, 1, 1]
    assert optimizer.rate_weight(dataclasses.replace(TRAIN, rate_warmup_fraction=0.0), 0) == 1


def test_soft_free_bits_have_no_floor() -> None:
    soft = dataclasses.replace(TRAIN, free_bits=FreeBits.soft)
    assert {optimizer.free_nats(soft, step) for step in range(soft.num_steps)} == {0.0}


@settings(max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(0, 500),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_schedules_stay_in_range_and_change_direction_once(
    num_steps: int, warmup_steps: int, decay: float, free: float, warmup: float
) -> None:
    optim = dataclasses.replace(OPTIM, warmup_steps=warmup_steps, decay_fraction=decay)
    train = dataclasses.replace(
        TRAIN, free_fraction=free, rate_warmup_fraction=warmup, images=num_steps * 16
    )
    assert train.num_steps == num_steps
    steps = range(num_steps)
    rates = [optimizer.learning_rate(optim, train, step) for step in steps]
    assert all(0 < rate <= optim.learning_rate for rate in rates)
    differences = np.sign(np.diff(rates).round(15))
    assert (np.diff(differences) <= 0).all()  # it rises, then stays, then falls
    floors = [optimizer.free_nats(train, step) for step in steps]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] == train.free_nats
    assert all(0 <= floor <= train.free_nats for floor in floors)
    weights = [optimizer.rate_weight(train, step) for step in steps]
    assert weights == sorted(weights)
    assert all(0 <= weight <= 1 for weight in weights)
    assert optimizer.rate_weight(train, num_steps) == 1
