"""Every kind of image file becomes the right pixels; JPEG files stay within 40 dB of them."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data import images
from pipeline.data.images import BadImage, Fit, decode, decode_all, measure

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (9, 7, 3)).astype(np.uint8)
GREY = RANDOM.integers(0, 256, (9, 7)).astype(np.uint8)
ALPHA = RANDOM.integers(0, 256, (9, 7)).astype(np.uint8)
DEEP = RANDOM.integers(0, 1 << 16, (9, 7)).astype(np.uint16)


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Natural-looking: amplitudes fall with spatial frequency, and channels are correlated."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    noise = random.normal(size=(3, height, width))
    noise[1:] = 0.8 * noise[:1] + 0.6 * noise[1:]
    drawn = np.fft.irfft2(
        np.fft.rfft2(noise) / np.maximum(frequency, 1 / max(height, width)) ** 1.2, (height, width)
    )
    drawn = (drawn - drawn.mean()) / drawn.std() * 50 + 128
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composited in real numbers."""
    share = alpha[..., None] / 255 if pixels.ndim == 3 else alpha / 255
    return pixels * share + 255 * (1 - share)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stood up as the standard says, from where row 0 and column 0 of the file belong."""
    flips: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    return flips[orientation](pixels)


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


PALETTE = Image.fromarray(GREY % 4)
PALETTE.putpalette([10, 20, 30, 200, 0, 0, 0, 150, 0, 7, 7, 250])
COLOURS = np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[GREY % 4]
TRANSPARENT = on_white(COLOURS, np.array([0, 255, 128, 255])[GREY % 4])
SECOND = Image.fromarray(255 - COLOUR)
LIGHT = np.linspace(0, 1, 63, dtype=np.float32).reshape(9, 7)
RGBA = Image.fromarray(np.dstack([COLOUR, ALPHA]))
ICON = RGBA.resize((16, 16), Image.Resampling.NEAREST)
LA = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
INKS = RANDOM.integers(0, 256, (9, 7, 4)).astype(np.uint8)
PRINTED = (255.0 - INKS[..., :3]) * (255 - INKS[..., 3:]) / 255

EXACT = {
    "png": (file(Image.fromarray(COLOUR), "PNG"), COLOUR),
    "png grey": (file(Image.fromarray(GREY), "PNG"), GREY),
    "png of 16 bits": (file(Image.fromarray(DEEP), "PNG"), DEEP >> 8),
    "png of 16 bits with a transparent value": (
        file(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[3, 4])),
        np.where(DEEP[3, 4] == DEEP, 255, DEEP >> 8),
    ),
    "png of a palette": (file(PALETTE, "PNG"), COLOURS),
    "png of a palette with transparency": (
        file(PALETTE, "PNG", transparency=bytes([0, 255, 128, 255])),
        TRANSPARENT,
    ),
    "png rgba": (file(RGBA, "PNG"), on_white(COLOUR, ALPHA)),
    "png la": (file(LA, "PNG"), on_white(GREY, ALPHA)),
    "png of two values": (file(Image.fromarray(GREY > 99), "PNG"), (GREY > 99) * 255),
    "png with a transparent colour": (
        file(Image.fromarray(COLOUR), "PNG", transparency=tuple(map(int, COLOUR[2, 2]))),
        np.where((COLOUR[2, 2] == COLOUR).all(-1, keepdims=True), 255, COLOUR),
    ),
    "apng": (
        file(Image.fromarray(COLOUR), "PNG", save_all=True, append_images=[SECOND]),
        COLOUR,
    ),
    "gif of two pictures": (
        file(PALETTE, "GIF", save_all=True, append_images=[Image.fromarray(GREY)]),
        COLOURS,
    ),
    "gif with transparency": (
        file(PALETTE, "GIF", transparency=1),
        np.where((GREY % 4 == 1)[..., None], 255, COLOURS),
    ),
    "webp": (file(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
    "webp of two pictures": (
        file(Image.fromarray(COLOUR), "WEBP", lossless=True, save_all=True, append_images=[SECOND]),
        COLOUR,
    ),
    "webp rgba": (file(RGBA, "WEBP", lossless=True, exact=True), on_white(COLOUR, ALPHA)),
    "avif": (
        file(Image.fromarray(np.full((8, 8, 3), 77, np.uint8)), "AVIF", quality=100),
        np.full((8, 8, 3), 77),
    ),
    "bmp": (file(Image.fromarray(COLOUR), "BMP"), COLOUR),
    "ppm": (file(Image.fromarray(COLOUR), "PPM"), COLOUR),
    "pgm of 16 bits": (file(Image.fromarray(DEEP), "PPM"), DEEP >> 8),
    "pfm": (file(Image.fromarray(LIGHT), "PPM"), LIGHT * 255),
    "qoi": (file(Image.fromarray(COLOUR), "QOI"), COLOUR),
    "jpeg 2000": (file(Image.fromarray(COLOUR), "JPEG2000"), COLOUR),
    "jpeg 2000 of 16 bits": (file(Image.fromarray(DEEP), "JPEG2000"), DEEP >> 8),
    "ico": (
        file(ICON, "ICO", sizes=[(16, 16)]),
        on_white(np.asarray(ICON)[..., :3], np.asarray(ICON)[..., 3]),
    ),
    "tiff": (file(Image.fromarray(COLOUR), "TIFF"), COLOUR),
    "tiff of 16 bits": (file(Image.fromarray(DEEP), "TIFF"), DEEP >> 8),
    "tiff of 16 bits where 0 is white": (
        file(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}),
        255 - (DEEP >> 8),
    ),
    "tiff of fractions": (file(Image.fromarray(LIGHT), "TIFF"), LIGHT * 255),
    "tiff in cmyk": (file(Image.fromarray(INKS, "CMYK"), "TIFF"), PRINTED),
    "tiff of two pictures": (
        file(Image.fromarray(COLOUR), "TIFF", save_all=True, append_images=[SECOND]),
        COLOUR,
    ),
    **{
        f"{kind} turned {n}": (
            file(Image.fromarray(COLOUR), kind, exif=exif(n), **options),
            turned(COLOUR, n),
        )
        for n in range(1, 9)
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))
    },
}


@pytest.mark.parametrize("kind", EXACT)
def test_files_of_every_kind_become_the_pixels_that_the_format_defines(kind: str) -> None:
    content, expected = EXACT[kind]
    found = decode(content, 3)
    grey = expected.ndim == 2
    assert measure(content) == (*found.shape[:2], 1 if grey else 3)
    expected = np.repeat(expected[..., None], 3, axis=2) if grey else expected
    np.testing.assert_allclose(found, expected, atol=1)  # compositing rounds
    if grey:
        np.testing.assert_array_equal(decode(content, 1), found[..., :1])


def test_pixels_whose_white_is_not_known_are_refused() -> None:
    for values in (LIGHT * 2, -LIGHT, np.where(LIGHT > 0.5, np.nan, LIGHT)):
        with pytest.raises(BadImage, match=r"not all from 0 \(black\) to 1 \(white\)"):
            decode(file(Image.fromarray(values.astype(np.float32)), "TIFF"), 1)
    with pytest.raises(BadImage, match="which of them is white is not known"):
        decode(file(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), 1)


def test_a_grey_palette_is_grey() -> None:
    image = Image.fromarray(GREY % 4)
    image.putpalette([0, 0, 0, 9, 9, 9, 70, 70, 70, 255, 255, 255])
    assert measure(file(image, "PNG"))[2] == 1


def test_extensions_are_those_of_the_formats_that_are_read() -> None:
    Image.init()
    assert set(images.EXTENSIONS) >= {
        extension for extension, kind in Image.EXTENSION.items() if kind in images.FORMATS
    }


# --- JPEG -----------------------------------------------------------------------------------------


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def fully(content: bytes, channels: int, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """A full decode by Pillow, stood up, converted and resized."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = image.convert("L" if channels == 1 else "RGB")
    box, filtered = size[::-1], Image.Resampling.LANCZOS
    if fit == "crop":
        image = ImageOps.fit(image, box, filtered)
    elif fit == "pad":
        image = ImageOps.pad(image, box, filtered, color="white")
    else:
        image = image.resize(box, filtered)
    return np.asarray(image).reshape(*size, channels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_jpeg_file_is_within_40_decibels_of_a_full_decode(data: st.DataObject) -> None:
    draw = data.draw
    height, width = draw(st.integers(40, 400)), draw(st.integers(40, 400))
    image = Image.fromarray(photograph(draw(st.integers(0, 9)), height, width))
    content = file(
        image.convert(draw(st.sampled_from(["RGB", "RGB", "L", "CMYK"]))),
        "JPEG",
        quality=draw(st.sampled_from([60, 80, 95])),
        progressive=draw(st.booleans()),
        **({"exif": exif(draw(st.integers(1, 8)))} if draw(st.booleans()) else {}),
    )
    size = draw(st.sampled_from([(16, 16), (32, 32), (64, 64), (30, 50), (height, width)]))
    fit: Fit = draw(st.sampled_from(["crop", "pad", "stretch"]))
    channels = draw(st.sampled_from([1, 3]))
    found = decode(content, channels, size, fit)
    assert decibels(found, fully(content, channels, size, fit)) > 40


def test_the_pixels_of_a_file_do_not_depend_on_the_files_decoded_with_it() -> None:
    contents = [
        file(Image.fromarray(photograph(n, 128 + 16 * (n % 3), 128)), "JPEG") for n in range(12)
    ]
    contents[5], contents[7] = contents[5][:200], EXACT["png"][0]
    together = decode_all(contents, 3, (32, 32), "stretch")
    for content, found in zip(contents, together, strict=True):
        if isinstance(found, BadImage):
            assert content is contents[5]
        else:
            np.testing.assert_array_equal(found, decode(content, 3, (32, 32), "stretch"))


def test_a_file_that_needs_no_reduced_scale_keeps_its_pixels() -> None:
    content = file(Image.fromarray(photograph(1, 48, 64)), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode(content, 3), expected)
    np.testing.assert_array_equal(decode(content, 3, (48, 64)), expected)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**4), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_jpeg_file_with_any_bytes_in_it_is_decoded_or_refused(
    at: int, change: bytes, cut: bool
) -> None:
    whole = file(Image.fromarray(photograph(2, 64, 64)), "JPEG", exif=exif(3))
    at %= len(whole)
    content = whole[:at] if cut else whole[:at] + change + whole[at + len(change) :]
    (found,) = decode_all([content], 3, (16, 16), "crop", 10**5)
    assert isinstance(found, BadImage) or found.shape == (16, 16, 3)
