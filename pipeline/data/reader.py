"""Reading samples from the shards of a split: fetch, check and decode, several shards at a time."""

import logging
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from pipeline import machine
from pipeline.background import in_parallel
from pipeline.data import images, tar
from pipeline.data.cache import ShardCache
from pipeline.data.dataset import DataSet
from pipeline.data.pixels import PixelCache
from pipeline.data.records import REMEDY, Index, Integers, Shard, checksum
from pipeline.errors import DamagedData, UserError
from pipeline.storage.base import ObjectNotFound, ObjectTooShort, Storage
from pipeline.storage.pieces import Pieces
from pipeline.storage.resume import rereads

logger = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]

THREADS = 8
"""Concurrent reads: one connection to object storage has a tenth of a network card's bandwidth."""
DECODED = 16
"""Image files that a thread decodes at a time; those of one shape are resized together."""


@dataclass(frozen=True)
class Rows:
    """A buffer for samples, which is reused: fresh memory costs as much as all work on it."""

    images: Images  # (num_rows, channels, height, width)
    labels: Integers  # (num_rows,)
    samples: Integers  # (num_rows,): the number of each in its split

    @classmethod
    def empty(cls, num_rows: int, image_shape: tuple[int, int, int]) -> "Rows":
        images = torch.empty((num_rows, *image_shape), dtype=torch.uint8).numpy()
        return cls(images, np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64))

    def take(self, rows: Integers) -> tuple[torch.Tensor, torch.Tensor, Integers]:
        """Copies of some rows: images and labels, page-locked if there is a GPU, and numbers."""
        pinned = torch.cuda.is_available()
        images = torch.empty(
            (len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pinned
        )
        labels = torch.empty(len(rows), dtype=torch.int64, pin_memory=pinned)
        for source, target in ((self.images, images), (self.labels, labels)):
            # The mode "raise" would make one more copy.
            np.take(source, rows, axis=0, out=target.numpy(), mode="clip")
        return images, labels, self.samples[rows]


@dataclass(frozen=True)
class Span:
    """Consecutive samples of one shard, and the rows that they are put into."""

    shard: int
    start: int  # the first sample
    stop: int  # the last sample + 1
    row: int  # of the first sample

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)

    def part(self, start: int, stop: int) -> "Span":
        """Some of its samples, and their rows."""
        return Span(self.shard, start, stop, self.row + start - self.start)


@dataclass(frozen=True)
class ReadOptions:
    """How shards are read."""

    cache: ShardCache | None = None
    """Keeps what was read on this machine: pixels of image files if there is room, else shards."""
    max_skipped: int = 0
    """How many damaged or missing samples a reader may skip in all; each is logged."""


STRICT = ReadOptions()
"""Read from storage each time, and skip nothing."""


class Reader:
    """Reads spans of samples of one split from its shards, and checks them. Thread-safe."""

    def __init__(self, data: DataSet, split: str, options: ReadOptions = STRICT) -> None:
        storage, manifest = data.storage, data.manifest
        self.shards = manifest.shards(split)
        self.sizes = manifest.shard_samples(split)  # (num_shards,)
        self.image_shape = manifest.image_shape
        self.image_bytes = int(np.prod(manifest.image_shape))
        self._storage, self._manifest = storage, manifest
        self._max_skipped = options.max_skipped
        self._pixels = PixelCache.open(options.cache, manifest)
        self._cache = options.cache if self._pixels is None else None
        self._skipped, self._skipping = set[int](), threading.Lock()
        self._first_samples = np.concatenate([[0], np.cumsum(self.sizes)])  # (num_shards + 1,)
        self._index = lru_cache(maxsize=64)(lambda shard: Index.load(storage, shard, options.cache))
        self._elsewhere = lru_cache(maxsize=16)(storage.elsewhere)

    @property
    def num_skipped(self) -> int:
        """The number of samples skipped so far."""
        return len(self._skipped)

    def read_into(self, rows: Rows, segments: Integers) -> Booleans:
        """Read samples into ``rows``. Returns which rows were filled: all but the skipped ones.

        ``segments`` are rows of (shard, first sample, last sample + 1), laid end to end. Each costs
        one ranged read, whatever the number of its records, which are decoded as they arrive;
        neighbours in a shard are read together.
        """
        spans, row = list[Span](), 0
        for shard, start, stop in segments.tolist():
            # Not with max_skipped: a read that fails must miss the same samples, whatever else
            # this rank reads.
            adjacent = bool(spans) and (spans[-1].shard, spans[-1].stop) == (shard, start)
            if adjacent and not self._max_skipped:
                spans[-1] = replace(spans[-1], stop=stop)
            else:
                spans.append(Span(shard, start, stop, row))
            row += stop - start
        present = np.ones(row, dtype=bool)
        read_records = (
            self._read_images if self._manifest.encoding == "image" else self._read_blocks
        )
        # One more than there are cores: one of them waits for the storage.
        decoders = -(-(machine.num_cores() + 1) // max(1, len(spans)))

        def read(span: Span) -> None:
            first = self._first_samples[span.shard]
            rows.samples[span.rows] = first + np.arange(span.start, span.stop)
            shard = self.shards[span.shard]
            try:
                read_records(shard, self._index(shard), span, rows, present, decoders)
            except ObjectNotFound as error:
                lost = (
                    f"{error}, though the manifest of {self._storage.url} lists it ({shard.size}"
                    f" bytes); {REMEDY}"
                )
                self._skip(ObjectNotFound(lost), rows, present, span.rows)
            except (ObjectTooShort, DamagedData) as error:
                self._skip(error, rows, present, span.rows)

        in_parallel(read, spans, min(THREADS, len(spans)), "loader")
        return present

    def keys(self, samples: Integers) -> list[str] | None:
        """The names that samples, given by number, had in their source; None if they had none."""
        shards = np.searchsorted(self._first_samples, samples, side="right") - 1
        found = []
        for shard, place in zip(
            shards.tolist(), (samples - self._first_samples[shards]).tolist(), strict=True
        ):
            keys = self._index(self.shards[shard]).keys
            if keys is None:
                return None
            found.append(keys[place])
        return found

    def _records(self, shard: Shard, index: Index, span: Span) -> Iterator[tuple[int, bytes]]:
        """The records of a span with their numbers, as they arrive in one read.

        Bytes between records are read and thrown away.
        """
        first = int(np.searchsorted(index.starts, span.start, side="right")) - 1
        last = int(np.searchsorted(index.starts, span.stop, side="left"))
        storage, key = self.locate(shard)
        position = int(index.offset[first])
        length = int(index.offset[last - 1] + index.size[last - 1]) - position
        if self._cache is not None:
            pieces = Pieces(
                self._cache.stream(storage, key, shard.size, shard.sha256, position, length)
            )
        else:
            pieces = Pieces(storage.stream(key, position, length))
        for number in range(first, last):
            offset, size = int(index.offset[number]), int(index.size[number])
            pieces.read(offset - position)
            yield number, pieces.read(size)
            position = offset + size

    def _read_blocks(
        self, shard: Shard, index: Index, span: Span, rows: Rows, present: Booleans, _: int
    ) -> None:
        """Read the blocks of a span, and put those of their samples that belong to it into rows."""
        for number, content in self._records(shard, index, span):
            begin, end = int(index.starts[number]), int(index.starts[number + 1])
            start, stop = max(span.start, begin), min(span.stop, end)
            to = span.part(start, stop).rows
            try:
                block, labels = self._block(self._checked(shard, index, number, content))
                part = slice(start - begin, stop - begin)
                rows.images[to], rows.labels[to] = block[part], labels[part]
            except (ObjectNotFound, ObjectTooShort, DamagedData) as error:
                self._skip(error, rows, present, to)
            except (images.BadImage, tar.BadTar) as error:
                self._skip(self._unusable(shard, index, number, error), rows, present, to)

    def _read_images(
        self, shard: Shard, index: Index, span: Span, rows: Rows, present: Booleans, decoders: int
    ) -> None:
        """Read and decode the image files of a span, except those whose pixels are cached."""
        assert index.labels is not None
        rows.labels[span.rows] = index.labels[span.start : span.stop]
        wanted = np.ones(span.stop - span.start, dtype=bool)
        if self._pixels is not None:
            wanted = ~self._pixels.read(shard, span.start, rows.images[span.rows])
        for start, stop in runs(wanted):
            records = self._records(shard, index, span.part(span.start + start, span.start + stop))
            in_parallel(
                lambda some: self._decode(shard, index, span, some, rows, present),
                in_portions(records, DECODED),
                decoders,
                "decoder",
            )

    def _decode(
        self,
        shard: Shard,
        index: Index,
        span: Span,
        records: Sequence[tuple[int, bytes]],
        rows: Rows,
        present: Booleans,
    ) -> None:
        """Check and decode consecutive image files, and keep their pixels."""
        channels, height, width = self.image_shape
        fit, intact = self._manifest.fit, list[tuple[int, bytes]]()
        for number, content in records:
            try:
                intact.append((number, self._checked(shard, index, number, content)))
            except (ObjectNotFound, ObjectTooShort, DamagedData) as error:
                self._skip(error, rows, present, span.part(number, number + 1).rows)
        found = images.decode_all(
            [content for _, content in intact],
            channels,
            (height, width) if fit else None,
            fit or "crop",
        )
        first, done = records[0][0], np.zeros(len(records), dtype=bool)
        for (number, _), pixels in zip(intact, found, strict=True):
            to = span.part(number, number + 1).rows
            if not isinstance(pixels, images.BadImage) and pixels.shape != (
                height,
                width,
                channels,
            ):
                pixels = images.BadImage(
                    f"it is {pixels.shape[1]} x {pixels.shape[0]}, but images here are {width} x"
                    f" {height}"
                )
            if isinstance(pixels, images.BadImage):
                self._skip(self._unusable(shard, index, number, pixels), rows, present, to)
            else:
                rows.images[to] = pixels.transpose(2, 0, 1)
                done[number - first] = True
        if self._pixels is not None:
            for start, stop in runs(done):
                part = span.part(first + start, first + stop)
                self._pixels.write(shard, part.start, rows.images[part.rows])

    def _checked(self, shard: Shard, index: Index, number: int, content: bytes) -> bytes:
        """The content of a record, read again if it does not match its checksum."""
        if checksum(content) == index.checksum[number]:
            return content
        return self._reread(shard, index, number, content)

    def _unusable(
        self, shard: Shard, index: Index, number: int, error: ValueError | UserError
    ) -> DamagedData:
        key = f" ({index.keys[number]})" if index.keys and index.labels is not None else ""
        return DamagedData(f"{self._url(shard)}: record {number}{key} cannot be used: {error}")

    def _reread(self, shard: Shard, index: Index, record: int, content: bytes) -> bytes:
        """Read a record again that was altered on the network or in the cache."""
        if self._cache is not None:
            self._cache.drop(shard.sha256)
        storage, key = self.locate(shard)
        offset, size = int(index.offset[record]), int(index.size[record])
        for attempt in rereads(storage.is_remote):
            if attempt > 1:
                content = storage.read_range(key, offset, size)
            if (actual := checksum(content)) == index.checksum[record]:
                logger.warning(
                    "%s: record %d arrived altered, and intact when read again",
                    self._url(shard),
                    record,
                )
                return content
        raise DamagedData(
            f"{self._url(shard)} is damaged: record {record} (byte {offset}, {size} bytes) has"
            f" checksum {actual}, its index says {index.checksum[record]}; {REMEDY}"
        )

    def _block(self, content: bytes) -> tuple[Images, Integers]:
        """A record's images ``(n, channels, height, width)`` and labels ``(n,)``."""
        members = tar.slices(memoryview(content))
        block, labels = images.array(members["images.npy"]), images.array(members["labels.npy"])
        if (
            block.dtype != np.uint8
            or block.shape != (len(labels), *self.image_shape)
            or labels.dtype != np.int64
        ):
            raise images.BadImage(
                f"it holds {block.dtype} of shape {block.shape}, but images here are"
                f" {self.image_shape}"
            )
        return block, labels

    def _skip(self, error: UserError, rows: Rows, present: Booleans, missing: slice) -> None:
        """Skip the samples of some rows. Raises ``error``, or UserError if they are too many."""
        if not self._max_skipped:
            raise error
        with self._skipping:
            known = len(self._skipped)
            self._skipped.update(rows.samples[missing].tolist())
            count = len(self._skipped)
        present[missing] = False
        if count > self._max_skipped:
            raise UserError(
                f"{error}; with it {count} samples cannot be read, and"
                f" dataset.max_skipped={self._max_skipped}"
            )
        if count > known:
            logger.warning(
                "skipped %d samples (%d so far, at most %d): %s",
                count - known,
                count,
                self._max_skipped,
                error,
            )

    def locate(self, shard: Shard) -> tuple[Storage, str]:
        """The storage and the key of a shard."""
        if "://" not in shard.name and not shard.name.startswith("/"):
            return self._storage, shard.name
        folder, _, key = shard.name.rpartition("/")
        return self._elsewhere(folder), (
            urllib.parse.unquote(key) if folder.startswith("http") else key
        )

    def _url(self, shard: Shard) -> str:
        storage, key = self.locate(shard)
        return f"{storage.url}/{key}"


def substitute(rows: Rows, present: Booleans, group: slice) -> None:
    """Replace each skipped sample of a group by the group's next sample that could be read.

    All batches keep their size. The choice depends on the group alone, so it is the same for any
    number of ranks. Raises ``UserError`` if no sample of the group could be read.
    """
    good = np.flatnonzero(present[group])
    bad = np.flatnonzero(~present[group])
    if not len(good):
        raise UserError(
            f"none of the {len(bad)} samples that are shuffled together can be read; see the log"
            " for why"
        )
    source = good[np.searchsorted(good, bad) % len(good)]
    for column in (rows.images[group], rows.labels[group], rows.samples[group]):
        column[bad] = column[source]


def runs(true: Booleans) -> list[tuple[int, int]]:
    """The first and last + 1 places of each run of True."""
    edges = np.flatnonzero(np.diff(true, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def in_portions(
    records: Iterator[tuple[int, bytes]], size: int
) -> Iterator[list[tuple[int, bytes]]]:
    """Up to ``size`` records at a time."""
    while portion := list(islice(records, size)):
        yield portion
