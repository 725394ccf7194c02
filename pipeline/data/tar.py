"""A strict tar reader: a truncated, altered or foreign file is an error, never a shorter archive.

The standard library's reader takes the first header that it cannot parse for the end of the
archive, and so does everything built on it. Formats: ustar, pax and GNU, as written by tar, Python
and webdataset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
"""Bytes."""
MAX_NAME = 1 << 16
"""Bytes of the longest extended header; of its fields, only names and sizes are used."""
ZEROS = bytes(BLOCK)


class BadTar(ValueError):
    """The bytes are not a complete tar archive; the message says why."""


class Source(Protocol):
    """A stream that an archive is read from, front to end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A regular file of an archive."""

    name: str
    offset: int  # of its content in the archive, in bytes
    size: int  # of its content, in bytes
    content: bytes


def members(source: Source, max_size: int) -> Iterator[Member]:
    """All regular files of an archive, in their order; folders and links are skipped.

    Memory is bounded by the largest member, which may have ``max_size`` bytes. Raises ``BadTar`` if
    the archive is cut anywhere, also between two members (a complete one ends in a block of zeros),
    a header is damaged, or a member is too large.
    """
    offset, extended = 0, dict[str, str]()
    while True:
        header = _exactly(source, BLOCK, offset)
        offset += BLOCK
        if header == ZEROS:
            return
        name, size, kind = _parse(header, offset - BLOCK)
        if kind in b"xgLK":
            if size > MAX_NAME:
                raise BadTar(f"the extended header at byte {offset} has {size} bytes")
            content = _padded(source, size, offset)
            offset += _round_up(size)
            if kind == b"x":
                extended |= _pax(content, offset)
            elif kind == b"L":
                extended["path"] = content.rstrip(b"\0").decode(errors="surrogateescape")
            continue
        name = extended.get("path", name)
        if "size" in extended:
            if not extended["size"].isdecimal():
                raise BadTar(f"the size of {name!r} is {extended['size']!r}")
            size = int(extended["size"])
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
            raise BadTar(f"member {name!r} is stored sparse, which is not read here")
        extended = {}
        if kind in b"123456":  # links, devices and folders: they have no content
            continue
        if size > max_size:
            raise BadTar(f"member {name!r} has {size} bytes, more than {max_size}")
        yield Member(name, offset, size, _padded(source, size, offset))
        offset += _round_up(size)


def slices(record: memoryview) -> dict[str, memoryview]:
    """The contents of the members of a record, by extension, without copying.

    For records that ``pipeline.data.writer`` wrote, whose checksum was verified: each is part of a
    ustar archive. Raises ``BadTar`` on anything else.
    """
    found, offset = {}, 0
    while offset < len(record):
        name, size, kind = _parse(bytes(record[offset : offset + BLOCK]), offset)
        content = record[offset + BLOCK : offset + BLOCK + size]
        if len(content) < size or kind not in b"0\0":
            raise BadTar(f"the member at byte {offset} is cut short, or not a plain file")
        found[name.partition(".")[2]] = content
        offset += BLOCK + _round_up(size)
    return found


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    """The name, size and kind of the member that follows a header."""
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
    return name.decode(errors="surrogateescape"), size, header[156:157]


def _pax(content: bytes, offset: int) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    found = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not len(length) + 3 < int(length) <= len(content):
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


def _exactly(source: Source, size: int, offset: int) -> bytes:
    content = source.read(size)
    if len(content) < size:
        raise BadTar(f"it ends at byte {offset + len(content)}, in the middle of the archive")
    return content
