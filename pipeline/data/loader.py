"""Batches of tensors from shards: every sample exactly once, starting at any step.

``TrainLoader`` follows ``pipeline.data.order``; ``EvalLoader`` gives every sample once, in the
order of the manifest. Both read ahead in the background, verify the checksum of every record, and
unpickle nothing. ``Batches`` and ``InOrder`` are the same for other people's training loops: pairs
of tensors, and a position that is saved and loaded as PyTorch's parts are.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from pipeline.background import one_ahead
from pipeline.data.batch import Batch
from pipeline.data.dataset import DataSet
from pipeline.data.order import GROUP_BYTES, Order, default_streams, even_part, in_manifest_order
from pipeline.data.reader import STRICT, Reader, ReadOptions, Rows, substitute
from pipeline.data.records import Integers
from pipeline.errors import UserError

State = dict[str, int | str]
"""A position in ``Batches``: ``step``, and the arguments that decide the order."""


class TrainLoader:
    """One rank's batches of steps ``start_step`` to ``num_steps - 1``, over any number of epochs.

    Each iteration begins at ``start_step``, unless ``between`` is given other steps; getting there
    costs one ranged read for each shard that is open at that step. ``group_bytes`` bounds the
    images that are shuffled together, over all streams; the ranks share them. Memory holds twice
    that: the group in use and the next one. Samples that ``options`` allows to skip are replaced by
    others of their group.

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
        num_steps: int = sys.maxsize,
        start_step: int = 0,
        split: str = "train",
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
        self._reader = Reader(data, split, options)
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
                f"split {split} of data set {data.manifest.name}: {error}; choose another"
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
        return self.between(self._steps.start, self._steps.stop)

    def between(self, step: int, stop: int) -> Iterator[Batch]:
        """The batches of steps ``step`` to ``stop - 1``."""
        order = self._order
        for rows, batches in one_ahead(self._rounds(step, stop)):
            for batch in batches:
                positions = step * order.global_batch + self._first_position + np.arange(len(batch))
                yield Batch(step, *rows.take(batch), positions)
                step += 1

    def _rounds(self, step: int, stop: int) -> Iterator[tuple[Rows, Integers]]:
        """The samples of one group of each stream at a time, and the rows of each batch,
        ``(num_batches, local_batch)``.
        """
        order, epoch = self._order, -1
        steps_per_group = order.group_length // order.stream_batch
        room = len(self._streams) * min(order.group_length, order.stream_length)
        buffers = [
            Rows.empty(room, self._reader.image_shape) for _ in range(2)
        ]  # one in use, one being filled
        while step < stop:
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
            batches = np.concatenate(turns, axis=1)[begin : begin + stop - step]
            yield rows, batches
            buffers.reverse()
            step += len(batches)


class EvalLoader:
    """One rank's part of a split, or of its first ``num_images`` samples, each exactly once.

    The first ``start`` of these are left out. The last batch may be smaller than the others.
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
        start: int = 0,
        options: ReadOptions = STRICT,
    ) -> None:
        self._reader = Reader(data, split, options)
        self._batch_size = batch_size
        total = data.manifest.num_samples(split)
        stop = total if num_images is None else min(num_images, total)
        first, last = even_part(stop - start, rank, world_size)
        self._start, self._stop = start + first, start + last

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


class Batches:
    """Shuffled batches for anybody's training loop; ``DataSet.batches`` says how to use them.

    ``len`` is the number of batches of one pass, the same on every rank. Raises ``TypeError`` if a
    pass does not end.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        batch: int,
        split: str,
        epochs: int | None,
        seed: int,
        ranks: tuple[int, int] | None,
        streams: int | None,
        group_bytes: int,
        options: ReadOptions,
    ) -> None:
        for name, value in {"batch": batch, "epochs": epochs, "streams": streams}.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is impossible; it must be at least 1")
        self.step = 0
        """The position: the number of batches given so far, over all epochs."""
        self._batch, self._num_streams = batch, streams or default_streams(batch)
        if batch % self._num_streams:
            raise UserError(
                f"batch={batch} cannot be shared by streams={streams}; use a multiple of {streams}"
            )
        self._order: State = {
            "data_set": data.manifest.digest,
            "split": split,
            "batch": batch,
            "seed": seed,
            "streams": self._num_streams,
            "group_bytes": group_bytes,
        }
        self._open = partial(
            TrainLoader,
            data,
            seed=seed,
            global_batch=batch,
            num_streams=self._num_streams,
            split=split,
            group_bytes=group_bytes,
            options=options,
        )
        self._ranks, self._loaders = ranks, dict[tuple[int, int], TrainLoader]()
        if ranks is not None:
            self._check(ranks[1])
        self.steps_per_epoch = self._open().steps_per_epoch
        """The number of batches of an epoch."""
        self._epochs = epochs

    def __len__(self) -> int:
        if self._epochs is None:
            raise TypeError("with epochs=None, the batches have no end and no len()")
        return self._epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ranks = self._ranks or current_ranks()
        self._check(ranks[1])
        if ranks not in self._loaders:  # kept, since it knows the indices and counts the skipped
            rank, world_size = ranks
            self._loaders = {ranks: self._open(rank=rank, world_size=world_size)}
        stop = sys.maxsize if self._epochs is None else (self.step // len(self) + 1) * len(self)
        for batch in self._loaders[ranks].between(self.step, stop):
            self.step = batch.step + 1
            yield batch.images, batch.labels

    def state_dict(self) -> State:
        """The position, and the arguments that decide the order; the same on every rank.

        It includes the batch that the loop is working on.
        """
        return {"step": self.step, **self._order}

    def load_state_dict(self, state: State) -> None:
        """Go to the position of a ``state_dict``, from which the next ``for`` continues.

        Raises ``UserError`` if the state's batches have another order: their positions differ.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError("this is no state of DataSet.batches; load what its state_dict() gave")
        for name, own in self._order.items():
            if state[name] != own:
                raise UserError(
                    f"the state belongs to batches with {name}={state[name]}, but these have"
                    f" {name}={own}, so its position means other images; use {name}={state[name]},"
                    " or begin without the state"
                )
        self.step = int(state["step"])

    @property
    def sampler(self) -> "Batches":
        """Lightning calls ``set_epoch`` on the ``sampler`` of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of pass number ``epoch``, unless the position is in that pass.

        Lightning calls this before each epoch. A loop of one's own need not: each ``for`` goes on
        where the last one ended.
        """
        if self._epochs is not None and self.step // len(self) != epoch:
            self.step = epoch * len(self)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_loaders": {}}  # another process opens its own

    def _check(self, world_size: int) -> None:
        """Raise ``UserError`` unless the ranks can share each batch equally."""
        if self._num_streams % world_size == 0:
            return
        remedy = f"use 1 or another divisor of {self._num_streams} as the number of ranks"
        if self._batch % world_size:
            remedy += f", or a batch that is a multiple of {world_size}"
        else:
            remedy += f", or streams={world_size}"
        raise UserError(
            f"{world_size} ranks cannot share batch={self._batch} equally: it is dealt to"
            f" {self._num_streams} streams; {remedy}"
        )


class InOrder:
    """Every sample of a split once, in order; ``DataSet.in_order`` says how to use it.

    ``len`` is the number of this rank's batches, which may differ by one between ranks.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        batch: int,
        split: str,
        ranks: tuple[int, int] | None,
        options: ReadOptions,
    ) -> None:
        if batch < 1:
            raise UserError(f"batch={batch} is impossible; it must be at least 1")
        self._batch, self._ranks = batch, ranks
        self._open = partial(EvalLoader, data, split=split, batch_size=batch, options=options)
        self._open()  # raises if there is no such split

    def __len__(self) -> int:
        return -(-self._part().num_samples // self._batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._part():
            yield batch.images, batch.labels

    def _part(self) -> EvalLoader:
        rank, world_size = self._ranks or current_ranks()
        return self._open(rank=rank, world_size=world_size)


def chosen_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """``(rank, world_size)``, or None if neither is given. Raises ``UserError`` for one alone."""
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UserError(
            f"rank={rank} and world_size={world_size} do not name a rank; give both, with rank from"
            " 0 to world_size - 1, or neither to take those of torch.distributed"
        )
    return rank, world_size


def current_ranks() -> tuple[int, int]:
    """Rank and world size of torch.distributed; ``(0, 1)`` in a process that runs alone.

    Raises ``UserError`` if a launcher such as torchrun started several processes and
    torch.distributed is not initialised: each of them would read everything.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but torch.distributed is not initialised; call"
            " torch.distributed.init_process_group() first, or give rank and world_size"
        )
    return 0, 1
