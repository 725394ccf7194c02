"""The file that compressed images are kept in: a header, blocks that decode independently, an end.

All numbers are little-endian.

====== ===================================================================
bytes  content
====== ===================================================================
8      ``\\x89VLAE\\r\\n\\x1a``
4      the length of the header
...    the header: JSON, of which ``Header`` describes the fields
8      the checksum of all of the above: BLAKE2b
------ -------------------------------------------------------------------
       for each block, in order:
4      its number, from 0
4      its number of images
4      the number of its initial words of 32 bits; 0 in a lossy file
8      the checksum of its pixels, a byte each; 0 in a lossy file
4, 4   the lengths of the names and of the payload
...    the names: empty, or the keys and labels of the images as zlib-compressed JSON
...    the payload
8      the checksum of the block, keyed with the header's
------ -------------------------------------------------------------------
29     the end: a block of the number 2^32 - 1, whose number of images is the number of blocks
8      its checksum
====== ===================================================================

Every bit is under a checksum. A block is checked before anything in it is used.
"""

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, get_type_hints

from pipeline.errors import DamagedData, UserError

MAGIC = b"\x89VLAE\r\n\x1a"
VERSION = 1
LENGTH, BLOCK = struct.Struct("<I"), struct.Struct("<III8sII")
CHECKSUM = 8
"""Bytes of a checksum."""
END = (1 << 32) - 1
"""The number of the block that ends a file."""
MAX_HEADER = 1 << 24
"""Most bytes of a header, which a damaged length must not exceed."""
MAX_BITS = 20
"""Most bits of a code in a lossy file: the sender weighs 2^bits candidates for every image."""
MAX_NAMES = 1 << 28
"""Most bytes of the names of a block once they are inflated."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Header:
    """What a file says about its images, and what a decoder has to agree with."""

    model: str
    """The sha256 of the weights' file."""
    data: str
    """The digest of the data set's manifest."""
    name: str
    split: str
    image_shape: list[int]
    """(channels, height, width)."""
    num_classes: int | None
    """None if there are no labels, or none were to be kept."""
    class_names: list[str] | None
    images: int
    blocks: int
    seed: int
    """The seed of the initial bits, and of a lossy file's codebook and redrawings."""
    bits: int | None
    """Bits of an image's code in a lossy file; None: the images are kept bit for bit."""
    canary: str
    """The checksum of test images compressed by the machine that wrote a lossless file."""
    machine: str
    """The versions and the processor that the probabilities were computed with."""
    sent: int | None = None
    """How many latents of each code a lossy file sends, the first ones; None: all."""
    version: int = VERSION

    def is_possible(self) -> bool:
        """Whether every value has its type and range: a file may come from anybody."""
        types = get_type_hints(Header) | {"image_shape": list, "class_names": list | None}
        return (
            all(isinstance(getattr(self, name), kind) for name, kind in types.items())
            and len(self.image_shape) == 3
            and 0 <= self.blocks <= self.images
            and (self.blocks > 0) == (self.images > 0)
            and 0 <= self.seed < 1 << 63
            and (self.bits is None or 1 <= self.bits <= MAX_BITS)
            and (self.sent is None or (self.bits is not None and self.sent >= 1))
            and re.fullmatch(r"[\w-]+", self.split) is not None
        )

    def to_bytes(self) -> bytes:
        """Magic, length, JSON and checksum."""
        text = json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()
        content = MAGIC + LENGTH.pack(len(text)) + text
        return content + checksum(content)


@dataclass(frozen=True)
class Frame:
    """A block as the file holds it."""

    number: int
    images: int
    initial_words: int
    pixels: bytes
    names: bytes
    payload: bytes

    def to_bytes(self, key: bytes) -> bytes:
        """With its checksum; ``key`` is the header's."""
        sizes = (len(self.names), len(self.payload))
        content = BLOCK.pack(self.number, self.images, self.initial_words, self.pixels, *sizes)
        content += self.names + self.payload
        return content + checksum(content, key)


def end(blocks: int) -> Frame:
    """The last block of a file of ``blocks`` blocks."""
    return Frame(END, blocks, 0, bytes(CHECKSUM), b"", b"")


def checksum(content: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM, key=key).digest()


def pack_names(keys: list[str] | None, labels: list[int] | None) -> bytes:
    """The keys and labels of a block's images."""
    text = json.dumps({"keys": keys, "labels": labels}, separators=(",", ":"))
    return zlib.compress(text.encode(), 9)


def unpack_names(names: bytes, images: int) -> tuple[list[str] | None, list[int]]:
    """The keys, if any, and the labels of a block of ``images`` images: undoes ``pack_names``.

    Raises DamagedData if these are not the names of that many images, or exceed ``MAX_NAMES``
    bytes.
    """
    if not names:
        return None, [-1] * images
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(names, MAX_NAMES)
        found: Any = json.loads(text) if inflate.eof else None
        keys, labels = found["keys"], found["labels"]
        lists = [(labels, int)] + ([] if keys is None else [(keys, str)])
        if all(
            len(each) == images and {type(one) for one in each} <= {kind} for each, kind in lists
        ):
            return keys, labels
    except (zlib.error, ValueError, TypeError, KeyError):
        pass
    raise DamagedData(f"the names of its {images} images cannot be read")


class Reader:
    """Reads a file from a stream of bytes, checking each part before it is given out.

    ``url`` is named in errors. Raises UserError if it is no such file or of another version, and
    DamagedData if it is cut short or altered.
    """

    def __init__(self, pieces: Iterator[bytes], url: str) -> None:
        self._pieces, self._url, self._buffer = pieces, url, bytearray()
        magic = self._take(len(MAGIC), "its header")
        if magic != MAGIC:
            raise UserError(f"{url} is no file that `vlae compress` wrote")
        length = self._take(LENGTH.size, "its header")
        (size,) = LENGTH.unpack(length)
        if size > MAX_HEADER:
            raise self._damaged("its header")
        text, found = self._take(size, "its header"), self._take(CHECKSUM, "its header")
        self._key = checksum(magic + length + text)
        if found != self._key:
            raise self._damaged("its header")
        self.header = self._parse(text)

    def frames(self) -> Iterator[Frame]:
        """The blocks in order; ends only if the file is complete."""
        for number in range(self.header.blocks):
            yield self._frame(number)
        if self._frame(END) != end(self.header.blocks) or self._more():
            raise self._damaged("its end")

    def _frame(self, number: int) -> Frame:
        what = "its end" if number == END else f"block {number}"
        start = self._take(BLOCK.size, what)
        found, images, initial_words, pixels, names, payload = BLOCK.unpack(start)
        content = self._take(names + payload, what)
        frame = Frame(found, images, initial_words, pixels, content[:names], content[names:])
        ending = self._take(CHECKSUM, what)
        if frame.to_bytes(self._key)[-CHECKSUM:] != ending or found != number:
            raise self._damaged(what)
        return frame

    def _parse(self, text: bytes) -> Header:
        try:
            values: dict[str, Any] = json.loads(text)
            if values.get("version") != VERSION:
                raise UserError(
                    f"{self._url} has the format version {values.get('version')}, and this program"
                    f" reads version {VERSION}; use the program that wrote it"
                )
            header = Header(**values)
            if not header.is_possible():
                raise ValueError
        except (ValueError, TypeError, AttributeError):
            raise self._damaged("its header") from None
        return header

    def _damaged(self, what: str) -> DamagedData:
        return DamagedData(
            f"{self._url} is damaged: {what} does not have its checksum; compress the images again"
            " or get another copy"
        )

    def _more(self) -> bool:
        return bool(self._buffer) or any(self._pieces)

    def _take(self, size: int, what: str) -> bytes:
        while len(self._buffer) < size:
            piece = next(self._pieces, None)
            if piece is None:
                raise DamagedData(
                    f"{self._url} is damaged or cut short: it ends within {what}; compress the"
                    " images again or get another copy"
                )
            self._buffer += piece
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


class Writer:
    """Writes a file to ``file`` block by block, in whatever order blocks come."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        content = header.to_bytes()
        file.write(content)
        self._file, self._key, self._next = file, content[-CHECKSUM:], 0
        self._waiting: dict[int, Frame] = {}

    def add(self, frame: Frame) -> None:
        """Write a block, and those after it that came before; or keep it until its turn."""
        self._waiting[frame.number] = frame
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next).to_bytes(self._key))
            self._next += 1

    def finish(self) -> None:
        """Write the end."""
        assert not self._waiting
        self._file.write(end(self._next).to_bytes(self._key))
