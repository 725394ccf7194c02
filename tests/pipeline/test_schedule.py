"""What changes in the course of a run."""

import dataclasses

import pytest

from pipeline import config, schedule

LOADED = config.load("train", ["train.images=16000", "train.free_fraction=0.4", "train.rate_warmup_fraction=0.1"])
OPTIM, TRAIN = LOADED.optim, LOADED.train


def test_the_learning_rate_rises_stays_and_falls_to_nearly_zero() -> None:
    rates = [schedule.learning_rate(OPTIM, TRAIN, step) for step in range(TRAIN.num_steps)]
    rise = OPTIM.warmup_steps
    assert rates[0] == pytest.approx(OPTIM.learning_rate / rise)
    assert rates[rise - 1 : 500] == [OPTIM.learning_rate] * (501 - rise)
    assert rates[750] == pytest.approx(OPTIM.learning_rate / 2)
    assert rates[-1] == pytest.approx(OPTIM.learning_rate * 2 / TRAIN.num_steps)
    constant = dataclasses.replace(OPTIM, decay_fraction=0.0)
    assert schedule.learning_rate(constant, TRAIN, TRAIN.num_steps - 1) == OPTIM.learning_rate


def test_the_floor_under_the_rate_is_gone_after_its_ramp() -> None:
    floors = [schedule.free_nats(TRAIN, step) for step in range(TRAIN.num_steps)]
    assert floors[:401] == [TRAIN.free_nats] * 401
    assert floors[500] == pytest.approx(TRAIN.free_nats / 2)
    assert max(floors[600:]) == pytest.approx(0, abs=1e-12)


def test_the_weight_of_the_rate_rises_to_one() -> None:
    assert [schedule.rate_weight(TRAIN, step) for step in (0, 50, 100, 999)] == [0, 0.5, 1, 1]
    assert schedule.rate_weight(dataclasses.replace(TRAIN, rate_warmup_fraction=0.0), 0) == 1
