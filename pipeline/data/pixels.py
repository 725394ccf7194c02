"""Decoded and resized images in the local cache, so that later epochs decode nothing.

Each shard of image files has one file of pixels. It is named after the sha256 of the shard and of
the way of decoding, so another size, fit or library version is another file. It holds a checksum
for each sample, zeros where the sample was not decoded yet, and then the samples' pixels. Threads
and processes write samples in any order without a lock: two that write the same sample write the
same bytes, and a sample that is cut short, or damaged later, does not match its checksum and is
decoded again.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.data import images
from pipeline.data.cache import ShardCache
from pipeline.data.manifest import Manifest
from pipeline.data.records import Shard

logger = logging.getLogger(__name__)

DIGEST = 16
"""Bytes of a checksum, XXH3 with 128 bits."""
ABSENT = bytes(DIGEST)
INDEX = 200
"""Bytes of a sample in its shard's index, about, which the cache keeps as well."""
PIECE = 1 << 20
"""Bytes of pixels that are read at a time: they are still in the processor's cache when they are
checked.
"""


@dataclass(frozen=True)
class PixelCache:
    """The pixels of a data set's shards, in the folder of a ``ShardCache``."""

    cache: ShardCache
    decoding: str
    """16 hexadecimal digits, which stand for how files become pixels."""
    sample_bytes: int

    @classmethod
    def open(cls, cache: ShardCache | None, manifest: Manifest) -> "PixelCache | None":
        """The cache for a data set; None if its records are pixels already, or all its pixels do
        not fit into the cache. Then the cache holds the shards as they are.
        """
        if cache is None or manifest.encoding != "image":
            return None
        sample_bytes = int(np.prod(manifest.image_shape))
        total = sum(manifest.num_samples(split) for split in manifest.splits)
        if total * (sample_bytes + DIGEST + INDEX) > cache.max_bytes:
            return None
        decoding = [manifest.image_shape, manifest.fit, images.METHOD, images.FILTER]
        stated = json.dumps([*decoding, images.library()]).encode()
        return cls(cache, hashlib.sha256(stated).hexdigest()[:16], sample_bytes)

    def read(self, shard: Shard, start: int, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Fill ``rows``, ``(n, channels, height, width)``, with the samples from ``start``.

        Returns which of them were there, and intact.
        """
        found = np.zeros(len(rows), dtype=bool)
        path = self.cache.folder / self._name(shard)
        with suppress(OSError), path.open("rb", buffering=0) as file:
            number = file.fileno()
            if os.fstat(number).st_size != self._size(shard):
                path.unlink(missing_ok=True)
                return found
            os.utime(number)  # most recently used
            checksums = os.pread(number, DIGEST * len(rows), DIGEST * start)
            step = max(1, PIECE // self.sample_bytes)
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                expected = [
                    checksums[DIGEST * place : DIGEST * (place + 1)]
                    for place in range(first, first + len(part))
                ]
                if all(each == ABSENT for each in expected):
                    continue
                os.preadv(number, [part.reshape(-1).data], self._offset(shard, start + first))
                for place, (pixels, each) in enumerate(zip(part, expected, strict=True), first):
                    found[place] = xxhash.xxh3_128_digest(pixels) == each
        return found

    def write(self, shard: Shard, start: int, rows: npt.NDArray[np.uint8]) -> None:
        """Keep the samples from ``start``; a full disk is logged, and they are not kept."""
        path = self.cache.folder / self._name(shard)
        try:
            if not path.exists():
                self.cache.reserve(path.name, self._size(shard))
            with path.open("r+b", buffering=0) as file:
                number = file.fileno()
                os.pwrite(number, rows.reshape(-1).data, self._offset(shard, start))
                checksums = b"".join(xxhash.xxh3_128_digest(pixels) for pixels in rows)
                os.pwrite(number, checksums, DIGEST * start)
        except FileNotFoundError:
            pass  # another shard evicted it
        except OSError as error:
            logger.warning(
                "the cache %s cannot keep the pixels of %s (%s); they will be decoded again",
                self.cache.folder,
                shard.name,
                error.strerror,
            )

    def _name(self, shard: Shard) -> str:
        return f"{shard.sha256}-{self.decoding}.pixels"

    def _size(self, shard: Shard) -> int:
        return shard.num_samples * (DIGEST + self.sample_bytes)

    def _offset(self, shard: Shard, sample: int) -> int:
        return shard.num_samples * DIGEST + sample * self.sample_bytes
