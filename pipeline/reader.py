"""Samples of one split from its shards: fetched, checked, decoded and put where they belong, several shards at a time."""

import hashlib
import logging
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline import images, tar
from pipeline.cache import ShardCache
from pipeline.errors import DamagedData, UserError
from pipeline.manifest import Index, Integers, Manifest, Shard
from pipeline.storage import ObjectNotFound, ObjectTooShort, Storage, open_storage

logger = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]
Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8  # reads under way at once: one connection to object storage gives a tenth of what a network card takes
REMEDY = "delete manifest.json there and run again the command that made it, vlae shard or vlae index"


@dataclass(frozen=True)
class Rows:
    """Room for samples."""

    images: torch.Tensor  # uint8 (num_rows, channels, height, width); page-locked if there is a GPU to copy them to
    labels: torch.Tensor  # int64 (num_rows,)
    samples: Integers  # (num_rows,): each one's number in its split

    @classmethod
    def of(cls, num_rows: int, image_shape: tuple[int, int, int]) -> "Rows":
        pinned = torch.cuda.is_available()
        return cls(
            torch.empty((num_rows, *image_shape), dtype=torch.uint8, pin_memory=pinned),
            torch.empty(num_rows, dtype=torch.int64, pin_memory=pinned),
            np.empty(num_rows, dtype=np.int64),
        )


class Reader:
    """Reads runs of samples of one split from its shards, and checks them.

    ``max_skipped`` is how many samples that are damaged or missing may be passed over, in all, by this reader; each is
    logged, and none is by default. Safe for threads.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, split: str, cache: ShardCache | None = None, max_skipped: int = 0
    ) -> None:
        self.shards = manifest.shards(split)
        self.sizes = manifest.shard_samples(split)  # (num_shards,)
        self.image_shape = manifest.image_shape
        self.image_bytes = int(np.prod(manifest.image_shape))
        self._storage, self._cache, self._manifest = storage, cache, manifest
        self._max_skipped, self._skipped, self._skipping = max_skipped, set[int](), threading.Lock()
        self._first_samples = np.concatenate([[0], np.cumsum(self.sizes)])  # (num_shards + 1,)
        self._index = lru_cache(maxsize=64)(lambda shard: Index.load(storage, shard))
        self._elsewhere = lru_cache(maxsize=16)(lambda url: open_storage(url, getattr(storage, "endpoint_url", None)))

    @property
    def num_skipped(self) -> int:
        """How many samples were passed over so far."""
        return len(self._skipped)

    def fill(self, rows: Rows, groups: Sequence[tuple[Integers, Integers]]) -> Booleans:
        """Put the samples of every group into ``rows``. Returns which rows hold one now: all, unless some were skipped.

        A group is segments, rows of (shard, first sample, last sample + 1), and for each sample of them, laid end to end,
        the row where it goes. Each segment costs one ranged read, whatever the number of records.
        """
        runs = []
        for segments, places in groups:
            done = 0
            for number, start, stop in segments.tolist():
                runs.append((number, start, stop, places[done : done + stop - start]))
                done += stop - start
        present = np.ones(len(rows.samples), dtype=bool)
        decoders = max(1, THREADS // max(1, len(runs)))

        def read(run: tuple[int, int, int, Integers]) -> None:
            number, start, stop, places = run
            rows.samples[places] = self._first_samples[number] + np.arange(start, stop)
            try:
                self._read(rows, present, number, start, stop, places, decoders)
            except (ObjectNotFound, ObjectTooShort, DamagedData) as error:
                self._skip(error, rows.samples[places], present, places)

        in_parallel(read, runs, THREADS)
        return present

    def _read(self, rows: Rows, present: Booleans, number: int, start: int, stop: int, places: Integers, decoders: int) -> None:
        shard = self.shards[number]
        try:
            index = self._index(shard)
            first = int(np.searchsorted(index.starts, start, side="right")) - 1
            last = int(np.searchsorted(index.starts, stop, side="left"))
            begin, end = int(index.offset[first]), int(index.offset[last - 1] + index.size[last - 1])
            data = memoryview(self._fetch(shard, begin, end - begin))
        except ObjectNotFound as error:
            raise ObjectNotFound(
                f"{error}, though the manifest of {self._storage.url} lists it ({shard.size} bytes); {REMEDY}"
            ) from None
        target_images, target_labels = rows.images.numpy(), rows.labels.numpy()

        def record(number: int) -> None:
            offset, size = int(index.offset[number]), int(index.size[number])
            before, after = max(start - int(index.starts[number]), 0), stop - int(index.starts[number])
            to = places[int(index.starts[number]) + before - start : int(index.starts[number + 1]) - start]
            try:
                content = data[offset - begin : offset - begin + size]
                if hashlib.sha256(content).hexdigest() != index.sha256[number]:
                    content = self._again(shard, index, number)
                if index.labels is not None:
                    target_images[to[0]] = self._image(content).transpose(2, 0, 1)
                    target_labels[to[0]] = index.labels[number]
                else:
                    block, labels = self._block(content)
                    target_images[to], target_labels[to] = block[before:after], labels[before:after]
            except (ObjectNotFound, ObjectTooShort, DamagedData) as error:
                self._skip(error, rows.samples[to], present, to)
            except (images.BadImage, tar.BadTar) as error:
                key = f" ({index.keys[number]})" if index.keys else ""
                damage = DamagedData(f"{self._url(shard)}: record {number}{key} cannot be used: {error}")
                self._skip(damage, rows.samples[to], present, to)

        in_parallel(record, range(first, last), decoders if index.labels is not None else 1)

    def _fetch(self, shard: Shard, start: int, length: int) -> bytes:
        storage, key = self.place(shard)
        if self._cache is not None:
            return self._cache.read_range(storage, key, shard.size, shard.sha256, start, length)
        return storage.read_range(key, start, length)

    def _again(self, shard: Shard, index: Index, record: int) -> memoryview:
        """A record that did not have its sha256: what was altered on its way, or in the cache, comes whole now."""
        if self._cache is not None:
            self._cache.drop(shard.sha256)
        storage, key = self.place(shard)
        offset, size = int(index.offset[record]), int(index.size[record])
        content = memoryview(storage.read_range(key, offset, size))
        actual = hashlib.sha256(content).hexdigest()
        if actual != index.sha256[record]:
            raise DamagedData(
                f"{self._url(shard)} is damaged: record {record} (byte {offset}, {size} bytes) has sha256 {actual}, "
                f"its index says {index.sha256[record]}; {REMEDY}"
            )
        logger.warning("%s: record %d came altered, and whole when it was read again", self._url(shard), record)
        return content

    def _block(self, content: memoryview) -> tuple[Images, Integers]:
        """A record's images ``(n, channels, height, width)`` and labels ``(n,)``."""
        members = tar.slices(content)
        block, labels = images.array(members["images.npy"]), images.array(members["labels.npy"])
        if block.dtype != np.uint8 or block.shape != (len(labels), *self.image_shape) or labels.dtype != np.int64:
            raise images.BadImage(f"it holds {block.dtype} of shape {block.shape}, but images here are {self.image_shape}")
        return block, labels

    def _image(self, content: memoryview) -> Images:
        """A record's pixels ``(height, width, channels)``."""
        channels, height, width = self.image_shape
        fit = self._manifest.fit
        pixels = images.decode(content, channels, (height, width) if fit else None, fit or "crop")
        if pixels.shape != (height, width, channels):
            raise images.BadImage(f"it is {pixels.shape[1]} x {pixels.shape[0]}, but images here are {width} x {height}")
        return pixels

    def _skip(self, error: UserError, samples: Integers, present: Booleans, places: Integers) -> None:
        """Pass over samples, if so many may be."""
        if not self._max_skipped:
            raise error
        with self._skipping:
            known = len(self._skipped)
            self._skipped.update(samples.tolist())
            count = len(self._skipped)
        present[places] = False
        if count > self._max_skipped:
            raise UserError(f"{error}; with it {count} samples cannot be read, and dataset.max_skipped={self._max_skipped}")
        if count > known:
            logger.warning("skipped %d samples (%d so far, at most %d): %s", count - known, count, self._max_skipped, error)

    def place(self, shard: Shard) -> tuple[Storage, str]:
        """Where a shard lies: its storage, and its key there."""
        if "://" not in shard.name and not shard.name.startswith("/"):
            return self._storage, shard.name
        folder, _, key = shard.name.rpartition("/")
        return self._elsewhere(folder), urllib.parse.unquote(key) if folder.startswith("http") else key

    def _url(self, shard: Shard) -> str:
        storage, key = self.place(shard)
        return f"{storage.url}/{key}"


def substitute(rows: Rows, present: Booleans, places: Integers) -> None:
    """Fill the rows of a group that were skipped with the group's next sample that could be read, for equal batches.

    ``places`` are the group's rows in the order of its samples, so that the choice is the same for every number of ranks.
    Raises ``UserError`` if none could be read.
    """
    good = np.flatnonzero(present[places])
    bad = np.flatnonzero(~present[places])
    if not len(good):
        raise UserError(f"none of the {len(places)} samples that are shuffled together can be read; see the log for why")
    to, source = places[bad], places[good[np.searchsorted(good, bad) % len(good)]]
    rows.images[to], rows.labels[to], rows.samples[to] = rows.images[source], rows.labels[source], rows.samples[source]


def in_parallel(function: Callable[[Item], Any], items: Sequence[Item], num_threads: int) -> None:
    """Call ``function`` with every item, on several threads at once; the first error is raised when all have stopped.

    The threads are daemons: a read that hangs does not keep the interpreter from ending.
    """
    if min(num_threads, len(items)) < 2:
        for item in items:
            function(item)
        return
    remaining, errors, turn = iter(items), list[BaseException](), threading.Lock()

    def work() -> None:
        while not errors:
            with turn:
                item = next(remaining, done)
            if item is done:
                return
            try:
                function(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001  (it belongs to the caller)
                errors.append(error)

    done = object()
    threads = [threading.Thread(target=work, name="loader", daemon=True) for _ in range(min(num_threads, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
