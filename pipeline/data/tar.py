"""A strict tar reader: a truncated, altered or foreign file is an error, never a shorter archive.

The standard library's reader takes the first header that it cannot parse for the end of the
archive, and so does everything built on it. Formats: ustar, pax and GNU, as written by tar, Python
and webdataset.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

BLOCK = 512
"""Bytes."""
PIECE = 1 << 16
"""Bytes that are skipped at once."""
MAX_DIGITS = 20
"""Digits of a size or a length; more are damage."""
MAX_NAME = 1 << 16
"""Bytes of the longest extended header; of its fields, only names and sizes are used."""
ZEROS = bytes(BLOCK)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How the files of some compressors begin."""


class BadTar(ValueError):
    """The bytes are not a complete tar archive; the message says why."""


class Source(Protocol):
    """A stream that an archive is read from, front to end."""

    def read(self, size: int, /) -> bytes: ...


class Kind(Enum):
    """What a member is; the values are for people."""

    file = "file"
    hard_link = "hard link"
    link = "symbolic link"
    folder = "folder"
    special = "not a regular file"


FOLDERS_AND_LINKS = {
    b"1": Kind.hard_link,
    b"2": Kind.link,
    b"3": Kind.special,
    b"4": Kind.special,
    b"5": Kind.folder,
    b"6": Kind.special,
}
"""The type flags of members without content; all others are files, as POSIX asks."""


@dataclass(frozen=True)
class Member:
    """A member of an archive."""

    name: str
    offset: int  # of its content in the archive, in bytes
    size: int  # of its content, in bytes
    content: bytes  # empty where it was not wanted
    kind: Kind = Kind.file
    target: str = ""
    """Of a hard link, the name of another member; of a symbolic link, a path."""


def members(source: Source, max_size: int) -> Iterator[Member]:
    """All regular files of an archive, in their order, as ``entries`` reads them."""
    return (member for member in entries(source, max_size) if member.kind is Kind.file)


def entries(
    source: Source, max_size: int, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Member]:
    """All members of an archive, in their order; files whose names are ``wanted`` with content.

    Memory is bounded by the largest wanted file, which may have ``max_size`` bytes. Raises
    ``BadTar`` if the archive is cut anywhere, also between two members (a complete one ends in a
    block of zeros), a header is damaged, data follows the end, or a wanted file is too large.
    """
    offset, extended = 0, dict[str, str]()
    while True:
        header = source.read(BLOCK)
        if not offset:
            _check_uncompressed(header)
        if len(header) < BLOCK:
            raise _cut(offset + len(header))
        offset += BLOCK
        if header == ZEROS:
            _check_end(source, offset)
            return
        name, size, kind, target = _parse(header, offset - BLOCK)
        if kind in b"xgLK":
            if size > MAX_NAME:
                raise BadTar(f"the extended header at byte {offset} has {size} bytes")
            content = _padded(source, size, offset)
            offset += _round_up(size)
            if kind == b"x":
                extended |= _pax(content, offset)
            elif kind in b"LK":
                key = "path" if kind == b"L" else "linkpath"
                extended[key] = content.rstrip(b"\0").decode(errors="surrogateescape")
            continue
        name, target = extended.get("path", name), extended.get("linkpath", target)
        if "size" in extended:
            if not (extended["size"].isascii() and extended["size"].isdecimal()) or (
                len(extended["size"]) > MAX_DIGITS
            ):
                raise BadTar(f"the size of {name!r} is {extended['size'][:MAX_DIGITS]!r}")
            size = int(extended["size"])
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
            raise BadTar(f"member {name!r} is stored sparse, which is not read here")
        extended = {}
        if kind in FOLDERS_AND_LINKS:
            yield Member(name, offset, 0, b"", FOLDERS_AND_LINKS[kind], target)
            continue
        if wanted(name):
            if size > max_size:
                raise BadTar(f"member {name!r} has {size} bytes, more than {max_size}")
            yield Member(name, offset, size, _padded(source, size, offset))
        else:
            _skip(source, _round_up(size), offset)
            yield Member(name, offset, size, b"")
        offset += _round_up(size)


def _check_uncompressed(start: bytes) -> None:
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise BadTar(f"it is compressed with {kind}; unpack it first")


def _check_end(source: Source, offset: int) -> None:
    """Raise ``BadTar`` unless only zeros follow the first block of zeros."""
    while piece := source.read(PIECE):
        if piece.strip(b"\0"):
            raise BadTar(
                f"there is data behind its end at byte {offset}: archives were joined, which must"
                " be separate files, or it is damaged"
            )
        offset += len(piece)


def slices(record: memoryview) -> dict[str, memoryview]:
    """The contents of the members of a record, by extension, without copying.

    For records that ``pipeline.data.writer`` wrote, whose checksum was verified: each is part of a
    ustar archive. Raises ``BadTar`` on anything else.
    """
    found, offset = {}, 0
    while offset < len(record):
        name, size, kind, _ = _parse(bytes(record[offset : offset + BLOCK]), offset)
        content = record[offset + BLOCK : offset + BLOCK + size]
        if len(content) < size or kind not in b"0\0":
            raise BadTar(f"the member at byte {offset} is cut short, or not a plain file")
        found[name.partition(".")[2]] = content
        offset += BLOCK + _round_up(size)
    return found


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes, str]:
    """The name, size, type flag and link's target of the member that follows a header."""
    try:
        stated = int(header[148:156].rstrip(b" \0").strip() or b"x", 8)
    except ValueError:
        stated = -1
    if stated != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
        raise BadTar(f"there is no tar header at byte {offset}")
    try:
        field = header[124:136]
        size = (
            int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
        )
    except ValueError:
        size = -1
    if size < 0:
        raise BadTar(f"the header at byte {offset} states no size")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    target = header[157:257].partition(b"\0")[0]
    return (
        name.decode(errors="surrogateescape"),
        size,
        header[156:157],
        target.decode(errors="surrogateescape"),
    )


def _pax(content: bytes, offset: int) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    found = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        if (
            not length.isdigit()
            or len(length) > MAX_DIGITS
            or not len(length) + 3 < int(length) <= len(content)
        ):
            raise BadTar(f"the extended header before byte {offset} is damaged")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
        content = content[int(length) :]
    return found


def _round_up(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _padded(source: Source, size: int, offset: int) -> bytes:
    """The next ``size`` bytes; the padding after them is skipped."""
    content = _exactly(source, size, offset)
    _exactly(source, _round_up(size) - size, offset + size)
    return content


def _skip(source: Source, size: int, offset: int) -> None:
    """Read ``size`` bytes and throw them away."""
    while size:
        piece = min(size, PIECE)
        _exactly(source, piece, offset)
        offset, size = offset + piece, size - piece


def _exactly(source: Source, size: int, offset: int) -> bytes:
    content = source.read(size)
    if len(content) < size:
        raise _cut(offset + len(content))
    return content


def _cut(offset: int) -> BadTar:
    return BadTar(f"it ends at byte {offset}, in the middle of the archive")
