"""The interface of all storage: objects by key, in a bucket, in a folder or on the web.

A key is a relative path with forward slashes (``train/00000.tar``). Writes are atomic: a reader
sees the old object or the new one, never a part. A read resumes at the byte reached if the
connection is cut, stalls or becomes very slow, or if the server is busy, failing or restarting. A
final failure is a ``UserError`` that names the object and the cause. Web addresses (``https://``)
can only be read; they are for shards that other people publish.
"""

import fcntl
import json
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pipeline.errors import UserError

PIECE = 256 * 1024
"""Most bytes that a stream yields at once."""
PARTIAL = ".partial-"
"""Prefix of the names of incomplete local files."""
ABANDONED = 3600.0
"""Seconds without a change after which an incomplete file may be deleted."""


class ObjectNotFound(UserError):
    """There is no object with this key."""


class ObjectTooShort(UserError):
    """The object ends before the requested bytes."""


class Unavailable(UserError):
    """The storage does not answer, is overloaded or is full; the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object, as a listing shows it."""

    key: str
    size: int  # in bytes
    version: str
    """Another one after the object was written again: the time of the change, or the ETag."""


class Storage(ABC):
    """A place that holds objects by key.

    Instances are small, immutable and picklable, so they can be passed to workers. Every method
    raises UserError if the place cannot be used.
    """

    is_remote: ClassVar[bool] = True
    """Whether objects come over a network, on which something may alter them for a while."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Its address, without a slash at the end."""

    @abstractmethod
    def child(self, prefix: str) -> "Storage":
        """The storage at ``url/prefix``."""

    def elsewhere(self, url: str) -> "Storage":
        """The storage at another address, at the same S3 endpoint if this one has one."""
        from pipeline.storage import open_storage

        return open_storage(url)

    @abstractmethod
    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield ``length`` bytes of an object from byte ``start``; by default all to its end.

        Raises ObjectNotFound and ObjectTooShort while iterating.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object, atomically."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create an object, atomically; False if there is one, which stays as it is."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Create or replace an object from a local file, atomically."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below ``prefix`` (a folder's name), one by one, in any order."""

    @abstractmethod
    def entry(self, key: str) -> Entry:
        """One object, as a listing shows it. Raises ObjectNotFound."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object with this key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing keys are ignored."""

    def read(self, key: str) -> bytes:
        """The content of an object. Raises ObjectNotFound."""
        return b"".join(self.stream(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start``.

        Raises ObjectNotFound, and ObjectTooShort if the object ends before.
        """
        return b"".join(self.stream(key, start, length))

    def download(self, key: str, path: Path) -> None:
        """Create or replace a local file from an object, atomically. Raises ObjectNotFound."""
        try:
            with atomic_file(path) as file:
                for piece in self.stream(key):
                    file.write(piece)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The sizes in bytes of all objects below ``prefix`` (a folder's name), sorted by key."""
        return dict(sorted((entry.key, entry.size) for entry in self.entries(prefix)))

    def list(self, prefix: str = "") -> list[str]:
        """The keys of all objects below ``prefix`` (a folder's name), sorted."""
        return list(self.sizes(prefix))

    def read_json(self, key: str) -> Any:
        """An object's JSON value. Raises ObjectNotFound, and UserError if it is not JSON."""
        try:
            return json.loads(self.read(key))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.url}/{key} is damaged: it is not JSON ({error})") from None

    def write_json(self, key: str, value: Any) -> None:
        """Create or replace an object with a JSON value, atomically."""
        self.write(key, to_json(value))


def to_json(value: Any) -> bytes:
    """A JSON value as ``Storage.write_json`` writes it."""
    return json.dumps(value, indent=1).encode() + b"\n"


def too_short(url: str, start: int, stop: int, size: int | str) -> UserError:
    """The error of an object of ``size`` bytes that ends before byte ``stop``."""
    return ObjectTooShort(
        f"{url} is cut short: bytes {start} to {stop} were wanted, but it has only {size}"
    )


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """A binary file that is renamed to ``path`` when the block ends without an error.

    By then its content is on disk. If the block raises, nothing is left behind. Without ``replace``
    it raises FileExistsError if there is such a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # so that ``sweep`` knows that it is being written
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)
            partial.unlink()
        # The name is on disk, too, only when the folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(partial: Path, changed: float) -> None:
    """Delete an incomplete file that nobody writes any more: its process was killed.

    ``changed`` is the time of its last change, in seconds. A file younger than ``ABANDONED`` stays,
    since a network file system may not know the locks of other hosts.
    """
    if time.time() - changed < ABANDONED:
        return
    with suppress(OSError), partial.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink(missing_ok=True)
