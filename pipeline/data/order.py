"""Which sample each rank sees at each step: pure functions of (shard sizes, seed, epoch).

No list of all samples is ever made.

An epoch shuffles the shards and lays their samples end to end in a circle, which it enters at a
random place. The circle is dealt to C canonical *streams* of equal length; each stream is cut into
*groups* of consecutive samples, and a group's samples are shuffled. Global batch b is the next B /
C samples of every stream, in the order of streams; rank r of W <= C reads streams floor(r C / W) up
to floor((r + 1) C / W). So

* every rank has the same number of steps, and a global batch is the same for every W;
* no sample comes twice in an epoch; the N mod B samples that fill no batch (the end of the circle)
  are left out, others in each epoch, every sample with the same probability;
* a position in training is one integer, the step since its start, and resuming needs no replay.

Example: shards of 3, 4 and 5 samples (N = 12), B = 4, C = 2, groups of at most 4 samples:

>>> order = Order(sizes=(3, 4, 5), seed=0, global_batch=4, num_streams=2, group_samples=4)
>>> order.steps_per_epoch, order.stream_length, order.group_length
(3, 6, 4)
>>> circle = order.circle(epoch=0)
>>> circle.shards.tolist(), circle.offset
([1, 0, 2], 3)
>>> circle.segments(0, 6).tolist()  # stream 0: shard, first sample, last sample + 1
[[1, 3, 4], [0, 0, 3], [2, 0, 2]]
>>> circle.segments(6, 12).tolist()  # stream 1
[[2, 2, 5], [1, 0, 3]]
>>> group = order.group(0, circle, stream=0, index=0)
>>> group.segments.tolist(), group.permutation.tolist()
([[1, 3, 4], [0, 0, 3]], [1, 2, 3, 0])

The segments of stream 0's first group hold the samples 1:3, 0:0, 0:1, 0:2 (shard:sample); the
permutation puts them in the order 0:0, 0:1, 0:2, 1:3; batch 0 takes the first two of these and the
first two of stream 1's group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.noise import Purpose, below, permutation

Indices = npt.NDArray[np.int64]
GROUP_BYTES = 128 << 20
"""Bytes of images that are shuffled together, over all streams."""
MAX_DEFAULT_STREAMS = 32
"""Most streams that ``default_streams`` chooses: a rank keeps a shard of each of its streams open.
"""


@dataclass(frozen=True)
class Circle:
    """The samples of an epoch or an evaluation: shards end to end in a circle."""

    shards: Indices  # (num_shards,): the shards in the order in which they are laid
    bounds: Indices  # (num_shards + 1,): where each begins and the last ends
    offset: int  # where position 0 is

    def segments(self, start: int, stop: int) -> Indices:
        """The samples at positions ``start`` to ``stop`` of the circle.

        Rows of (shard, first sample, last sample + 1), of shape ``(num_segments, 3)``, in the order
        of positions. The cost is the logarithm of the number of shards, plus the segments.
        """
        total = int(self.bounds[-1])
        start, stop = start + self.offset, stop + self.offset
        if stop <= total:
            return self._segments_between(start, stop)
        if start >= total:
            return self._segments_between(start - total, stop - total)
        parts = self._segments_between(start, total), self._segments_between(0, stop - total)
        return np.concatenate(parts)

    def _segments_between(self, start: int, stop: int) -> Indices:
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, stop, side="left"))
        begins, ends = self.bounds[first:last], self.bounds[first + 1 : last + 1]
        rows = np.stack(
            [
                self.shards[first:last],
                np.maximum(start, begins) - begins,
                np.minimum(stop, ends) - begins,
            ],
            axis=1,
        )
        return rows[rows[:, 1] < rows[:, 2]]  # without shards that hold no samples


@dataclass(frozen=True)
class Group:
    """Consecutive samples of one stream, and the order in which they are used."""

    segments: Indices  # (num_segments, 3): shard, first sample, last sample + 1
    permutation: Indices
    """(num_samples,): sample k of the group is sample permutation[k] of the segments end to end."""


@dataclass(frozen=True)
class Order:
    """The order of training.

    ``sizes`` are the numbers of samples of the shards, in the order of the manifest.
    ``group_samples`` bounds the samples that a stream shuffles together; it is rounded down to
    whole batches, so that a batch never needs two groups of a stream.

    Raises ``ValueError`` if there are fewer samples than one global batch, or the streams do not
    divide the batch.
    """

    sizes: Sequence[int] | Indices
    seed: int
    global_batch: int
    num_streams: int
    group_samples: int

    def __post_init__(self) -> None:
        if self.global_batch % self.num_streams:
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be shared by {self.num_streams}"
                " streams"
            )
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"a global batch of {self.global_batch} is more than all {self.num_samples} samples"
            )

    @cached_property
    def num_samples(self) -> int:
        return int(np.sum(self.sizes, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def stream_batch(self) -> int:
        """Samples of one stream in a global batch."""
        return self.global_batch // self.num_streams

    @property
    def stream_length(self) -> int:
        """Samples of one stream in an epoch."""
        return self.steps_per_epoch * self.stream_batch

    @property
    def group_length(self) -> int:
        """Samples of each group of a stream; the last one may be shorter."""
        return max(1, self.group_samples // self.stream_batch) * self.stream_batch

    def circle(self, epoch: int) -> Circle:
        """The samples of an epoch.

        Stream c has positions ``c * stream_length`` up to ``(c + 1) * stream_length``.
        """
        shards = permutation((self.seed, Purpose.SHARD_ORDER, epoch), len(self.sizes))
        offset = below((self.seed, Purpose.EPOCH_OFFSET, epoch), self.num_samples)
        return Circle(shards, _bounds(np.asarray(self.sizes, dtype=np.int64)[shards]), offset)

    def group(self, epoch: int, circle: Circle, stream: int, index: int) -> Group:
        """Group ``index`` of a stream in an epoch, whose ``circle`` is passed in.

        The circle is made once an epoch, since it takes a sort of all shards.
        """
        start = index * self.group_length
        stop = min(start + self.group_length, self.stream_length)
        first = stream * self.stream_length
        key = (self.seed, Purpose.GROUP_ORDER, epoch, stream, index)
        return Group(circle.segments(first + start, first + stop), permutation(key, stop - start))


def default_streams(global_batch: int) -> int:
    """The number of streams for a batch if nobody chose one.

    Of the batch's divisors up to ``MAX_DEFAULT_STREAMS``, the one that most world sizes divide; the
    lowest of several. It does not depend on the world size, which may change.

    >>> [default_streams(batch) for batch in (1, 7, 32, 100, 192, 256)]
    [1, 7, 32, 20, 24, 32]
    """

    def divisors(number: int, most: int) -> list[int]:
        return [each for each in range(1, min(number, most) + 1) if number % each == 0]

    choices = divisors(global_batch, MAX_DEFAULT_STREAMS)
    return max(choices, key=lambda streams: (len(divisors(streams, streams)), -streams))


def in_manifest_order(sizes: Sequence[int] | Indices) -> Circle:
    """All samples in the order of the manifest, in which evaluations see them."""
    return Circle(np.arange(len(sizes)), _bounds(np.asarray(sizes, dtype=np.int64)), 0)


def even_part(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The positions ``(start, stop)`` of one rank's part of a sequence.

    Every position belongs to exactly one rank; the parts differ in length by at most one.

    >>> [even_part(10, rank, 4) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return num_samples * rank // world_size, num_samples * (rank + 1) // world_size


def _bounds(sizes: Indices) -> Indices:
    """Where each of the sizes begins when laid end to end, and where the last ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
