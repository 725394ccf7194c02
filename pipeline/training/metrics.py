"""Training metrics, as sums and counts that are divided once, and the run's log of them."""

import json
import math
import tempfile
import time
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
from pipeline.runs import METRICS, TENSORBOARD, Run
from pipeline.storage.base import Storage


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
    """A run's rows of metrics: ``metrics.jsonl`` and TensorBoard event files in the run's storage.

    A context manager. Rows stay in a local folder until ``flush`` uploads them. A resumed run
    continues the log at the step of its checkpoint; later rows are dropped, since the run is about
    to log them again. With ``writes=False``, on ranks other than 0, it does nothing.
    """

    def __init__(self, storage: Storage, step: int, writes: bool) -> None:
        self.storage, self.writes = storage, writes
        if not writes:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="vlae-log-")
        self.rows = [row for row in Run(storage).rows() if row["step"] <= step]
        # TensorBoard drops the events that an earlier attempt logged after this step.
        self.writer = SummaryWriter(self.folder.name, purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log a row of values after ``step`` steps; values of None are left out."""
        if not self.writes:
            return
        known = {name: value for name, value in values.items() if value is not None}
        row = {"step": step, **known}
        # A run that was resumed at its last step logs the same row again.
        self.rows = [
            earlier
            for earlier in self.rows
            if earlier["step"] < step or earlier.keys() != row.keys()
        ]
        self.rows.append(row)
        for name, value in known.items():
            self.writer.add_scalar(name, value, step)

    def lowest(self, name: str) -> float:
        """The lowest value of this name in the log; infinity if it has none."""
        return min((row[name] for row in self.rows if name in row), default=math.inf)

    def flush(self) -> None:
        """Upload the log. Safe to call while rows are added."""
        if not self.writes:
            return
        self.writer.flush()
        self.storage.write(
            METRICS, "".join(json.dumps(row) + "\n" for row in list(self.rows)).encode()
        )
        for path in Path(self.folder.name).iterdir():
            self.storage.upload(f"{TENSORBOARD}/{path.name}", path)

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
        self.writer.close()
        self.folder.cleanup()
