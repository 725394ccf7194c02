"""Decoding and encoding of image files, used both to write shards and to read them."""

import io
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import UserError

Pixels = npt.NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read: none that runs another program (EPS), and no rare one, since each decoder
is one more that damaged files can attack.
"""
MAX_PIXELS = 1 << 26
"""67 million: a small file may decompress to fill all memory."""


class BadImage(UserError):
    """The bytes are not a usable image; the message says why, and the caller says which image."""


def measure(content: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The height and width of an image or ``.npy`` file, from its header. Raises ``BadImage``."""
    if content[:6] == b"\x93NUMPY":
        height, width, _ = pixels_of_array(content).shape
        if height * width > max_pixels:
            raise BadImage(
                f"its {width} x {height} pixels are more than the {max_pixels:,} allowed"
            )
        return height, width
    with _open(content, max_pixels) as image:
        try:
            swapped = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF: rotated by 90 degrees
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            raise BadImage(_reason(error)) from None
        return (image.width, image.height) if swapped else (image.height, image.width)


def decode(
    content: bytes | memoryview,
    channels: int,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """The pixels ``(height, width, channels)`` of an image or ``.npy`` file, grey (1) or RGB (3).

    Transparent pixels become white. ``size`` (height, width) scales the image: ``crop`` keeps the
    middle, ``pad`` puts the whole on white, ``stretch`` ignores its proportions. Raises
    ``BadImage``.
    """
    if content[:6] == b"\x93NUMPY":
        pixels = convert(pixels_of_array(content), channels)
        return pixels if size is None or pixels.shape[:2] == size else resize(pixels, size, fit)
    with _open(content, max_pixels) as opened:
        try:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I;16"):  # Pillow would make all but the darkest white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise BadImage(
                    "its pixels are 32-bit numbers, and which of them is white is not known"
                )
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None and (image.height, image.width) != size:
                image = _fitted(image, size, fit)
            return np.asarray(image).reshape(image.height, image.width, channels)
        except BadImage:
            raise
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            raise BadImage(_reason(error)) from None


def resize(pixels: Pixels, size: tuple[int, int], fit: Fit) -> Pixels:
    """Pixels ``(height, width, channels)`` at another size, scaled as by ``decode``."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return np.asarray(_fitted(image, size, fit)).reshape(*size, channels)


def convert(pixels: Pixels, channels: int) -> Pixels:
    """Pixels ``(height, width, 1 or 3)`` with 1 channel (luminance) or 3 (grey three times)."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def encode(pixels: Pixels, encoding: Literal["png", "webp"]) -> bytes:
    """A lossless image file from pixels ``(height, width, 1 or 3)``."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if encoding == "png":
        image.save(file, "PNG", compress_level=6)
    else:
        image.save(file, "WEBP", lossless=True, quality=50)
    return file.getvalue()


def array(content: bytes | memoryview) -> npt.NDArray[Any]:
    """The array of an ``.npy`` file, a read-only view of its bytes. Raises ``BadImage``.

    Nothing is unpickled.
    """
    length = 10 + int.from_bytes(content[8:10], "little")  # of the header, in version 1.0
    if bytes(content[:8]) != b"\x93NUMPY\x01\x00" or len(content) < length:
        raise BadImage("it is not an .npy file of version 1.0")
    shape, fortran, dtype = _npy_header(bytes(content[8:length]))
    count = int(np.prod(shape, dtype=object))  # object: Python's integers do not overflow
    if len(content) - length != count * dtype.itemsize:
        raise BadImage(
            f"its array of shape {shape} and type {dtype} does not take {len(content) - length}"
            " bytes"
        )
    flat = np.frombuffer(content, dtype, count, offset=length)
    return flat.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=256)  # all records of a data set have the same few
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    except Exception as error:  # noqa: BLE001  (as above)
        raise BadImage(f"its .npy header is damaged ({_reason(error)})") from None
    if dtype.hasobject or min(shape, default=0) < 0:
        raise BadImage(
            "its array holds Python objects, which would have to be unpickled"
            if dtype.hasobject
            else "its shape is negative"
        )
    return shape, fortran, dtype


def pixels_of_array(content: bytes | memoryview) -> Pixels:
    """The pixels ``(height, width, 1 or 3)`` of an ``.npy`` file. Raises ``BadImage``.

    Its array is uint8, of shape height x width, height x width x channels, or channels x height x
    width.
    """
    found = array(content)
    if found.dtype != np.uint8 or found.ndim not in (2, 3):
        raise BadImage(
            f"its array is {found.dtype} of shape {found.shape}, but an image is uint8 in 2 or 3"
            " dimensions"
        )
    if found.ndim == 2:
        found = found[:, :, None]
    elif found.shape[2] not in (1, 3):
        found = found.transpose(1, 2, 0)
    if found.shape[2] not in (1, 3) or not found.size:
        raise BadImage(
            f"its array has shape {found.shape}, where none of the dimensions is 1 or 3 channels,"
            " or it is empty"
        )
    return np.ascontiguousarray(found)


def _fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    box = (size[1], size[0])
    if fit == "crop":
        return ImageOps.fit(image, box, Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, box, Image.Resampling.LANCZOS, color="white")
    return image.resize(box, Image.Resampling.LANCZOS)


def _open(content: bytes | memoryview, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # noqa: BLE001  (as above)
        raise BadImage(_reason(error)) from None
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"its {image.width} x {image.height} pixels are more than the {max_pixels:,} allowed"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a format known here"
    return " ".join(str(error).split()) or type(error).__name__
