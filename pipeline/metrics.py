"""Metrics: sums and counts that are divided once, and the log of a run that people and programs read."""

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

from pipeline.loader import Batch
from pipeline.storage import Storage


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor without gradient over all ranks, in place; itself where there is one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class Moments:
    """Mean and standard error of per-image quantities, from sums that add up over batches and ranks (float64).

    A quantity is one number for each image; ``add``, ``means`` and ``variances`` also know those with one for each latent.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value per image for each name: tensors of shape (batch,) or (batch, latents)."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            moments = torch.stack([torch.ones_like(value).sum(0), value.sum(0), value.square().sum(0)])
            self.sums[name] = self.sums.get(name, 0) + moments

    def reduce(self, names: list[str], device: torch.device) -> None:
        """Add up over all ranks; a rank that saw no image takes part with zeros."""
        zero = torch.zeros(3, dtype=torch.float64)
        table = sum_over_ranks(torch.stack([self.sums.get(name, zero) for name in names]).to(device))
        self.sums = dict(zip(names, table.cpu(), strict=True))

    def count(self, name: str) -> int:
        return int(self.sums[name][0])

    def mean(self, name: str) -> float:
        count, total, _ = self.sums[name].tolist()
        return total / count

    def standard_error(self, name: str) -> float | None:
        """Standard deviation over images / sqrt(images); none for a single image, from which nobody can tell."""
        count, total, squares = self.sums[name].tolist()
        if count < 2:
            return None
        variance = max(0.0, squares / count - (total / count) ** 2) * count / (count - 1)
        return math.sqrt(variance / count)

    def standard_errors(self, name: str) -> list[float | None]:
        """The standard error for each latent."""
        count = int(self.sums[name][0, 0])
        if count < 2:
            return [None] * self.sums[name].shape[1]
        return (self.variances(name) / (count - 1)).sqrt().tolist()

    def means(self, name: str) -> Tensor:
        """The mean over images, for each latent: (latents,)."""
        count, total, _ = self.sums[name]
        return total / count

    def variances(self, name: str) -> Tensor:
        """The variance over these images (their mean squared deviation), for each latent: (latents,)."""
        count, total, squares = self.sums[name]
        return (squares / count - (total / count).square()).clamp(min=0)


class StepMeter:
    """Averages over the steps since the last report, and where their time went.

    Nothing here asks the device for a value before ``report``, so that a GPU is not made to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, device=device, dtype=torch.float64)
        self.restart()

    def restart(self) -> None:
        self.total.zero_()
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    def waits(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give on the batches, keeping account of the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def add(self, distortion: Tensor, rate: Tensor, taken: Tensor) -> None:
        """Take in a step: this rank's part of its mean distortion over the global batch, its mean rate, in nats per image, and
        whether it was ``taken``; if not, it is left out."""
        self.total += torch.where(taken, torch.stack([distortion, rate, torch.ones_like(rate)]), 0)
        self.steps += 1

    def report(self, global_batch: int) -> dict[str, float]:
        """The averages since the last report, which start afresh; all ranks have to ask for them together.

        ``data_wait`` is the share of the time that the ranks, on average, waited for images. There is no code length if no step was
        taken.
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
            values |= {"train/code_length": distortion + rate, "train/distortion": distortion, "train/rate": rate}
        self.restart()
        return values


class MetricLog:
    """A run's rows of metrics: ``metrics.jsonl`` and TensorBoard event files in the run's storage.

    Rows are kept in a local folder until ``flush`` uploads them. A resumed run continues the log at the step of its checkpoint: rows after
    it are dropped, since they are about to be written again. On ranks other than 0 (``writes=False``) it does nothing.
    A context manager.
    """

    KEY = "metrics.jsonl"

    def __init__(self, storage: Storage, step: int, writes: bool) -> None:
        self.storage, self.writes = storage, writes
        if not writes:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="vlae-log-")
        self.rows = [row for row in read_rows(storage) if row["step"] <= step]
        # TensorBoard drops what an earlier attempt logged after this step.
        self.writer = SummaryWriter(self.folder.name, purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log a row of values after ``step`` steps, without those that are none."""
        if not self.writes:
            return
        known = {name: value for name, value in values.items() if value is not None}
        row = {"step": step, **known}
        # A run that ends twice at the same step, having been resumed there, measures the same again.
        self.rows = [earlier for earlier in self.rows if earlier["step"] < step or earlier.keys() != row.keys()]
        self.rows.append(row)
        for name, value in known.items():
            self.writer.add_scalar(name, value, step)

    def lowest(self, name: str) -> float:
        """The lowest value of this name in the log; infinity if it has none."""
        return min((row[name] for row in self.rows if name in row), default=math.inf)

    def flush(self) -> None:
        """Bring what is in storage up to date. Safe to call while rows are added."""
        if not self.writes:
            return
        self.writer.flush()
        self.storage.write(self.KEY, "".join(json.dumps(row) + "\n" for row in list(self.rows)).encode())
        for path in Path(self.folder.name).iterdir():
            self.storage.upload(f"tensorboard/{path.name}", path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if not self.writes:
            return
        self.writer.close()
        self.folder.cleanup()


def read_rows(storage: Storage) -> list[dict[str, float]]:
    """The rows that a run has logged so far; none if it has not started."""
    if not storage.exists(MetricLog.KEY):
        return []
    return [json.loads(line) for line in storage.read(MetricLog.KEY).decode().splitlines()]
