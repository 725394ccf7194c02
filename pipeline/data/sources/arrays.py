"""Image sources held in memory: what arrays of images and labels have in common."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.sources.base import (
    SPLITS,
    Images,
    ImageSource,
    Labels,
    content_sha256,
    hash_fraction,
)
from pipeline.data.sources.listing import class_names
from pipeline.data.sources.members import as_label
from pipeline.errors import UserError
from pipeline.machine import MEMORY
from pipeline.values import JsonObject

Array = npt.NDArray[Any]

CHUNK = 1 << 12
"""Images whose values are converted at a time."""


class ArraySource(ImageSource):
    """Images in memory.

    ``found`` holds, by split, images (n, height, width), (n, height, width, channels) or
    (n, channels, height, width), and their labels, if there are any. Splits that are missing are
    taken from the training images by the hash of their number; each has at least one image.
    """

    _kind: str
    _arrays: dict[str, tuple[Images, Labels]]
    """By split: images (n, height, width, channels) and labels (n,)."""

    def __init__(
        self,
        where: str,
        found: Mapping[str, tuple[Array, Array | None]],
        origins: dict[str, str],
        fractions: Mapping[str, float],
    ) -> None:
        for split, (images, labels) in found.items():
            if not images.size:
                raise UserError(f"{where} holds no images for {split}")
            if labels is not None and labels.size != len(images):
                raise UserError(
                    f"{where}: {len(images)} images for {split} need as many labels, but these have"
                    f" the shape {labels.shape}"
                )
        splits = list(found)
        pixels = as_bytes(where, [channels_last(where, found[split][0]) for split in splits])
        numbers, self._names = as_labels(where, [found[split][1] for split in splits], pixels)
        self._arrays = dict(zip(splits, zip(pixels, numbers, strict=True), strict=True))
        for split in ("test", "valid"):
            if split not in found:
                origins[split] = self._take(where, split, fractions[split])
        self._arrays = {split: self._arrays[split] for split in SPLITS}
        if len({images.shape[1:] for images, _ in self._arrays.values()}) > 1:
            shapes = ", ".join(f"{split} {found[split][0].shape[1:]}" for split in splits)
            raise UserError(f"{where}: its splits have images of different shapes: {shapes}")
        self.account.origins = origins

    def _take(self, where: str, split: str, fraction: float) -> str:
        """Take a split from the training images; returns what decided it."""
        images, labels = self._arrays["train"]
        places = np.array([hash_fraction(f"{split} {number}") for number in range(len(labels))])
        chosen, origin = places < fraction, "hash of the number"
        if not chosen.any():
            chosen, origin = places == places.min(), f"{origin} (one image, so that it has any)"
        if chosen.all():
            raise UserError(
                f"{where} has {len(labels)} images for train and {split}; there must be at least"
                " one for each"
            )
        self._arrays[split] = images[chosen], labels[chosen]
        self._arrays["train"] = images[~chosen], labels[~chosen]
        return origin

    @cached_property
    def description(self) -> JsonObject:
        return {"source": self._kind, "images": self.splits, "sha256": content_sha256(self._arrays)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self._arrays["train"][0].shape
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        if self._names:
            return len(self._names)
        return 1 + max(int(labels.max(initial=-1)) for _, labels in self._arrays.values()) or None

    @property
    def class_names(self) -> list[str] | None:
        return self._names

    @property
    def num_unlabelled(self) -> int:
        if self.num_classes is None:
            return 0
        return sum(int((labels < 0).sum()) for _, labels in self._arrays.values())

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(labels) for split, (_, labels) in self._arrays.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = self._arrays[split]
        return images[start:stop], labels[start:stop]


def check_fits(where: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """The bytes of an array; UserError if they are more than half of this machine's memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MEMORY // 2:
        raise UserError(
            f"{where} says that it holds {shape}, which takes {size / 1e9:,.1f} GB, more than half"
            f" of this machine's {MEMORY / 1e9:,.1f} GB of memory; give the images as files, tars"
            " or Parquet"
        )
    return size


def channels_last(where: str, images: Array) -> Array:
    """Images as (n, height, width, channels), 1 or 3 channels. Raises UserError if impossible."""
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise UserError(
        f"{where}: its images have the shape {images.shape}; it must be (n, height, width), or have"
        " 1 or 3 channels as the second or the last of 4 dimensions"
    )


def as_bytes(where: str, arrays: list[Array]) -> list[Images]:
    """Pixel values of any type as bytes, all on one scale.

    Values are black and white (0 and 1), numbers in 0..1, in 0..255, or of 16 bits. Raises
    UserError on others, for whose scale there is no rule.
    """
    kinds = "/".join(sorted({str(array.dtype) for array in arrays}))
    if any(array.dtype.kind not in "biuf" for array in arrays):
        raise UserError(f"{where}: its images are {kinds}, not numbers")
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    whole = all(array.dtype.kind != "f" for array in arrays)
    if low >= 0 and high <= 1:
        factor = 255.0
    elif low >= 0 and high <= 255:
        factor = 1.0
    elif whole and low >= 0 and 1 << 15 <= high < 1 << 16:
        factor = 255 / 65535
    else:
        raise UserError(
            f"{where}: its images are {kinds} with values from {low:g} to {high:g}, but must be in"
            " 0..1 or 0..255, or use the whole range of 16 bits; bring them to one of these"
        )
    return [_scaled(array, factor) for array in arrays]


def _scaled(array: Array, factor: float) -> Images:
    if array.dtype == np.uint8 and factor == 1:
        return array
    scaled = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK].astype(np.float64)
        scaled[start : start + CHUNK] = np.rint(part * factor)
    return scaled


def as_labels(
    where: str, arrays: list[Array | None], images: list[Images]
) -> tuple[list[Labels], list[str] | None]:
    """Labels as numbers from 0, -1 where there are none, and the names of the classes.

    Labels are whole numbers or names; a missing array, NaN, -1 and "" are none. Raises UserError
    on others.
    """
    try:
        found = [
            (np.char.decode(array) if array.dtype.kind == "S" else array).reshape(-1).tolist()
            for array in arrays
            if array is not None
        ]
        # NaN is the only value that differs from itself.
        meanings = {
            value: None if value != value else as_label(value)
            for value in {value for values in found for value in values}
        }
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: a label is neither a whole number nor a name ({error})"
        ) from None
    labels = {label for label in meanings.values() if label is not None}
    names = class_names(labels)
    order = {name: number for number, name in enumerate(names or [])}
    numbers = {
        value: -1 if label is None else order[str(label)] if names else int(label)
        for value, label in meanings.items()
    }
    values = iter(found)
    return [
        np.full(len(pixels), -1, dtype=np.int64)
        if array is None
        else np.array([numbers.get(value, -1) for value in next(values)], dtype=np.int64)
        for array, pixels in zip(arrays, images, strict=True)
    ], names
