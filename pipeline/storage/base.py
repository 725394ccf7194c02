"""Objects in ``s3://bucket/prefix`` or in a folder: everything that is kept is read and written
through here.

A key is a relative path with forward slashes (``train/00000.tar``). Writing is atomic: a reader
sees the old object or the new one, never a part. A read that is cut, stalls, drips or meets a
server that is busy, failing or restarting goes on from the byte reached; what ends in failure is a
``UserError`` that names the object and the cause. ``https://`` is for reading only: other people's
shards.
"""

import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

PIECE = 256 * 1024
"""Bytes that are passed on at once, at most."""


PARTIAL = ".partial-"
"""Begins the names of local files that are not complete yet."""


class ObjectNotFound(UserError):
    """There is no object of this key."""


class ObjectTooShort(UserError):
    """The object ends before the bytes that were wanted."""


class Unavailable(UserError):
    """The storage does not answer, is overloaded, or has no room: the same request may succeed
    later.
    """


class Storage(ABC):
    """A place that holds objects by key. Small, immutable and picklable: pass it to workers as it
    is.

    Every method raises ``UserError`` if the place cannot be used.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, without a slash at the end."""

    @abstractmethod
    def child(self, prefix: str) -> "Storage":
        """The storage at ``url/prefix``."""

    def elsewhere(self, url: str) -> "Storage":
        """The storage at another address, at the same S3 endpoint if this one has one."""
        from pipeline.storage import open_storage

        return open_storage(url)

    @abstractmethod
    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """``length`` bytes of an object from byte ``start``, in pieces; without ``length`` all that
        follow.

        Raises ``ObjectNotFound`` and ``ObjectTooShort``, while iterating.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object, atomically."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Make or replace an object from a local file, atomically."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The size in bytes of every object below ``prefix`` (a folder's name), by key, in the
        order of keys.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are none of our worries."""

    def read(self, key: str) -> bytes:
        """All of an object. Raises ``ObjectNotFound``."""
        return b"".join(self.stream(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start``. Raises ``ObjectNotFound``, and ``ObjectTooShort``
        if the object ends before.
        """
        return b"".join(self.stream(key, start, length))

    def download(self, key: str, path: Path) -> None:
        """Make or replace a local file from an object, atomically. Raises ``ObjectNotFound``."""
        try:
            with atomic_file(path) as file:
                for piece in self.stream(key):
                    file.write(piece)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def list(self, prefix: str = "") -> list[str]:
        """The keys of all objects below ``prefix`` (a folder's name), sorted."""
        return list(self.sizes(prefix))

    def read_json(self, key: str) -> Any:
        """An object's JSON value. Raises ``ObjectNotFound``, or ``UserError`` if it is no JSON."""
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise UserError(f"{self.url}/{key} is damaged: it is not JSON ({error})") from None

    def write_json(self, key: str, value: Any) -> None:
        """Write a value as JSON."""
        self.write(key, json.dumps(value, indent=1).encode() + b"\n")


def too_short(url: str, start: int, stop: int, size: int | str) -> UserError:
    return ObjectTooShort(
        f"{url} is cut short: bytes {start} to {stop} were wanted, but it has only {size}"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the name ``path`` only when the block has ended well and
    its bytes are on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
