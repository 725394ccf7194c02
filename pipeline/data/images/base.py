"""What an image is, which are refused, and how much memory decoding may take."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError

Pixels = npt.NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 1 << 26
"""67 million: a small file may decompress to fill all memory."""
LARGE = 1 << 20
"""Images with fewer pixels are decoded without waiting for others."""


class BadImage(UserError):
    """The bytes are not a usable image; the message says why, and the caller says which image."""


class Room:
    """A bound on the pixels that the threads of a process decode at a time.

    Decoding takes up to 24 bytes a pixel: the decoder's own picture, with and without transparency.
    """

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for ``pixels``; an image above the bound is decoded alone."""
        if pixels <= LARGE:
            yield
            return
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


ROOM = Room(MAX_PIXELS)
"""Shared by all decoding of the process."""


def refuse_above(max_pixels: int, height: int, width: int) -> None:
    """Raise ``BadImage`` if an image has too many pixels."""
    if height * width > max_pixels:
        raise BadImage(f"its {width} x {height} pixels are more than the {max_pixels:,} allowed")


def reason(error: Exception) -> str:
    """Why a decoder failed, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a format known here"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory to decode it"
    if isinstance(error, Image.DecompressionBombError):
        return "it unpacks to more pixels than are allowed"
    return " ".join(str(error).split()) or type(error).__name__
