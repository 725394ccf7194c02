"""From shards to batches of tensors, exactly once, from any step on.

``TrainLoader`` follows the order of ``pipeline.order``; ``EvalLoader`` gives every sample once, in the manifest's order. Both
read one ahead in the background, hold every record to its checksum, and unpickle nothing.
"""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline import noise
from pipeline.config import Binarization
from pipeline.errors import UserError
from pipeline.manifest import Index, Manifest, Shard
from pipeline.noise import Purpose
from pipeline.order import Order, share, straight
from pipeline.storage import ObjectNotFound, Storage

Images = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Item = TypeVar("Item")

REMEDY = "delete manifest.json there and run vlae shard again"


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int  # since the start of training; for an evaluation, the number of this rank's batch
    images: torch.Tensor  # uint8 (local_batch, channels, height, width)
    labels: torch.Tensor  # int64 (local_batch,); -1 where there is none
    samples: Integers  # (local_batch,): each one's number in its split
    positions: Integers  # (local_batch,): what noise is drawn by; in training step * global_batch + place, else samples


def binarize(batch: Batch, mode: Binarization, seed: int) -> torch.Tensor:
    """Images as models see them, float32 in [0, 1] of the shape of ``batch.images``: black and white, each pixel white with the
    probability of its grey value; or, with ``none``, as they are.

    ``dynamic`` draws anew for every position: in training each time an image is seen (``seed`` is the run's), in an
    evaluation once for each image (``seed`` is the evaluation's). ``static`` draws once for each sample of a split,
    whatever the seed.
    """
    grey = batch.images.float() / 255
    if mode is Binarization.none:
        return grey
    size = batch.images[0].numel()
    if mode is Binarization.dynamic:
        uniform = noise.uniform((seed, Purpose.BINARIZATION), batch.positions, size)
    else:
        uniform = noise.uniform((0, Purpose.STATIC_BINARIZATION), batch.samples, size)
    thresholds = torch.from_numpy(uniform)
    return (thresholds.view(grey.shape) < grey).float()  # < : 0 is always black, 255 always white


class TrainLoader:
    """The batches of steps ``start_step`` to ``num_steps - 1`` of one rank, over as many epochs as they take.

    Each iteration begins at ``start_step``; getting there costs one ranged read for each shard that is open at that step.
    ``group_bytes`` bounds the images that are shuffled together, over all streams; the ranks share them. Twice that is in
    memory: what is in use, and what comes next.

    Raises ``UserError`` if the ranks do not divide the streams or there are fewer samples than one batch, and while
    iterating if data is missing or damaged.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        *,
        seed: int,
        global_batch: int,
        num_streams: int,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        group_bytes: int = 128 << 20,
    ) -> None:
        if num_streams % world_size:
            raise UserError(f"{world_size} ranks cannot share {num_streams} streams; the ranks must divide train.num_streams")
        self._reader = _Reader(storage, manifest, split)
        try:
            self._order = Order(
                sizes=tuple(shard.num_samples for shard in self._reader.shards),
                seed=seed,
                global_batch=global_batch,
                num_streams=num_streams,
                group_samples=group_bytes // (self._reader.image_bytes * num_streams),
            )
        except ValueError as error:
            raise UserError(f"split {split} of data set {manifest.name}: {error}; choose another train.global_batch") from None
        self._streams = range(rank * num_streams // world_size, (rank + 1) * num_streams // world_size)
        self._first_position = rank * global_batch // world_size
        self._steps = range(start_step, num_steps)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        order = self._order
        local_batch = len(self._streams) * order.stream_batch
        step = self._steps.start
        for images, labels, samples in one_ahead(self._rounds()):
            # A round holds the same group of each of our streams; here it goes out batch by batch.
            begin = step % order.steps_per_epoch * order.stream_batch % order.group_length
            for first in range(begin, images.shape[1], order.stream_batch):
                if step == self._steps.stop:
                    return
                part = (slice(None), slice(first, first + order.stream_batch))  # (streams, stream_batch)
                positions = step * order.global_batch + self._first_position + np.arange(local_batch)
                yield Batch(
                    step,
                    torch.from_numpy(images[part].reshape(local_batch, *images.shape[2:])),
                    torch.from_numpy(labels[part].reshape(local_batch)),
                    samples[part].reshape(local_batch),
                    positions,
                )
                step += 1

    def _rounds(self) -> Iterator[tuple[Images, Integers, Integers]]:
        """Images, labels and sample numbers, each ``(streams of this rank, samples of a group, ...)``, in their final order."""
        order = self._order
        steps_per_group = order.group_length // order.stream_batch
        step, epoch = self._steps.start, -1
        while step < self._steps.stop:
            if epoch != step // order.steps_per_epoch:
                epoch = step // order.steps_per_epoch
                circle = order.circle(epoch)
            index = step % order.steps_per_epoch // steps_per_group
            groups = [order.group(epoch, circle, stream, index) for stream in self._streams]
            buffers = self._reader.buffers(len(groups), len(groups[0].permutation))
            for images, labels, samples, group in zip(*buffers, groups, strict=True):
                place = np.argsort(group.permutation)  # where each sample goes
                self._reader.fill(group.segments, images, labels, samples, place)
            yield buffers
            step = epoch * order.steps_per_epoch + min((index + 1) * steps_per_group, order.steps_per_epoch)


class EvalLoader:
    """This rank's share of a split, or of its first ``num_images`` samples: each exactly once, the last batch as it comes.

    Raises ``UserError`` while iterating if data is missing or damaged.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        *,
        split: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_images: int | None = None,
    ) -> None:
        self._reader = _Reader(storage, manifest, split)
        self._batch_size = batch_size
        total = manifest.num_samples(split)
        self._start, self._stop = share(total if num_images is None else min(num_images, total), rank, world_size)

    @property
    def num_samples(self) -> int:
        """How many samples this rank gives."""
        return self._stop - self._start

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        for images, labels, samples in one_ahead(self._rounds()):
            for first in range(0, len(images), self._batch_size):
                part = slice(first, first + self._batch_size)
                yield Batch(step, torch.from_numpy(images[part]), torch.from_numpy(labels[part]), samples[part], samples[part])
                step += 1

    def _rounds(self) -> Iterator[tuple[Images, Integers, Integers]]:
        """Images, labels and sample numbers, some whole batches at a time (about 16 MB)."""
        circle = straight(tuple(shard.num_samples for shard in self._reader.shards))
        length = max(1, (16 << 20) // (self._reader.image_bytes * self._batch_size)) * self._batch_size
        for start in range(self._start, self._stop, length):
            count = min(length, self._stop - start)
            images, labels, samples = (buffer[0] for buffer in self._reader.buffers(1, count))
            self._reader.fill(circle.segments(start, start + count), images, labels, samples, np.arange(count))
            yield images, labels, samples


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in the background while the one before is in use.

    An error in making an item is raised where the item would have come. Each thread makes one item and ends: a consumer
    that stops early leaves no more than that running, and a daemon thread does not keep the interpreter from ending.
    """

    def start() -> Future[Item]:
        future: Future[Item] = Future()

        def make() -> None:
            try:
                future.set_result(next(items))
            except BaseException as error:  # noqa: BLE001  (all of them belong to the consumer, the end of the items too)
                future.set_exception(error)

        threading.Thread(target=make, name="loader", daemon=True).start()
        return future

    future = start()
    while True:
        try:
            item = future.result()
        except StopIteration:
            return
        future = start()
        yield item


class _Reader:
    """Reads runs of samples of one split from its shards, and checks them."""

    def __init__(self, storage: Storage, manifest: Manifest, split: str) -> None:
        self.shards = manifest.shards(split)
        self.image_bytes = int(np.prod(manifest.image_shape))
        self._storage = storage
        self._image_shape = manifest.image_shape
        sizes = [shard.num_samples for shard in self.shards]
        self._first_samples = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # (num_shards + 1,)
        self._index = lru_cache(maxsize=64)(lambda shard: Index.load(storage, shard))

    def buffers(self, rows: int, count: int) -> tuple[Images, Integers, Integers]:
        """Room for images ``(rows, count, channels, height, width)``, labels and sample numbers ``(rows, count)``."""
        return (
            np.empty((rows, count, *self._image_shape), dtype=np.uint8),
            np.empty((rows, count), dtype=np.int64),
            np.empty((rows, count), dtype=np.int64),
        )

    def fill(self, segments: Integers, images: Images, labels: Integers, samples: Integers, place: Integers) -> None:
        """Put the samples of ``segments``, laid end to end, into the buffers: sample i goes to ``place[i]``."""
        done = 0
        for number, start, stop in segments.tolist():
            for block_images, block_labels in self._blocks(self.shards[number], start, stop):
                to = place[done : done + len(block_images)]
                images[to], labels[to] = block_images, block_labels
                done += len(block_images)
            samples[place[done - (stop - start) : done]] = self._first_samples[number] + np.arange(start, stop)

    def _blocks(self, shard: Shard, start: int, stop: int) -> Iterator[tuple[Images, Integers]]:
        """A shard's samples ``start`` to ``stop``, record by record: images ``(n, channels, height, width)``, labels ``(n,)``.

        One ranged read, whatever the number of records.
        """
        try:
            index = self._index(shard)
            first = int(np.searchsorted(index.starts, start, side="right")) - 1
            last = int(np.searchsorted(index.starts, stop, side="left"))
            begin, end = int(index.offset[first]), int(index.offset[last - 1] + index.size[last - 1])
            data = memoryview(self._storage.read_range(shard.name, begin, end - begin))
        except ObjectNotFound as error:
            raise ObjectNotFound(
                f"{error}, though the manifest of {self._storage.url} lists it ({shard.size} bytes); {REMEDY}"
            ) from None
        for record in range(first, last):
            at = int(index.offset[record]) - begin
            content = data[at : at + int(index.size[record])]
            actual = hashlib.sha256(content).hexdigest()
            if actual != index.sha256[record]:
                raise UserError(
                    f"{self._storage.url}/{shard.name} is damaged: record {record} (byte {begin + at}, {len(content)} bytes) "
                    f"has sha256 {actual}, its index says {index.sha256[record]}; {REMEDY}"
                )
            images, labels = _read_record(content)
            before = int(index.starts[record])
            part = slice(max(start - before, 0), stop - before)
            yield images[part], labels[part]


def _read_record(content: memoryview) -> tuple[Images, Integers]:
    """The two arrays of a record: the members of one WebDataset sample, as they stand in the tar."""
    arrays = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, member.name
            arrays[member.name.partition(".")[2]] = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return arrays["images.npy"], arrays["labels.npy"]
