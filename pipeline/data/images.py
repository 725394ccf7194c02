"""Decoding and encoding of image files, used both to write shards and to read them."""

import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError

Pixels = npt.NDArray[np.uint8]
Fit = Literal["crop", "pad", "stretch"]

FORMATS = (*("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "QOI", "ICO"),)
"""Pillow's formats that are read: none that runs another program (EPS), and no rare one, since each
decoder is one more that damaged files can attack.
"""
EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi", ".ico"),
)
"""The endings of their files' names, in lower case."""
MAX_PIXELS = 1 << 26
"""67 million: a small file may decompress to fill all memory."""
LARGE = 1 << 20
"""Pixels of an image from which on threads take turns to decode, ``MAX_PIXELS`` at a time."""
GAP = 2.0
"""A JPEG file is decoded at the smallest of the decoder's scales that leaves so many times the
height and width that are wanted; a filter does the rest.
"""
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
JPEG = b"\xff\xd8\xff"


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
            swapped = _turn_of(image) in LYING
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            raise BadImage(_reason(error)) from None
        return (image.width, image.height) if swapped else (image.height, image.width)


def num_channels(content: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> int:
    """1 if the header of an image or ``.npy`` file says that it is grey, else 3.

    Raises ``BadImage``.
    """
    if content[:6] == b"\x93NUMPY":
        return pixels_of_array(content).shape[2]
    with _open(content, max_pixels) as image:
        if image.mode == "P" and image.palette is not None:
            colours = np.frombuffer(bytes(image.palette.getdata()[1]), dtype=np.uint8)
            if image.palette.mode == "RGB" and len(colours) % 3 == 0:
                is_grey = (colours.reshape(-1, 3) == colours.reshape(-1, 3)[:, :1]).all()
                return 1 if is_grey else 3
        return 1 if image.mode in GREY_MODES else 3


def decode(
    content: bytes | memoryview,
    channels: int,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """The pixels ``(height, width, channels)`` of an image or ``.npy`` file, grey (1) or RGB (3).

    Transparent pixels become white. ``size`` (height, width) scales the image: ``crop`` keeps the
    middle, ``pad`` puts the whole on white, ``stretch`` ignores its proportions. The filter is a
    triangle that covers as much as the image shrinks (Pillow's and torchvision's bilinear one), and
    Lanczos where it grows. JPEG files are decoded at a reduced scale, see ``GAP``: the result is
    within 40 dB PSNR of a full decode. Raises ``BadImage``.
    """
    if content[:6] == b"\x93NUMPY":
        pixels = convert(pixels_of_array(content), channels)
        return pixels if size is None or pixels.shape[:2] == size else resize(pixels, size, fit)
    if size is not None and content[:3] == JPEG:
        plain = _plain_jpeg(content, channels, size, fit, max_pixels)
        if plain is not None:
            return plain
    with _open(content, max_pixels) as opened, _turn(opened.width * opened.height):
        try:
            turn = _turn_of(opened)
            extent, wanted = (opened.height, opened.width), size
            if turn in LYING and size is not None:
                wanted = size[1], size[0]
            reduced = _jpeg_scale(extent, wanted, fit) if opened.format in ("JPEG", "MPO") else 1
            if reduced > 1:
                opened.draft(None, (opened.width // reduced, opened.height // reduced))
            image = _visible(opened).convert("L" if channels == 1 else "RGB")
            if wanted is not None and (image.height, image.width) != wanted:
                image = _scaled(image, (extent[0] / reduced, extent[1] / reduced), wanted, fit)
            image = image.transpose(TURNS[turn]) if turn in TURNS else image
            if size is not None:
                image = _padded(image, size)
            return np.asarray(image).reshape(image.height, image.width, channels)
        except BadImage:
            raise
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            raise BadImage(_reason(error)) from None


def _plain_jpeg(
    content: bytes | memoryview, channels: int, size: tuple[int, int], fit: Fit, max_pixels: int
) -> Pixels | None:
    """The pixels of a JPEG file in grey or YCbCr that nothing turns; None of any other.

    libjpeg-turbo decodes it without Pillow, whose pixels are the same, but take longer.
    """
    try:
        if _may_be_turned(content):
            return None
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > max_pixels or space not in ("Gray", "YCbCr", "YUV"):
            return None
        reduced = _jpeg_scale((height, width), size, fit)
        with _turn(height * width // reduced**2):
            pixels = simplejpeg.decode_jpeg(
                content,
                "GRAY" if channels == 1 else "RGB",
                min_height=-(-height // reduced),
                min_width=-(-width // reduced),
            )
    except (ValueError, RuntimeError, MemoryError):
        return None  # Pillow judges it, and says what is wrong
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    extent = (height / reduced, width / reduced)
    image = _padded(_scaled(image, extent, size, fit), size)
    return np.asarray(image).reshape(*size, channels)


def _jpeg_scale(extent: tuple[int, int], size: tuple[int, int] | None, fit: Fit) -> int:
    """1, 2, 4 or 8: the factor by which the decoder reduces height and width."""
    if size is None:
        return 1
    ratio = _reduction(extent, size, fit) / GAP
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, ratio))


def _may_be_turned(content: bytes | memoryview) -> bool:
    """Whether a JPEG file has metadata (Exif, XMP) before its pixels, which may turn it."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if marker == 0xE1:  # APP1
            return True
        if marker in (0xDA, 0xC0, 0xC1, 0xC2):  # the frame, or the scan
            return False
        place += 2 + length
    return True


ORIENTATION = 0x0112
"""The tag of Exif that says how an image is turned."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What stands an image up, by that tag."""
LYING = (5, 6, 7, 8)
"""The values for which height and width are exchanged."""
EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def _turn_of(image: Image.Image) -> int:
    """How an image is turned: a value of ``ORIENTATION``, 1 if it is upright.

    Pillow itself stands TIFF files up.
    """
    if image.format != "TIFF" and any(key in image.info for key in EXIF_KEYS):
        turn = image.getexif().get(ORIENTATION, 1)
        return turn if isinstance(turn, int) else 1
    return 1


def _visible(image: Image.Image) -> Image.Image:
    """The image in 8 bits, on white where it is transparent."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow would clip 16 bits to 8, which makes all but the darkest pixels white.
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey)
    if image.mode in ("I", "F"):
        raise BadImage("its pixels are 32-bit numbers, and which of them is white is not known")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


class _Turns:
    """A bound on the pixels that threads decode at a time."""

    def __init__(self) -> None:
        self.free, self.changed = MAX_PIXELS, threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, MAX_PIXELS)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_turns = _Turns()


def _turn(pixels: int) -> AbstractContextManager[None]:
    return _turns.take(pixels) if pixels > LARGE else nullcontext()


def resize(pixels: Pixels, size: tuple[int, int], fit: Fit) -> Pixels:
    """Pixels ``(height, width, channels)`` at another size, scaled as by ``decode``."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    image = _padded(_scaled(image, pixels.shape[:2], size, fit), size)
    return np.asarray(image).reshape(*size, channels)


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


def _reduction(extent: tuple[float, float], size: tuple[int, int], fit: Fit) -> float:
    """By how much an image of ``extent`` has to shrink; below 1 it has to grow."""
    ratios = extent[0] / size[0], extent[1] / size[1]
    return max(ratios) if fit == "pad" else min(ratios)


def _scaled(
    image: Image.Image, extent: tuple[float, float], size: tuple[int, int], fit: Fit
) -> Image.Image:
    """The image at ``size``, or as much of that as ``pad`` fills.

    Its content has the height and width ``extent``, which are fractions where a decoder has reduced
    an image that its factor does not divide.
    """
    (height, width), ratio = size, _reduction(extent, size, fit)
    box, target = (0.0, 0.0, extent[1], extent[0]), (width, height)
    if fit == "crop":
        left, top = (extent[1] - ratio * width) / 2, (extent[0] - ratio * height) / 2
        box = (left, top, left + ratio * width, top + ratio * height)
    elif fit == "pad":
        target = (max(1, round(extent[1] / ratio)), max(1, round(extent[0] / ratio)))
    # Rounding must not push the box over the edge, which Pillow refuses.
    box = (max(0.0, box[0]), max(0.0, box[1]), min(image.width, box[2]), min(image.height, box[3]))
    method = Image.Resampling.BILINEAR if ratio >= 1 else Image.Resampling.LANCZOS
    return image.resize(target, method, box)


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the middle of a white one of ``size``."""
    height, width = size
    if image.size == (width, height):
        return image
    whole = Image.new(image.mode, (width, height), "white")
    whole.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return whole


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
