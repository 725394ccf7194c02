"""A local cache of shards or their pixels, bounded in bytes, shared by all processes of a machine.

It is a sub-folder that the cache makes, and of the files there it counts and deletes only those
whose names it gives. Each file of a shard, or of its index, is named after the sha256 of what it
keeps, so that data sets cannot be confused and a changed shard is another file. It takes that name
only when it is complete and its sha256 is verified. Space is reserved before a shard is fetched, by
deleting the least recently used files. If the disk is full or a shard is larger than the cache, the
shard is read from storage instead. ``pixels.py`` keeps what image files were decoded to.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.config.sections import DatasetOptions
from pipeline.errors import DamagedData, UserError
from pipeline.storage.base import PARTIAL, PIECE, Storage
from pipeline.storage.folder import TEMPORARY
from pipeline.storage.pieces import Counted
from pipeline.storage.resume import rereads

logger = logging.getLogger(__name__)

SUBFOLDER = "vlae-cache"
"""Below the folder in the options: whatever else is there is not the cache's."""
NAME = re.compile(rf"({re.escape(PARTIAL)})?[0-9a-f]{{64}}(-[0-9a-f]{{16}}\.pixels)?")
"""The names that the cache gives: a shard or index, its pixels, and each while it is made."""
NUM_LOCKS = 256
"""Locks of a cache. Two shards that share one are not fetched at the same time."""


def open_cache(dataset: DatasetOptions) -> "ShardCache | None":
    """The cache in the options, if any.

    Raises ``UserError`` if this machine can have no cache there. A full disk, or another error that
    may pass, is no such reason.
    """
    if not dataset.cache:
        return None
    folder = Path(dataset.cache, SUBFOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno not in TEMPORARY:
            raise UserError(
                f"dataset.cache={dataset.cache}: no files can be kept in {folder}"
                f" ({error.strerror}); name a folder that every worker can write to"
            ) from None
    return ShardCache(folder, int(dataset.cache_gb * 1e9))


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards. Small and picklable; any number of processes may use the same folder.

    ``max_bytes`` bounds the files in the folder, including those being fetched. A file that is
    deleted while it is being read is still read to the end.
    """

    folder: Path
    max_bytes: int

    def stream(
        self, storage: Storage, key: str, size: int, sha256: str, start: int, length: int
    ) -> Iterator[bytes]:
        """``length`` bytes of a shard from byte ``start``, from the cache if possible.

        The shard is ``key`` of ``storage``, with ``size`` bytes and the given sha256. Raises
        ``DamagedData`` if the shard in storage has another, and as ``storage.stream`` does.
        """
        path = self.folder / sha256
        for _ in range(3):  # another shard may evict it as soon as it is there
            with suppress(OSError), path.open("rb", buffering=0) as file:
                os.utime(file.fileno())  # most recently used
                file.seek(start)
                while piece := file.read(min(length, PIECE)):
                    start, length = start + len(piece), length - len(piece)
                    yield piece
                if not length:
                    return
            if not self._add(
                sha256,
                f"{storage.url}/{key}",
                size,
                lambda file: _download(file, storage, key, size, sha256),
            ):
                break
        yield from storage.stream(key, start, length)

    def reserve(self, name: str, size: int) -> None:
        """Make a file of ``size`` zeros, unless it is there, for which others make way.

        Raises ``OSError`` if there is no room.
        """
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, "it is larger than the cache")
        path, partial = self.folder / name, self.folder / f"{PARTIAL}{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(name):
            if not path.exists():
                with self._room(partial, size):
                    pass
                self._publish(partial, path)

    def drop(self, sha256: str) -> None:
        """Delete a shard whose local copy is damaged."""
        with suppress(OSError):
            (self.folder / sha256).unlink()

    def kept(self, sha256: str, url: str, read: Callable[[], bytes]) -> bytes:
        """The small object at ``url``: from the cache, else what ``read`` returns, which is kept.

        ``read`` answers for its sha256.
        """
        path = self.folder / sha256
        with suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                os.utime(path)  # most recently used
                return content
            path.unlink()
        content = read()
        self._add(sha256, url, len(content), lambda file: file.write(content))
        return content

    def _add(self, sha256: str, url: str, size: int, write: Callable[[BinaryIO], object]) -> bool:
        """Add the object at ``url`` unless it is there. Returns whether it is in the cache now.

        ``write`` writes its ``size`` bytes to a file, and answers for their sha256.
        """
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
                        write(file)
                    self._publish(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            return True
        except OSError as error:
            logger.warning(
                "the cache %s cannot take %s (%s); reading it from storage",
                self.folder,
                url,
                error.strerror,
            )
            return False

    @contextmanager
    def _room(self, partial: Path, size: int) -> Iterator[BinaryIO]:
        """A new file of ``size`` bytes, for which the least recently used files were deleted.

        Its space is allocated, so that other processes count it as taken.
        """
        with self._locked("room"):
            files = []
            for entry in os.scandir(self.folder):
                if not NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):
                    if entry.name.startswith(PARTIAL) and self._abandoned(
                        entry.name.removeprefix(PARTIAL)
                    ):
                        os.unlink(entry.path)
                    elif entry.path != str(partial):
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

    def _publish(self, partial: Path, path: Path) -> None:
        # Locked, so that whoever adds up the files finds it under exactly one name.
        with self._locked("room"):
            os.replace(partial, path)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock against all processes and threads; it is released however its holder ends."""
        with self._lock_file(name).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _abandoned(self, name: str) -> bool:
        """Whether the process that was making that file was killed."""
        with self._lock_file(name).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

    def _lock_file(self, name: str) -> Path:
        number = name if name == "room" else f"{int(name[:8], 16) % NUM_LOCKS:03d}"
        return self.folder / f"lock-{number}"


def _download(file: BinaryIO, storage: Storage, key: str, size: int, sha256: str) -> None:
    """Write a whole shard to ``file``, and verify its size and sha256. Raises ``DamagedData``."""
    for attempt in rereads(storage.is_remote):
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
