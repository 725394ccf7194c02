"""``.npz`` files, numpy's archives of arrays."""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.sources.arrays import Array, ArraySource, check_fits
from pipeline.data.sources.base import SPLITS, local_path, required_path
from pipeline.data.sources.names import NAMES
from pipeline.errors import UserError

IMAGES = ("images", "image", "imgs", "img", "x", "data")
LABELS = ("labels", "label", "y", "targets", "target")
"""Usual names of arrays, in lower case, also with the name of a split before or after them."""
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile and numpy raise on archives that ``numpy.savez`` did not write."""


class NpzSource(ArraySource):
    """An ``.npz`` file of images and labels, under any of the usual names.

    ``images`` and ``labels``; ``x_train``, ``y_train``, ``x_test``, ``y_test`` (Keras);
    ``train_images``, ``train_labels``, ``val_images``, ... (MedMNIST). The shapes and types of
    arrays are those that ``ArraySource`` takes.
    """

    _kind = "npz"

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "NpzSource":
        path = local_path(required_path(dataset))
        return cls(path, options.valid_fraction, options.test_fraction)

    def __init__(self, path: Path, valid_fraction: float, test_fraction: float) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if name.endswith(".npy")]
                held = {name.removesuffix(".npy"): name for name in members}
                names = _choose(list(held))
                if "train" not in names:
                    raise UserError(
                        f"{path} has no training images: it holds {', '.join(held) or 'no array'},"
                        " but images or x_train is needed"
                    )
                chosen = [name for pair in names.values() for name in pair if name is not None]
                headers = {name: _header(path, archive, held[name]) for name in chosen}
                total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
                check_fits(str(path), (total,), np.uint8)
                arrays = {name: _read(archive, held[name]) for name in chosen}
        except MemoryError:
            raise UserError(f"cannot read {path}: its arrays do not fit in memory") from None
        except UNREADABLE as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot read {path}: {error}") from None
        found: dict[str, tuple[Array, Array | None]] = {
            split: (arrays[images], None if labels is None else arrays[labels])
            for split, (images, labels) in names.items()
        }
        fractions = {"valid": valid_fraction, "test": test_fraction}
        super().__init__(str(path), found, dict.fromkeys(found, "name of the array"), fractions)
        if unused := [name for name in held if name not in chosen]:
            self.account.notes.append(f"arrays that are not used: {', '.join(unused)}")


def _choose(held: list[str]) -> dict[str, tuple[str, str | None]]:
    """By split, the names of the arrays of images and of labels."""
    by_name = {name.lower(): name for name in held}

    def first(split: str, kinds: tuple[str, ...]) -> str | None:
        forms = [form for name in NAMES[split] for form in (f"{name}_{{}}", f"{{}}_{name}")]
        forms = ["{}", *forms] if split == "train" else forms
        names = (form.format(kind) for form in forms for kind in kinds)
        return next((by_name[name] for name in names if name in by_name), None)

    found = {split: (first(split, IMAGES), first(split, LABELS)) for split in SPLITS}
    return {split: (images, labels) for split, (images, labels) in found.items() if images}


def _header(
    path: Path, archive: zipfile.ZipFile, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and dtype of an array, whose size the archive has to confirm."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read")
        check_fits(f"{path}: {name}", shape, dtype)
        if file.tell() + math.prod(shape) * dtype.itemsize != size:
            raise ValueError(
                f"{name} is damaged: its header says {dtype} of the shape {shape}, but it has"
                f" {size} bytes"
            )
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        return npy.read_array(file, allow_pickle=False)
