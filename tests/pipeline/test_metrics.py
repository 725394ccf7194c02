"""Metrics are sums that add up, and a log that a resumed run continues."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.metrics import MetricLog, Moments, StepMeter, read_rows
from pipeline.storage import Storage


def test_moments_of_batches_are_those_of_all_values() -> None:
    values = torch.randn(101, generator=torch.Generator().manual_seed(0)) + 80
    moments = Moments()
    for part in values.split(17):
        moments.add({"elbo": part})
    moments.reduce(["elbo"], torch.device("cpu"))
    assert moments.count("elbo") == 101
    assert moments.mean("elbo") == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert moments.standard_error("elbo") == pytest.approx(np.std(values.double().numpy(), ddof=1) / math.sqrt(101), rel=1e-9)


def test_one_value_has_no_standard_error() -> None:
    moments = Moments()
    moments.add({"elbo": torch.tensor([1.0])})
    assert math.isnan(moments.standard_error("elbo"))


def test_a_resumed_log_drops_what_is_about_to_be_written_again(storage: Storage, tmp_path: Path) -> None:
    log = MetricLog(storage, 0, writes=True)
    for step in (10, 20, 30):
        log.add(step, {"train/rate": float(step)})
    log.flush()
    resumed = MetricLog(storage, 20, writes=True)
    resumed.add(25, {"train/rate": 25.5})
    resumed.close()
    assert [(row["step"], row["train/rate"]) for row in read_rows(storage)] == [(10, 10.0), (20, 20.0), (25, 25.5)]
    for key in storage.list("tensorboard/"):
        storage.download(key, tmp_path / Path(key).name)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/rate")] == [(10, 10.0), (20, 20.0), (25, 25.5)]


def test_ranks_other_than_the_first_write_nothing(storage: Storage) -> None:
    log = MetricLog(storage, 0, writes=False)
    log.add(1, {"train/rate": 1.0})
    log.close()
    assert storage.list() == []
    assert read_rows(storage) == []


def test_the_meter_averages_since_its_last_report_and_counts_waiting() -> None:
    meter = StepMeter(torch.device("cpu"))
    assert list(meter.waits([1, 2])) == [1, 2]  # type: ignore[list-item]
    meter.add(torch.tensor([80.0, 10.0]))
    meter.add(torch.tensor([70.0, 20.0]))
    first = meter.report(global_batch=16)
    assert (first["train/distortion"], first["train/rate"], first["train/code_length"]) == (75.0, 15.0, 90.0)
    assert first["train/images_per_s"] > 0
    assert 0 <= first["train/data_wait"] <= 1
    meter.add(torch.tensor([60.0, 5.0]))
    assert meter.report(global_batch=16)["train/code_length"] == 65.0
