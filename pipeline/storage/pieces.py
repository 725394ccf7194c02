"""Streams of bytes in pieces, as storage yields them."""

import hashlib
from collections.abc import Iterator


class Pieces:
    """A stream as a file that is read from front to end."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """The next ``size`` bytes; fewer only at the end."""
        parts = [self._rest[:size]]
        self._rest, missing = self._rest[size:], size - len(parts[0])
        while missing:
            piece = memoryview(next(self._pieces, b""))
            if not piece:
                break
            parts.append(piece[:missing])
            self._rest, missing = piece[missing:], missing - len(parts[-1])
        return b"".join(parts)


class Counted(Iterator[bytes]):
    """The same pieces, with the size and the sha256 of those yielded so far."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._content = pieces, hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._content.hexdigest()

    def __next__(self) -> bytes:
        piece = next(self._pieces)
        self._content.update(piece)
        self.size += len(piece)
        return piece

    def finish(self) -> None:
        """Consume the rest."""
        for _ in self:
            pass
