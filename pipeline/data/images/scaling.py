"""Resizing, and the scale at which a JPEG file is decoded before it.

The filter is Lanczos, with three lobes as wide as the image shrinks. Pillow applies it to one image
and any part of it. PyTorch applies it to many whole images at once, ten times as fast; its integers
are those of Pillow but for 0.2 % of the pixels, which differ by one, and they depend neither on the
processor nor on the other images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from PIL import Image

from pipeline.data.images.base import Fit, Pixels

METHOD = "scaled"
"""JPEG files are decoded at a reduced scale; see ``jpeg_scale``."""
FILTER = "lanczos"
GAP = 2.0
"""A JPEG file is decoded at the smallest of the decoder's scales that leaves at least ``GAP`` times
the wanted height and width. The filter does the rest: with 2, the pixels are within 40 dB PSNR of a
full decode.
"""


@lru_cache
def library() -> str:
    """The libraries that pixels depend on, with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in ("simplejpeg", "pillow", "torch"))


@dataclass(frozen=True)
class Picture:
    """Decoded pixels ``(rows, columns, channels)``, still to be resized.

    ``extent`` is the height and width of what they show: fractions where the decoder reduced an
    image that its scale does not divide, and the last row or column is only partly filled.
    """

    pixels: Pixels
    extent: tuple[float, float]


@dataclass(frozen=True)
class Place:
    """The part of an image that is used, and the size to which it is brought."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    size: tuple[int, int]  # height, width; smaller than the one asked for if the rest is padding


def place(extent: tuple[float, float], size: tuple[int, int], fit: Fit) -> Place:
    """How an image of ``extent`` is brought to ``size``."""
    height, width = extent
    if fit == "stretch":
        return Place((0.0, 0.0, width, height), size)
    ratio = width / height
    if fit == "pad":
        wanted = size[1] / size[0]
        if ratio > wanted:
            size = max(1, round(height / width * size[1])), size[1]
        elif ratio < wanted:
            size = size[0], max(1, round(width / height * size[0]))
        return Place((0.0, 0.0, width, height), size)
    wanted = size[1] / size[0]
    inner_height, inner_width = height, width
    if ratio > wanted:
        inner_width = wanted * height
    elif ratio < wanted:
        inner_height = width / wanted
    left, top = (width - inner_width) * 0.5, (height - inner_height) * 0.5
    return Place((left, top, left + inner_width, top + inner_height), size)


def jpeg_scale(extent: tuple[int, int], size: tuple[int, int] | None, fit: Fit) -> int:
    """1, 2, 4 or 8: the factor by which the decoder of JPEG files reduces height and width."""
    if size is None:
        return 1
    used = place(extent, size, fit)
    left, top, right, bottom = used.box
    ratio = min((bottom - top) / used.size[0], (right - left) / used.size[1]) / GAP
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, ratio))


def resize_all(pictures: Sequence[Picture], size: tuple[int, int], fit: Fit) -> list[Pixels]:
    """Pictures at ``size`` (height, width), each ``(height, width, channels)``.

    What is whole is resized together with all others of its shape.
    """
    found: list[Pixels] = [picture.pixels for picture in pictures]
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        shape = picture.pixels.shape
        used = place(picture.extent, size, fit)
        if shape[:2] == used.size and picture.extent == used.size:
            found[number] = padded(picture.pixels, size)
        elif used.box == (0, 0, shape[1], shape[0]):
            alike.setdefault(shape, []).append(number)
        else:
            found[number] = resize_one(picture, size, fit)
    for shape, numbers in alike.items():
        used = place((shape[0], shape[1]), size, fit)
        stack = np.stack([pictures[number].pixels for number in numbers])
        for number, pixels in zip(numbers, _lanczos(stack, used.size), strict=True):
            found[number] = padded(pixels, size)
    return found


def resize_one(picture: Picture, size: tuple[int, int], fit: Fit) -> Pixels:
    """A picture at ``size``, by Pillow: for parts of images, and as earlier versions did it."""
    pixels, used = picture.pixels, place(picture.extent, size, fit)
    if pixels.shape[:2] == used.size and picture.extent == used.size:
        return padded(pixels, size)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    # Rounding must not push the box over the edge, which Pillow refuses.
    left, top, right, bottom = used.box
    box = (max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom))
    image = image.resize(used.size[::-1], Image.Resampling.LANCZOS, box)
    return padded(np.asarray(image).reshape(*used.size, pixels.shape[2]), size)


def padded(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Pixels in the middle of a white image of ``size``."""
    height, width, channels = pixels.shape
    if (height, width) == size:
        return pixels
    whole = np.full((*size, channels), 255, dtype=np.uint8)
    top, left = round((size[0] - height) * 0.5), round((size[1] - width) * 0.5)
    whole[top : top + height, left : left + width] = pixels
    return whole


def _lanczos(stack: Pixels, size: tuple[int, int]) -> Pixels:
    """Images ``(n, height, width, channels)`` at ``size``."""
    import torch  # takes 2 s, which only those who resize JPEG files need

    # Channels stay last: for them PyTorch has vector instructions.
    images = torch.from_numpy(stack).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(images, size, mode="lanczos", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()
