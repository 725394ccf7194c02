"""A local cache of shards: bounded in bytes, shared by all processes of a machine, and never in the
way.

A file is named for the sha256 of the shard that it holds, so that data sets cannot be confused and
a shard that changes is another file. It takes that name only when all of it is there and has that
sha256. Before a shard is fetched its room is set aside, and what was used longest ago makes way. A
full disk, or a shard larger than the cache, is read past it.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.config.sections import DatasetOptions
from pipeline.errors import DamagedData
from pipeline.storage.base import PARTIAL, PIECE, Storage
from pipeline.storage.pieces import Counted

logger = logging.getLogger(__name__)

NUM_LOCKS = 256
"""One shard is fetched by one process at a time; those that share a lock wait for each other."""


def open_cache(dataset: DatasetOptions) -> "ShardCache | None":
    """The cache that the configuration asks for."""
    return ShardCache(Path(dataset.cache), int(dataset.cache_gb * 1e9)) if dataset.cache else None


@dataclass(frozen=True)
class ShardCache:
    """A folder for shards. Small and picklable; every process makes its own for the same folder.

    ``max_bytes`` bounds the files in the folder, those being fetched too. Files that are deleted
    while they are read are read to the end.
    """

    folder: Path
    max_bytes: int

    def stream(
        self, storage: Storage, key: str, size: int, sha256: str, start: int, length: int
    ) -> Iterator[bytes]:
        """Bytes of the shard ``key`` of ``storage``, whose size in bytes and sha256 are known, from
        the cache if it can be.

        Raises ``DamagedData`` if the shard in storage is another one, and as ``storage.stream``
        does.
        """
        path = self.folder / sha256
        for _ in range(3):  # it may make way for another as soon as it is there
            with suppress(OSError), path.open("rb", buffering=0) as file:
                os.utime(file.fileno())  # used last
                file.seek(start)
                while piece := file.read(min(length, PIECE)):
                    start, length = start + len(piece), length - len(piece)
                    yield piece
                if not length:
                    return
            if not self._fetch(storage, key, size, sha256):
                break
        yield from storage.stream(key, start, length)

    def drop(self, sha256: str) -> None:
        """Forget a shard whose local copy went bad."""
        with suppress(OSError):
            (self.folder / sha256).unlink()

    def _fetch(self, storage: Storage, key: str, size: int, sha256: str) -> bool:
        """Whether the shard is in the cache now."""
        if size > self.max_bytes:
            return False
        path, partial = self.folder / sha256, self.folder / f"{PARTIAL}{sha256}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(sha256):
                if path.exists():
                    return True  # another process was faster
                try:
                    with self._room(partial, size) as file:
                        _download(file, storage, key, size, sha256)
                    with self._locked(
                        "room"
                    ):  # whoever counts what is taken finds it under one name or the other
                        os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            return True
        except OSError as error:
            logger.warning(
                "the cache %s cannot take %s/%s (%s); reading past it",
                self.folder,
                storage.url,
                key,
                error.strerror,
            )
            return False

    @contextmanager
    def _room(self, partial: Path, size: int) -> Iterator[BinaryIO]:
        """A file of ``size`` bytes on disk, which others count as taken, after the oldest made way
        for it.
        """
        with self._locked("room"):
            files = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if entry.name.startswith(PARTIAL) and self._abandoned(
                        entry.name.removeprefix(PARTIAL)
                    ):
                        os.unlink(entry.path)
                    elif not entry.name.startswith("lock-") and entry.path != str(partial):
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            excess = sum(taken for _, taken, _ in files) + size - self.max_bytes
            for _, taken, path in sorted(files):
                if excess <= 0:
                    break
                if not os.path.basename(path).startswith(PARTIAL):  # being fetched
                    Path(path).unlink(missing_ok=True)
                    excess -= taken
            if excess > 0:
                raise OSError(errno.ENOSPC, "the rest of it is being fetched right now")
            file = partial.open("wb")
            try:
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now
                else:
                    file.truncate(size)
            except OSError:
                file.close()
                raise
        with file:
            yield file

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock that all processes and threads know, and that goes with its holder, however
        that ends.
        """
        with self._lock_file(name).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _abandoned(self, sha256: str) -> bool:
        """Whether nobody is fetching that shard any more: whoever did was killed."""
        with self._lock_file(sha256).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

    def _lock_file(self, name: str) -> Path:
        number = name if name == "room" else f"{int(name[:8], 16) % NUM_LOCKS:03d}"
        return self.folder / f"lock-{number}"


def _download(file: BinaryIO, storage: Storage, key: str, size: int, sha256: str) -> None:
    """Write a whole shard from ``storage``, held to its size and sha256."""
    for attempt in (1, 2):  # what was altered on its way comes whole the second time
        file.seek(0)
        passing = Counted(storage.stream(key))
        for piece in passing:
            if passing.size <= size:
                file.write(piece)
        if (passing.size, passing.sha256) == (size, sha256):
            return
        found = (
            f"it has {passing.size} bytes and sha256 {passing.sha256}, the manifest says {size}"
            f" bytes and {sha256}"
        )
        logger.warning("%s/%s, attempt %d: %s", storage.url, key, attempt, found)
    raise DamagedData(f"{storage.url}/{key} is damaged: {found}")
