"""Moments are the same for any batches and ranks, and a resumed run continues its log."""

import contextlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pipeline.data.batch import Batch
from pipeline.evaluation.moments import Moments, sum_over_ranks
from pipeline.runs import METRICS, MetricReader, Run, metrics_key
from pipeline.storage.base import Storage, Unavailable
from pipeline.storage.folder import FolderStorage
from pipeline.training import metrics
from pipeline.training.metrics import MetricLog, StepMeter

CPU = torch.device("cpu")
NATS = st.floats(-1e4, 1e4, width=32)


# --- moments --------------------------------------------------------------------------------------


@given(st.lists(st.lists(NATS, max_size=6), min_size=1, max_size=6))
def test_moments_equal_those_of_numpy_for_any_batches(batches: list[list[float]]) -> None:
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
        assert moments.standard_error("rate") == pytest.approx(
            expected, rel=1e-6, abs=1e-6 * (1 + abs(values).max())
        )


def test_float32_values_are_summed_in_double_precision() -> None:
    moments = Moments()
    for _ in range(100):
        moments.add({"elbo": torch.full((1000,), -90.1)})
    assert moments.mean("elbo") == pytest.approx(float(np.float32(-90.1)), rel=1e-13)
    assert moments.standard_error("elbo") == pytest.approx(0, abs=1e-6)


def test_one_value_has_no_standard_error() -> None:
    moments = Moments()
    moments.add({"elbo": torch.tensor([1.0])})
    assert moments.standard_error("elbo") is None
    moments.add({"rate": torch.ones(1, 3)})
    assert moments.standard_errors("rate") == [None] * 3


def test_moments_of_latents_equal_those_of_each_latent_alone() -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    vectors, numbers = Moments(), Moments()
    for part in values.split(11):
        vectors.add({"rate": part})
        numbers.add({str(latent): part[:, latent] for latent in range(4)})
    assert vectors.means("rate").tolist() == pytest.approx(
        [numbers.mean(str(latent)) for latent in range(4)]
    )
    assert vectors.standard_errors("rate") == pytest.approx(
        [numbers.standard_error(str(latent)) for latent in range(4)]
    )
    assert vectors.variances("rate").tolist() == pytest.approx(
        values.double().var(0, correction=0).tolist()
    )


def test_a_gradient_is_not_kept_alive() -> None:
    moments = Moments()
    moments.add({"elbo": torch.ones(3, requires_grad=True) * 2})
    assert not moments.sums["elbo"].requires_grad


SHARES = ([1.0, 5.0, 9.5], [])
"""The values of each rank; the second one saw no image."""


def merge(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES)
    )
    moments = Moments()
    if SHARES[rank]:
        moments.add({"rate": torch.tensor(SHARES[rank]), "elbo": -2 * torch.tensor(SHARES[rank])})
    moments.reduce(["rate", "elbo"], CPU)
    figures = [
        [moments.count(name), moments.mean(name), moments.standard_error(name)]
        for name in ("rate", "elbo")
    ]
    total = sum_over_ranks(torch.tensor([1.0 + rank, 4.0 * rank]))
    meter = StepMeter(CPU)
    meter.add(
        nats(10.0 + rank), nats(5.0), TAKEN
    )  # this rank's part of the distortion, and the rate of all
    report = meter.report(global_batch=4)
    measured = [report[f"train/{name}"] for name in ("distortion", "rate", "code_length")]
    Path(folder, f"{rank}.json").write_text(json.dumps([figures, total.tolist(), measured]))
    dist.destroy_process_group()


def test_all_ranks_get_the_same_moments_even_one_without_images(tmp_path: Path) -> None:
    spawn(merge, (str(tmp_path),), nprocs=len(SHARES))
    values = np.array([value for share in SHARES for value in share])
    error = values.std(ddof=1) / math.sqrt(len(values))
    expected = [[3, values.mean(), error], [3, -2 * values.mean(), 2 * error]]
    for rank in range(len(SHARES)):
        figures, total, measured = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        np.testing.assert_allclose(figures, expected, rtol=1e-12)
        assert total == [3.0, 4.0]
        assert measured == [21.0, 5.0, 26.0]


def test_the_sum_over_one_rank_is_its_own_value() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(sum_over_ranks(values.clone()), values)


# --- the meter ------------------------------------------------------------------------------------

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def nats(value: float) -> Tensor:
    return torch.tensor(value)


def test_the_meter_averages_the_steps_since_its_last_report() -> None:
    meter = StepMeter(CPU)
    meter.add(nats(80.0), nats(10.0), TAKEN)
    meter.add(nats(70.0), nats(20.0), TAKEN)
    first = meter.report(global_batch=16)
    assert (first["train/distortion"], first["train/rate"], first["train/code_length"]) == (
        75.0,
        15.0,
        90.0,
    )
    assert first["train/images_per_s"] > 0
    meter.add(nats(60.0), nats(5.0), TAKEN)
    assert meter.report(global_batch=16)["train/code_length"] == 65.0


def test_the_meter_leaves_out_skipped_steps() -> None:
    meter = StepMeter(CPU)
    meter.add(nats(80.0), nats(10.0), TAKEN)
    meter.add(nats(math.nan), nats(math.inf), SKIPPED)
    meter.add(nats(70.0), nats(12.0), TAKEN)
    first = meter.report(global_batch=16)
    assert (first["train/distortion"], first["train/rate"]) == (75.0, 11.0)
    meter.add(nats(math.nan), nats(1.0), SKIPPED)
    assert meter.report(global_batch=16).keys() == {
        "train/images_per_s",
        "train/step_ms",
        "train/data_wait",
    }
    meter.add(nats(60.0), nats(5.0), TAKEN)
    assert meter.report(global_batch=16)["train/code_length"] == 65.0


def test_the_meter_separates_waiting_from_working() -> None:
    def slow() -> Iterator[Batch]:
        batch = Batch(
            0, torch.empty(0), torch.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
        )
        for _ in range(3):
            time.sleep(0.05)
            yield batch

    meter, batches = StepMeter(CPU), 0
    for _ in meter.waits(slow()):
        time.sleep(0.05)
        meter.add(nats(70.0), nats(12.0), TAKEN)
        batches += 1
    assert batches == 3
    report = meter.report(global_batch=10)
    assert 0.1 < report["train/data_wait"] < 0.9
    assert 0 < report["train/images_per_s"] < 30 / 0.3
    meter.add(nats(1.0), nats(2.0), TAKEN)
    assert meter.report(global_batch=10)["train/data_wait"] == 0


# --- the log --------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands in for the death of the process."""


def test_a_resumed_log_drops_the_rows_that_are_about_to_be_logged_again(
    storage: Storage, tmp_path: Path
) -> None:
    with contextlib.suppress(Killed), MetricLog(storage, 0, writes=True) as log:
        for step in (10, 20, 30):
            log.add(step, {"train/rate": float(step)})
        log.flush()
        raise Killed
    with MetricLog(storage, 20, writes=True) as resumed:
        resumed.add(
            25, {"train/rate": 25.5, "valid/elbo_nats_se": None}
        )  # what is none is left out
        assert (resumed.lowest("train/rate"), resumed.lowest("valid/rate")) == (10.0, math.inf)
        resumed.flush()
    assert Run(storage).rows() == [
        {"step": step, "train/rate": value} for step, value in [(10, 10.0), (20, 20.0), (25, 25.5)]
    ]
    # TensorBoard reads files in the order of their names, which tell seconds apart, but not two
    # logs of one process within one.
    for number, key in enumerate(
        sorted(storage.list("tensorboard/"), key=lambda key: int(key.rpartition(".")[2]))
    ):
        storage.download(key, tmp_path / f"{number}-{Path(key).name}")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/rate")] == [
        (10, 10.0),
        (20, 20.0),
        (25, 25.5),
    ]


def test_a_log_resumed_twice_has_every_step_once(storage: Storage) -> None:
    for start, stop in ((0, 7), (3, 9), (9, 12)):
        with MetricLog(storage, start, writes=True) as log:
            for step in range(start + 1, stop + 1):
                log.add(step, {"x": float(start)})
            assert len(Run(storage).rows()) in (0, 7, 9), (
                "nothing is in storage before it is flushed"
            )
            log.flush()
            before = {key: storage.read(key) for key in storage.list(METRICS)}
            log.flush()
            assert {key: storage.read(key) for key in storage.list(METRICS)} == before
    rows = Run(storage).rows()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["x"] for row in rows] == [0.0] * 3 + [3.0] * 6 + [9.0] * 3


def test_a_log_leaves_no_thread_or_folder_behind(storage: Storage) -> None:
    threads = set(threading.enumerate())
    with MetricLog(storage, 0, writes=True) as finished:
        finished.add(1, {"x": 1.0})
        finished.flush()
    with contextlib.suppress(Killed), MetricLog(storage, 1, writes=True) as cut_off:
        cut_off.add(2, {"x": 2.0})
        raise Killed
    assert set(threading.enumerate()) <= threads
    assert not Path(finished.folder.name).exists()
    assert not Path(cut_off.folder.name).exists()
    assert [row["step"] for row in Run(storage).rows()] == [1], (
        "what a failed run had not flushed may be what failed"
    )


def test_only_rank_0_writes(storage: Storage) -> None:
    with MetricLog(storage, 0, writes=False) as log:
        log.add(1, {"train/rate": 1.0})
        log.flush()
    assert storage.list() == []
    assert Run(storage).rows() == []


def test_what_a_log_writes_and_reads_grows_with_its_length_and_not_faster(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "OBJECT_BYTES", 1000)
    kind, moved = type(storage), Counter[str]()
    write, upload, stream = kind.write, kind.upload, kind.stream

    def counted_write(self: Storage, key: str, data: bytes) -> None:
        moved["written"] += len(data)
        assert len(data) < 1200, "one object and the row that fills it"
        write(self, key, data)

    def counted_upload(self: Storage, key: str, path: Path) -> None:
        moved["uploaded"] += path.stat().st_size
        upload(self, key, path)

    def counted_stream(self: Storage, *arguments: Any) -> Iterator[bytes]:
        for piece in stream(self, *arguments):
            moved["read"] += len(piece)
            yield piece

    monkeypatch.setattr(kind, "write", counted_write)
    monkeypatch.setattr(kind, "upload", counted_upload)
    monkeypatch.setattr(kind, "stream", counted_stream)
    after, follower, followed = dict[int, Counter[str]](), MetricReader(storage), list[Any]()
    with MetricLog(storage, 0, writes=True) as log:
        for step in range(1, 121):
            log.add(step, {f"train/quantity_{number}": step + number / 7 for number in range(4)})
            log.flush()
            followed += follower.rows()
            if step in (60, 120):
                after[step] = Counter(moved)
    assert [row["step"] for row in followed] == list(range(1, 121))
    for name, moved_in_all in after[120].items():
        # If every flush wrote all rows, twice the length would be four times the bytes.
        assert moved_in_all < 2.5 * after[60][name], name
    size = sum(storage.sizes(METRICS).values())
    moved.clear()
    assert Run(storage).rows() == followed
    assert moved["read"] == size, "a reader that begins reads each object once"


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_log_that_is_killed_and_resumed_anywhere_has_the_rows_of_the_last_attempts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    storage = FolderStorage(tmp_path_factory.mktemp("run"))
    expected, saved, number = list[dict[str, float]](), list[dict[str, float]](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "OBJECT_BYTES", data.draw(st.sampled_from([1, 60, 150, 10**6])))
        follower, followed = MetricReader(storage), list[dict[str, float]]()
        for _ in range(data.draw(st.integers(1, 4))):
            step = data.draw(st.integers(0, int(saved[-1]["step"]) if saved else 0))
            expected = [row for row in saved if row["step"] <= step]
            with MetricLog(storage, step, writes=True) as log:
                lowest = min((row["x"] for row in expected), default=math.inf)
                assert log.lowest("x") == lowest
                for gap in data.draw(st.lists(st.integers(1, 9), max_size=12)):
                    step, number = step + gap, number + 1
                    log.add(step, {"x": float(-number)})
                    expected.append({"step": step, "x": float(-number)})
                    if data.draw(st.booleans()):
                        log.flush()
                        saved = list(expected)
                        followed += follower.rows()
            assert Run(storage).rows() == saved
        followed += follower.rows()
    assert len({row["x"] for row in followed}) == len(followed), "nothing is read twice"
    assert all(row in followed for row in saved)


def test_a_reader_that_fails_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FolderStorage(tmp_path)
    monkeypatch.setattr(metrics, "OBJECT_BYTES", 1)
    with MetricLog(storage, 0, writes=True) as log:
        for step in (1, 2, 3):
            log.add(step, {"x": 1.0})
        log.flush()
    reader, read = MetricReader(storage), FolderStorage.read

    def failing(self: FolderStorage, key: str) -> bytes:
        if key == metrics_key(1):
            raise Unavailable("the storage is away")
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "read", failing)
        with pytest.raises(Unavailable):
            reader.rows()
    assert [row["step"] for row in reader.rows()] == [1, 2, 3]


def test_tensorboard_reads_a_log_of_many_event_files_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FolderStorage(tmp_path)
    monkeypatch.setattr(metrics, "OBJECT_BYTES", 500)
    with MetricLog(storage, 0, writes=True) as log:
        for step in range(1, 61):
            log.add(step, {"train/rate": float(step)})
            log.flush()
    keys = storage.list("tensorboard")
    assert len(keys) > 3
    # As above: TensorBoard cannot tell the order of files of one second.
    for key in keys:
        number = int(key.rpartition(".")[2])
        (tmp_path / key).rename(tmp_path / "tensorboard" / f"events.out.tfevents.{number:010d}")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/rate")] == list(range(1, 61))
