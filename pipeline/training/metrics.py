"""Training metrics, as sums and counts that are divided once, and the run's log of them."""

import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.data.batch import Batch
from pipeline.evaluation.moments import sum_over_ranks
from pipeline.runs import TENSORBOARD, MetricReader, Row, metrics_key
from pipeline.storage.base import Storage

OBJECT_BYTES = 256 << 10
"""Bytes after which the log continues in another object, and the events in another file."""


class StepMeter:
    """Averages over the steps since the last report, and how much time they took.

    Only ``report`` reads values from the device, so that a GPU does not wait for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, device=device, dtype=torch.float64)
        self.restart()

    def restart(self) -> None:
        self.total.zero_()
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    def waits(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def add(self, distortion: Tensor, rate: Tensor, taken: Tensor) -> None:
        """Add a step, as ``Learner.learn`` returns it; one that was not ``taken`` is left out."""
        self.total += torch.where(taken, torch.stack([distortion, rate, torch.ones_like(rate)]), 0)
        self.steps += 1

    def report(self, global_batch: int) -> dict[str, float]:
        """The averages since the last report, which are then reset; a collective operation.

        ``data_wait`` is the fraction of the time that the ranks, on average, waited for images.
        Without a step that was taken, there is no code length.
        """
        seconds = time.monotonic() - self.started
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        own = torch.stack([self.total[0], self.total.new_tensor(self.waited / seconds)])
        distortion, waited = sum_over_ranks(own).tolist()
        _, rate, taken = self.total.tolist()
        values = {
            "train/images_per_s": self.steps * global_batch / seconds,
            "train/step_ms": 1000 * seconds / self.steps,
            "train/data_wait": waited / world_size,
        }
        if taken:
            distortion, rate = distortion / taken, rate / taken
            values |= {
                "train/code_length": distortion + rate,
                "train/distortion": distortion,
                "train/rate": rate,
            }
        self.restart()
        return values


class MetricLog:
    """A run's rows of metrics: ``metrics/`` and TensorBoard event files in the run's storage.

    A context manager. Rows are kept in memory until ``flush`` uploads them. A flush writes the new
    rows and the last object of the log again, which has at most about OBJECT_BYTES, and likewise
    the last event file. A resumed run continues the log at the step of its checkpoint, and voids
    later rows, since it is about to log them again. With ``writes=False``, on ranks other than 0,
    it does nothing.
    """

    def __init__(self, storage: Storage, step: int, writes: bool) -> None:
        self.storage, self.writes = storage, writes
        if not writes:
            return
        reader = MetricReader(storage)
        self._lowest = dict[str, float]()
        for row in reader.rows():
            if row["step"] <= step:
                self._note(row)
        self._waiting = deque[tuple[float, Row]]()  # rows and when they were added
        self._number, self._content, self._written = reader.number, "", ""
        if storage.exists(
            metrics_key(0)
        ):  # an object of its own: the earlier ones stay as they are
            self._number, self._content = reader.number + 1, json.dumps({"resumed": step}) + "\n"
            self._written = self._content  # not alone: only together with a row
        self.folder = tempfile.TemporaryDirectory(prefix="vlae-log-")
        self._uploaded = 0  # bytes of the event file
        # TensorBoard drops the events that an earlier attempt logged after this step.
        self._open_events(purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log a row of values after ``step`` steps; values of None are left out."""
        if not self.writes:
            return
        row = {"step": step} | {name: value for name, value in values.items() if value is not None}
        self._note(row)
        self._waiting.append((time.time(), row))

    def lowest(self, name: str) -> float:
        """The lowest value of this name in the log; infinity if it has none."""
        return self._lowest.get(name, math.inf)

    def flush(self) -> None:
        """Upload the log. Safe to call while rows are added."""
        if not self.writes:
            return
        while self._waiting or self._content != self._written:
            while self._waiting and len(self._content) < OBJECT_BYTES:
                added, row = self._waiting.popleft()
                self._content += json.dumps(row) + "\n"
                for name, value in row.items():
                    if name != "step":
                        self.events.add_scalar(name, value, row["step"], walltime=added)
            self.storage.write(metrics_key(self._number), self._content.encode())
            self._written = self._content
            if len(self._content) >= OBJECT_BYTES:
                self._number, self._content, self._written = self._number + 1, "", ""
        self.events.flush()
        (path,) = Path(self.folder.name).iterdir()
        size = path.stat().st_size
        if size == self._uploaded:
            return
        self.storage.upload(f"{TENSORBOARD}/{path.name}", path)
        self._uploaded = size
        if size >= OBJECT_BYTES:
            self.events.close()
            path.unlink()
            self._open_events()

    def _open_events(self, purge_step: int | None = None) -> None:
        """Begin an event file. TensorBoard reads those of a folder one after the other."""
        self.events = SummaryWriter(self.folder.name, purge_step=purge_step)
        self._uploaded = 0

    def _note(self, row: Row) -> None:
        for name, value in row.items():
            self._lowest[name] = min(value, self._lowest.get(name, math.inf))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.writes:
            return
        self.events.close()
        self.folder.cleanup()
