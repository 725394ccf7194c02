"""Sums and counts that are divided once: the same figures however the images are dealt to batches and ranks."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from pipeline import schedule
from pipeline.config import Optim, Train, load, to_dict
from pipeline.loader import Batch
from pipeline.metrics import MetricLog, Moments, StepMeter, mean_over_ranks, read_rows
from pipeline.storage import Storage

CPU = torch.device("cpu")
NATS = st.floats(-1e4, 1e4, width=32)


# --- moments -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(NATS, max_size=6), min_size=1, max_size=6))
def test_moments_are_numpys_whatever_the_batches(batches: list[list[float]]) -> None:
    moments = Moments()
    for batch in batches:
        moments.add({"rate": torch.tensor(batch)})
    values = np.array([value for batch in batches for value in batch], np.float64)
    assert moments.count("rate") == len(values)
    if len(values):
        assert moments.mean("rate") == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
    if len(values) > 1:
        expected = values.std(ddof=1) / math.sqrt(len(values))
        # The variance is a difference of two numbers of the size of the mean's square.
        assert moments.standard_error("rate") == pytest.approx(expected, rel=1e-6, abs=1e-6 * (1 + abs(values).max()))


def test_float32_values_are_summed_in_double_precision() -> None:
    moments = Moments()
    for _ in range(100):
        moments.add({"elbo": torch.full((1000,), -90.1)})
    assert moments.mean("elbo") == pytest.approx(float(np.float32(-90.1)), rel=1e-13)
    assert moments.standard_error("elbo") == pytest.approx(0, abs=1e-6)


def test_a_gradient_is_not_kept_alive() -> None:
    moments = Moments()
    moments.add({"elbo": torch.ones(3, requires_grad=True) * 2})
    assert not moments.sums["elbo"].requires_grad


SHARES = ([1.0, 5.0, 9.5], [])  # the second rank saw no image


def merge(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES))
    moments = Moments()
    if SHARES[rank]:
        moments.add({"rate": torch.tensor(SHARES[rank]), "elbo": -2 * torch.tensor(SHARES[rank])})
    moments.reduce(["rate", "elbo"], CPU)
    figures = [[moments.count(name), moments.mean(name), moments.standard_error(name)] for name in ("rate", "elbo")]
    mean = mean_over_ranks(torch.tensor([1.0 + rank, 4.0 * rank], requires_grad=True))
    assert not mean.requires_grad
    Path(folder, f"{rank}.json").write_text(json.dumps([figures, mean.tolist()]))
    dist.destroy_process_group()


def test_every_rank_learns_the_figures_of_all_even_one_that_saw_no_image(tmp_path: Path) -> None:
    spawn(merge, (str(tmp_path),), nprocs=len(SHARES))
    values = np.array([value for share in SHARES for value in share])
    error = values.std(ddof=1) / math.sqrt(len(values))
    expected = [[3, values.mean(), error], [3, -2 * values.mean(), 2 * error]]
    for rank in range(len(SHARES)):
        figures, mean = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        np.testing.assert_allclose(figures, expected, rtol=1e-12)
        assert mean == [1.5, 2.0]


def test_one_rank_is_its_own_mean() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(mean_over_ranks(values), values.detach())


# --- the meter and the log ---------------------------------------------------------------------------------------------


def test_the_meter_tells_waiting_from_working() -> None:
    def slow() -> Iterator[Batch]:
        batch = Batch(0, torch.empty(0), torch.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
        for _ in range(3):
            time.sleep(0.05)
            yield batch

    meter = StepMeter(CPU)
    for _ in meter.waits(slow()):
        time.sleep(0.05)
        meter.add(torch.tensor([70.0, 12.0]))
    report = meter.report(global_batch=10)
    assert 0.1 < report["train/data_wait"] < 0.9
    assert 0 < report["train/images_per_s"] < 30 / 0.3
    meter.add(torch.tensor([1.0, 2.0]))
    assert meter.report(global_batch=10)["train/data_wait"] == 0


def test_a_log_that_is_resumed_twice_has_every_step_once(storage: Storage) -> None:
    for start, stop in ((0, 7), (3, 9), (9, 12)):
        log = MetricLog(storage, start, writes=True)
        for step in range(start + 1, stop + 1):
            log.add(step, {"x": float(start)})
        log.flush()
        before = storage.read(MetricLog.KEY)
        log.flush()
        assert storage.read(MetricLog.KEY) == before
    rows = read_rows(storage)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["x"] for row in rows] == [0.0] * 3 + [3.0] * 6 + [9.0] * 3


# --- schedules ---------------------------------------------------------------------------------------------------------

PLAIN = to_dict(load("train", []))


@settings(max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(0, 500),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_schedules_stay_in_their_ranges_and_turn_once(
    num_steps: int, warmup_steps: int, decay: float, free: float, warmup: float
) -> None:
    optim = Optim(**PLAIN["optim"] | {"warmup_steps": warmup_steps, "decay_fraction": decay})
    fractions = {"free_fraction": free, "rate_warmup_fraction": warmup, "images": num_steps * 16}
    train = Train(**PLAIN["train"] | fractions)
    assert train.num_steps == num_steps
    steps = range(num_steps)
    rates = [schedule.learning_rate(optim, train, step) for step in steps]
    assert all(0 < rate <= optim.learning_rate for rate in rates)
    differences = np.sign(np.diff(rates).round(15))
    assert (np.diff(differences) <= 0).all()  # it rises, then stays, then falls
    floors = [schedule.free_nats(train, step) for step in steps]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] == train.free_nats
    assert all(0 <= floor <= train.free_nats for floor in floors)
    weights = [schedule.rate_weight(train, step) for step in steps]
    assert weights == sorted(weights)
    assert all(0 <= weight <= 1 for weight in weights)
    assert schedule.rate_weight(train, num_steps) == 1
