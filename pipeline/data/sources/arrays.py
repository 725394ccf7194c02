"""Image sources held in memory: IDX files and ``.npz`` arrays."""

import gzip
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.sources.base import (
    SPLITS,
    Images,
    ImageSource,
    Labels,
    content_sha256,
    hash_fraction,
    local_path,
    required_path,
)
from pipeline.errors import UserError
from pipeline.values import JsonObject


def _last_part(count: int, fraction: float) -> int:
    """Where the last ``fraction`` of ``count`` images begins; neither part is empty."""
    return min(max(round(count * (1 - fraction)), 1), count - 1)


class ArraySource(ImageSource):
    """Images in memory."""

    _arrays: dict[str, tuple[Images, Labels]]
    """By split: images ``(n, height, width, channels)`` and labels ``(n,)``."""
    _kind: str

    @cached_property
    def description(self) -> JsonObject:
        return {"source": self._kind, "images": self.splits, "sha256": content_sha256(self._arrays)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self._arrays["train"][0].shape
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        return 1 + max(int(labels.max(initial=-1)) for _, labels in self._arrays.values()) or None

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(labels) for split, (_, labels) in self._arrays.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = self._arrays[split]
        return images[start:stop], labels[start:stop]


class IdxSource(ArraySource):
    """The four IDX files in which MNIST, Fashion-MNIST, KMNIST and others are published.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``,
    ``t10k-labels-idx1-ubyte``, plain or gzipped as ``.gz``. The last ``valid_fraction`` of the
    training file is the split ``valid``.
    """

    _kind = "idx"

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "IdxSource":
        path = local_path(required_path(dataset))
        if not path.is_dir():
            raise UserError(f"dataset.path={dataset.path} is not a folder")
        return cls(path, options.valid_fraction)

    def __init__(self, path: Path, valid_fraction: float) -> None:
        train_images, train_labels = _read_idx_pair(path, "train")
        test_images, test_labels = _read_idx_pair(path, "t10k")
        if train_images.shape[1:] != test_images.shape[1:]:
            raise UserError(
                f"{path}: training images are {train_images.shape[1:]}, but test images"
                f" {test_images.shape[1:]}"
            )
        if len(train_images) < 2:
            raise UserError(
                f"{path} has {len(train_images)} training images; there must be 2 at least, for"
                " train and valid"
            )
        cut = _last_part(len(train_images), valid_fraction)
        self._arrays = {
            "train": (train_images[:cut], train_labels[:cut]),
            "valid": (train_images[cut:], train_labels[cut:]),
            "test": (test_images, test_labels),
        }


def _read_idx_pair(folder: Path, part: str) -> tuple[Images, Labels]:
    """Images ``(n, height, width, 1)`` and labels ``(n,)``."""
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"{folder}: {part}-images-idx3-ubyte has {len(images)} images, but there are"
            f" {len(labels)} labels"
        )
    if not images.size:
        raise UserError(f"{folder}: {part}-images-idx3-ubyte holds no images")
    return images[..., None], labels.astype(np.int64)


def _read_idx(folder: Path, name: str, dimensions: int) -> Images:
    """The array of one IDX file.

    Its format: two zero bytes, the type (8: bytes), the number of dimensions, 4 big-endian bytes
    for each dimension, the data.
    """
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"there is no {name} or {name}.gz in {folder}")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it begins"
            f" with {content[:4].hex(' ')}"
        )
    shape = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
    data = np.frombuffer(content, dtype=np.uint8, offset=header)
    if data.size != np.prod(shape, dtype=object):  # object: Python's integers do not overflow
        raise UserError(
            f"{path} is damaged: its header says {shape}, but {data.size} bytes of data follow"
        )
    return data.reshape(shape)


class NpzSource(ArraySource):
    """An ``.npz`` file of images and labels, under any of the usual names.

    ``images`` and ``labels``; ``x_train``, ``y_train``, ``x_test``, ``y_test`` (Keras);
    ``train_images``, ``train_labels``, ``val_images``, ... (MedMNIST). Images are bytes of shape n
    x height x width, x channels, or n x channels x height x width. Splits that the file does not
    have are taken from the training images by the hash of their number.
    """

    _kind = "npz"
    _names: ClassVar = {
        "train": (
            ("images", "labels"),
            ("x_train", "y_train"),
            ("train_images", "train_labels"),
            ("x", "y"),
        ),
        "valid": (
            ("x_valid", "y_valid"),
            ("x_val", "y_val"),
            ("val_images", "val_labels"),
            ("valid_images", "valid_labels"),
        ),
        "test": (("x_test", "y_test"), ("test_images", "test_labels")),
    }

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "NpzSource":
        path = local_path(required_path(dataset))
        return cls(path, options.valid_fraction, options.test_fraction)

    def __init__(self, path: Path, valid_fraction: float, test_fraction: float) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {
                    split: (file[images], file[labels] if labels in file.files else None)
                    for split, pairs in self._names.items()
                    for images, labels in pairs
                    if images in file.files
                }
                held = file.files
        except (
            OSError,
            ValueError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            AttributeError,
            TypeError,
        ) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if "train" not in found:
            raise UserError(
                f"{path} has no training images: it holds {', '.join(held)}, but images or x_train"
                " is needed"
            )
        self._arrays = {
            split: _checked_arrays(path, *found[split]) for split in SPLITS if split in found
        }
        for split, fraction in (("test", test_fraction), ("valid", valid_fraction)):
            if split not in self._arrays:
                images, labels = self._arrays["train"]
                places = [hash_fraction(f"{split} {number}") for number in range(len(labels))]
                chosen = np.array([place < fraction for place in places], dtype=bool)
                self._arrays[split], self._arrays["train"] = (
                    (images[chosen], labels[chosen]),
                    (images[~chosen], labels[~chosen]),
                )
        self._arrays = {split: self._arrays[split] for split in SPLITS}
        for split, (images, _) in self._arrays.items():
            if not len(images):
                raise UserError(
                    f"{path}: none of its images falls to {split}; add images or change"
                    " shard.*_fraction"
                )
        if len({images.shape[1:] for images, _ in self._arrays.values()}) > 1:
            raise UserError(f"{path}: its splits have images of different shapes")


def _checked_arrays(path: Path, images: Any, labels: Any) -> tuple[Images, Labels]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"{path}: its images are {images.dtype} of shape {images.shape}, but must be uint8 in 3"
            " or 4 dimensions"
        )
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[3] not in (1, 3):
        raise UserError(
            f"{path}: its images have shape {images.shape}, where no dimension is 1 or 3 channels"
        )
    if labels is None:
        return images, np.full(len(images), -1, dtype=np.int64)
    if (
        labels.size != len(images)
        or not np.issubdtype(labels.dtype, np.integer)
        or labels.min(initial=0) < 0
    ):
        raise UserError(
            f"{path}: {len(images)} images need as many labels, whole numbers from 0, but they are"
            f" {labels.dtype} of shape {labels.shape}"
        )
    return images, labels.reshape(-1).astype(np.int64)
