"""Decoding and encoding of image files, used both to write shards and to read them."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.data.images import jpeg
from pipeline.data.images.base import (
    MAX_PIXELS,
    ROOM,
    BadImage,
    Fit,
    Pixels,
    reason,
    refuse_above,
)
from pipeline.data.images.npy import pixels_of_array
from pipeline.data.images.scaling import Picture, jpeg_scale, resize_all, resize_one

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "QOI",
    "ICO",
)
"""Pillow's formats that are read: none that runs another program (EPS), and no rare one, since each
decoder is one more that damaged files can attack.
"""
EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi", ".ico"),
)
"""The endings of their files' names, in lower case."""
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
NPY = b"\x93NUMPY"


def measure(
    content: bytes | memoryview, max_pixels: int = MAX_PIXELS
) -> tuple[int, int, Literal[1, 3]]:
    """The height and width of an image or ``.npy`` file, and 1 if it is grey, else 3.

    From the header alone. Raises ``BadImage``.
    """
    if content[:6] == NPY:
        height, width, depth = pixels_of_array(content).shape
        refuse_above(max_pixels, height, width)
        return height, width, 1 if depth == 1 else 3
    with _open(content, max_pixels) as image:
        try:
            swapped, channels = _turn_of(image) in LYING, _channels_of(image)
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            raise BadImage(reason(error)) from None
        if swapped:
            return image.width, image.height, channels
        return image.height, image.width, channels


def _channels_of(image: Image.Image) -> Literal[1, 3]:
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

    Transparent pixels become white, 16 bits become 8, numbers from 0 to 1 become 0 to 255, and of
    several pictures the first is taken. ``size`` (height, width) scales the image by Lanczos:
    ``crop`` keeps the middle, ``pad`` puts the whole on white, ``stretch`` ignores its proportions.
    JPEG files are decoded at a reduced scale first, see ``scaling.GAP``: the result is within 40 dB
    PSNR of a full decode. Raises ``BadImage``.
    """
    (found,) = decode_all([content], channels, size, fit, max_pixels)
    if isinstance(found, BadImage):
        raise found
    return found


def decode_all(
    contents: Sequence[bytes | memoryview],
    channels: int,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
) -> list[Pixels | BadImage]:
    """What ``decode`` returns or raises for each of several files, several times as fast."""
    found: list[Pixels | BadImage] = []
    waiting: list[tuple[int, Picture]] = []
    for number, content in enumerate(contents):
        try:
            if size is not None and content[:3] == jpeg.MAGIC:
                picture = jpeg.picture(content, channels, size, fit, max_pixels)
                if picture is not None:
                    waiting.append((number, picture))
                    found.append(picture.pixels)
                    continue
            found.append(_decode(content, channels, size, fit, max_pixels))
        except BadImage as error:
            found.append(error)
        except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
            found.append(BadImage(reason(error)))
    if waiting and size is not None:
        numbers, pictures = zip(*waiting, strict=True)
        for number, pixels in zip(numbers, resize_all(pictures, size, fit), strict=True):
            found[number] = pixels
    return found


def _decode(
    content: bytes | memoryview,
    channels: int,
    size: tuple[int, int] | None,
    fit: Fit,
    max_pixels: int,
) -> Pixels:
    """The pixels of one file, by Pillow or numpy."""
    if content[:6] == NPY:
        pixels = convert(pixels_of_array(content), channels)
        return pixels if size is None or pixels.shape[:2] == size else resize(pixels, size, fit)
    with _open(content, max_pixels) as opened, ROOM.take(opened.width * opened.height):
        turn = _turn_of(opened)
        extent = opened.height, opened.width
        wanted = size[::-1] if size is not None and turn in LYING else size
        reduced = 1
        if opened.format in ("JPEG", "MPO"):
            reduced = jpeg_scale(extent, wanted, fit)
            while turn in TURNS and (extent[0] % reduced or extent[1] % reduced):
                reduced //= 2  # else its last, partly filled row might come first
            if reduced > 1:
                opened.draft(None, (opened.width // reduced, opened.height // reduced))
        image = _visible(opened)
        if image.mode != ("L" if channels == 1 else "RGB"):
            image = image.convert("L" if channels == 1 else "RGB")
        shown: tuple[float, float] = extent[0] / reduced, extent[1] / reduced
        if turn in TURNS:
            image = image.transpose(TURNS[turn])
            shown = image.height, image.width
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
        if size is None:
            return pixels
        return resize_one(Picture(pixels, shown), size, fit)


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
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF files, and a value."""
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
        grey = (values >> (_tag(image, BITS_PER_SAMPLE, 16) - 8)).astype(np.uint8)
        if _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            grey = 255 - grey
        if isinstance(image.info.get("transparency"), int):
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey)
    if image.mode == "F":
        fractions = np.asarray(image)
        if not ((fractions >= 0) & (fractions <= 1)).all():  # NaN is neither
            raise BadImage("its pixels are fractions, but not all from 0 (black) to 1 (white)")
        if _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            fractions = 1 - fractions
        return Image.fromarray(np.rint(fractions * 255).astype(np.uint8))
    if image.mode == "I":
        raise BadImage(
            "its pixels are signed or 32-bit numbers, and which of them is white is not known"
        )
    if not image.has_transparency_data:
        image.load()
        return image
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """A number in the header of a TIFF file."""
    tags = getattr(image, "tag_v2", {})
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def resize(pixels: Pixels, size: tuple[int, int], fit: Fit) -> Pixels:
    """Pixels ``(height, width, channels)`` at another size, scaled as by ``decode``."""
    return resize_one(Picture(pixels, pixels.shape[:2]), size, fit)


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


def _open(content: bytes | memoryview, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # noqa: BLE001  (as above)
        raise BadImage(reason(error)) from None
    refuse_above(max_pixels, image.height, image.width)
    return image
