"""Objects as files of a local folder."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pipeline.errors import UserError
from pipeline.storage.base import (
    PARTIAL,
    PIECE,
    Entry,
    ObjectNotFound,
    Storage,
    Unavailable,
    atomic_file,
    sweep,
    too_short,
)

TEMPORARY = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO),
    *(errno.ENOLCK, errno.EMFILE, errno.ENFILE),
}
"""Errors that may pass: the disk is full, or a network file system does not answer."""


class Kind(Enum):
    """What a name in a folder stands for; the values are for people."""

    file = "file"
    broken_link = "broken link"
    loop = "link to a folder that it lies in"
    special = "not a regular file"


@dataclass(frozen=True, slots=True)
class Found:
    """A name that ``walk`` came upon."""

    path: Path
    kind: Kind
    size: int = 0  # in bytes
    changed: int = 0  # ns


def walk(folder: Path, ancestors: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Found]:
    """All names below a folder but those of folders, in any order. Links are followed.

    A folder that does not exist is empty. Raises OSError if a folder cannot be listed: passing over
    it would lose what it holds.
    """
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except FileNotFoundError:  # or deleted in the meantime
        return
    ancestors |= {(status.st_dev, status.st_ino)}
    for entry in entries:
        path = folder / entry.name
        try:
            status = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink():
                yield Found(path, Kind.broken_link)
            continue
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            yield Found(path, Kind.broken_link)
            continue
        if stat.S_ISREG(status.st_mode):
            yield Found(path, Kind.file, status.st_size, status.st_mtime_ns)
        elif not stat.S_ISDIR(status.st_mode):
            yield Found(path, Kind.special)
        elif (status.st_dev, status.st_ino) in ancestors:
            yield Found(path, Kind.loop)
        else:
            yield from walk(path, ancestors)


@dataclass(frozen=True)
class FolderStorage(Storage):
    """Objects as files of a local folder."""

    is_remote: ClassVar[bool] = False
    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def child(self, prefix: str) -> "FolderStorage":
        return FolderStorage(self._path(prefix))

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self._explained(key), self._path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            stop, position = size if length is None else start + length, start
            file.seek(start)
            while position < stop:
                piece = file.read(min(stop - position, PIECE)) if stop <= size else b""
                if not piece:
                    raise too_short(f"{self.url}/{key}", start, stop, size)
                position += len(piece)
                yield piece

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key), atomic_file(self._path(key)) as file:
            file.write(data)

    def create(self, key: str, data: bytes) -> bool:
        with self._explained(key):
            try:
                with atomic_file(self._path(key), replace=False) as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._explained(key), atomic_file(self._path(key)) as file:
            shutil.copyfileobj(source, file)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with self._explained(prefix):
            for found in walk(self._path(prefix)):
                if found.path.name.startswith(PARTIAL):
                    sweep(found.path, found.changed / 1e9)
                elif found.kind is Kind.file:
                    key = found.path.relative_to(self.root).as_posix()
                    yield Entry(key, found.size, str(found.changed))

    def entry(self, key: str) -> Entry:
        path = self._path(key)
        with self._explained(key):
            if not path.is_file():
                raise ObjectNotFound(f"there is no {self.url}/{key}")
            status = path.stat()
        return Entry(key, status.st_size, str(status.st_mtime_ns))

    def exists(self, key: str) -> bool:
        with self._explained(key):
            return self._path(key).is_file()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with self._explained(key):
                path.unlink(missing_ok=True)
            *folders, _ = path.relative_to(self.root).parents  # the last is the root itself
            with suppress(OSError):  # a folder that is not empty stays
                for folder in folders:
                    (self.root / folder).rmdir()

    def _path(self, key: str) -> Path:
        # Keys may come from a manifest that someone else wrote; none may lead out of the folder.
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{key!r} is not a key in {self.url}: it leads out of it")
        return self.root / parts

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn the OSErrors of a block into UserErrors that name the object."""
        try:
            yield
        except FileNotFoundError:
            raise ObjectNotFound(f"there is no {self.url}/{key}") from None
        except OSError as error:
            kind = Unavailable if error.errno in TEMPORARY else UserError
            raise kind(f"cannot use {self.url}/{key}: {error.strerror or error}") from error
