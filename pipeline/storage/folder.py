"""Objects as files of a local folder."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError
from pipeline.storage.base import (
    PARTIAL,
    PIECE,
    ObjectNotFound,
    Storage,
    Unavailable,
    atomic_file,
    too_short,
)


@dataclass(frozen=True)
class FolderStorage(Storage):
    """Objects as files of a local folder."""

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

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._explained(key), atomic_file(self._path(key)) as file:
            shutil.copyfileobj(source, file)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        with self._explained(prefix):
            for folder, _, names in os.walk(self._path(prefix)):
                for name in names:
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # deleted in the meantime
                        if not name.startswith(PARTIAL):
                            found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

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
            kind = (
                Unavailable
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
                else UserError
            )
            raise kind(f"cannot use {self.url}/{key}: {error.strerror or error}") from error
