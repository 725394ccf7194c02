"""Batches of tensors from shards: every sample exactly once, starting at any step.

``TrainLoader`` follows ``pipeline.data.order``; ``EvalLoader`` gives every sample once, in the
order of the manifest. Both read ahead in the background, verify the checksum of every record, and
unpickle nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from pipeline import background
from pipeline.data.batch import Batch
from pipeline.data.dataset import DataSet
from pipeline.data.order import Order, even_part, in_manifest_order
from pipeline.data.reader import STRICT, Reader, ReadOptions, Rows, substitute
from pipeline.data.records import Integers
from pipeline.errors import UserError

Item = TypeVar("Item")
GROUP_BYTES = 128 << 20
"""Bytes of images that are shuffled together, over all streams."""


class TrainLoader:
    """One rank's batches of steps ``start_step`` to ``num_steps - 1``, over any number of epochs.

    Each iteration begins at ``start_step``; getting there costs one ranged read for each shard that
    is open at that step. ``group_bytes`` bounds the images that are shuffled together, over all
    streams; the ranks share them. Memory holds twice that: the group in use and the next one.
    Samples that ``options`` allows to skip are replaced by others of their group.

    If the number of ranks does not divide the number of streams, some ranks read one stream more
    than others.

    Raises ``UserError`` if there are more ranks than streams or fewer samples than one batch, and
    while iterating if data is missing or damaged.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        seed: int,
        global_batch: int,
        num_streams: int,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group_bytes: int = GROUP_BYTES,
        options: ReadOptions = STRICT,
    ) -> None:
        if world_size > num_streams:
            raise UserError(
                f"{world_size} ranks cannot share {num_streams} streams; use fewer, or a larger"
                " train.num_streams"
            )
        self._reader = Reader(data, "train", options)
        try:
            self._order = Order(
                sizes=self._reader.sizes,
                seed=seed,
                global_batch=global_batch,
                num_streams=num_streams,
                group_samples=group_bytes // (self._reader.image_bytes * num_streams),
            )
        except ValueError as error:
            raise UserError(
                f"split train of data set {data.manifest.name}: {error}; choose another"
                " train.global_batch"
            ) from None
        self._streams = range(*even_part(num_streams, rank, world_size))
        self._first_position = self._streams.start * self._order.stream_batch
        self._steps = range(start_step, num_steps)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def num_skipped(self) -> int:
        """The number of samples that this rank could not read and replaced by others."""
        return self._reader.num_skipped

    def __iter__(self) -> Iterator[Batch]:
        order, step = self._order, self._steps.start
        for rows, batches in one_ahead(self._rounds()):
            for batch in batches:
                positions = step * order.global_batch + self._first_position + np.arange(len(batch))
                yield Batch(step, *rows.take(batch), positions)
                step += 1

    def _rounds(self) -> Iterator[tuple[Rows, Integers]]:
        """The samples of one group of each stream at a time, and the rows of each batch,
        ``(num_batches, local_batch)``.
        """
        order, step, epoch = self._order, self._steps.start, -1
        steps_per_group = order.group_length // order.stream_batch
        room = len(self._streams) * min(order.group_length, order.stream_length)
        buffers = [
            Rows.empty(room, self._reader.image_shape) for _ in range(2)
        ]  # one in use, one being filled
        while step < self._steps.stop:
            if epoch != step // order.steps_per_epoch:
                epoch = step // order.steps_per_epoch
                circle = order.circle(epoch)
            index, begin = divmod(step % order.steps_per_epoch, steps_per_group)
            groups = [order.group(epoch, circle, stream, index) for stream in self._streams]
            length = len(groups[0].permutation)  # equal for all streams
            rows = buffers[0]
            segments = np.concatenate([group.segments for group in groups])
            present = self._reader.read_into(rows, segments)
            if not present.all():
                for number in range(len(groups)):
                    substitute(rows, present, slice(number * length, (number + 1) * length))
            # By batch, then stream, then turn.
            turns = [
                number * length + group.permutation.reshape(-1, order.stream_batch)
                for number, group in enumerate(groups)
            ]
            batches = np.concatenate(turns, axis=1)[begin : begin + self._steps.stop - step]
            yield rows, batches
            buffers.reverse()
            step += len(batches)


class EvalLoader:
    """One rank's part of a split, or of its first ``num_images`` samples, each exactly once.

    The last batch may be smaller than the others.
    Samples that ``options`` allows to skip are left out.

    Raises ``UserError`` while iterating if data is missing or damaged.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        split: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_images: int | None = None,
        options: ReadOptions = STRICT,
    ) -> None:
        self._reader = Reader(data, split, options)
        self._batch_size = batch_size
        total = data.manifest.num_samples(split)
        self._start, self._stop = even_part(
            total if num_images is None else min(num_images, total), rank, world_size
        )

    @property
    def num_samples(self) -> int:
        """The number of samples that this rank gives."""
        return self._stop - self._start

    @property
    def num_skipped(self) -> int:
        """The number of samples that this rank could not read and left out."""
        return self._reader.num_skipped

    def keys(self, batch: Batch) -> list[str] | None:
        """The names that the samples of a batch had in their source; None if they had none."""
        return self._reader.keys(batch.samples)

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        for rows, present in one_ahead(self._rounds()):
            for first in range(0, len(present), self._batch_size):
                images, labels, samples = rows.take(present[first : first + self._batch_size])
                yield Batch(step, images, labels, samples, samples)
                step += 1

    def _rounds(self) -> Iterator[tuple[Rows, Integers]]:
        """The samples of some whole batches at a time (about 16 MB), and the rows read."""
        circle = in_manifest_order(self._reader.sizes)
        length = (
            max(1, (16 << 20) // (self._reader.image_bytes * self._batch_size)) * self._batch_size
        )
        buffers = [
            Rows.empty(min(length, self.num_samples), self._reader.image_shape) for _ in range(2)
        ]
        for start in range(self._start, self._stop, length):
            segments = circle.segments(start, min(start + length, self._stop))
            yield buffers[0], np.flatnonzero(self._reader.read_into(buffers[0], segments))
            buffers.reverse()


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in the background while the previous one is in use.

    An error in making an item is raised where the item would have come. Each thread makes one item
    and ends, so a consumer that stops early leaves at most one thread running.
    """
    make = partial(background.start, partial(next, items), "loader")
    future = make()
    while True:
        try:
            item = future.result()
        except StopIteration:
            return
        future = make()
        yield item
