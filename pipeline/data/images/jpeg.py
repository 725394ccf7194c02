"""JPEG files by libjpeg-turbo, without Pillow: the same pixels in half the time."""

import simplejpeg

from pipeline.data.images.base import ROOM, Fit
from pipeline.data.images.scaling import Picture, jpeg_scale

MAGIC = b"\xff\xd8\xff"
APP1, START_OF_SCAN = 0xE1, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the frame, which tells the size."""


def picture(
    content: bytes | memoryview, channels: int, size: tuple[int, int], fit: Fit, max_pixels: int
) -> Picture | None:
    """A JPEG file in grey or YCbCr that nothing turns, at a reduced scale.

    None for any other file, and for a damaged one: Pillow judges those.
    """
    try:
        if may_be_turned(content):
            return None
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > max_pixels or space not in ("Gray", "YCbCr"):
            return None
        reduced = jpeg_scale((height, width), size, fit)
        # The coefficients of a progressive file are all held, whatever the scale.
        with ROOM.take(height * width // reduced**2 + height * width // 4):
            pixels = simplejpeg.decode_jpeg(
                content,
                "GRAY" if channels == 1 else "RGB",
                min_height=-(-height // reduced),
                min_width=-(-width // reduced),
            )
    except (ValueError, RuntimeError, MemoryError):
        return None
    return Picture(pixels, (height / reduced, width / reduced))


def may_be_turned(content: bytes | memoryview) -> bool:
    """Whether metadata (Exif, XMP) before the frame of a JPEG file may say how it is turned."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == APP1:
            return True
        if marker == START_OF_SCAN:
            return False
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return True
