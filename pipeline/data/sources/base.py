"""The contract of an image source: labelled images in three splits."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config.sections import Binarization, DatasetOptions
from pipeline.data.images import BadImage
from pipeline.data.sources.account import Account
from pipeline.errors import UserError
from pipeline.values import JsonObject

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


class ImageSource(ABC):
    """Labelled images in three splits. Any method may raise ``UserError``, naming the file."""

    @property
    @abstractmethod
    def description(self) -> JsonObject:
        """JSON values that are equal for equal images in equal splits, wherever they are stored."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """The number of classes; None if there are no labels."""

    @property
    @abstractmethod
    def splits(self) -> dict[str, int]:
        """The number of images of ``train``, ``valid`` and ``test``."""

    @property
    def class_names(self) -> list[str] | None:
        """The name of each label; None if the classes have no names."""
        return None

    @property
    def binarization(self) -> Binarization:
        """How models see its images unless they are told otherwise.

        ``auto``: black and white ones as they are, others as 256 values.
        """
        return Binarization.auto

    @property
    def account(self) -> Account:
        """What was found, and what became of it. By default everything is used."""
        return self._account

    @cached_property
    def _account(self) -> Account:
        return Account(
            used=sum(self.splits.values()),
            origins=dict.fromkeys(SPLITS, "the source itself"),
            unlabelled=self.num_unlabelled,
        )

    @property
    def num_unlabelled(self) -> int:
        """Images without a label, if others have one."""
        return 0

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to prepare)
        """Fetch and read what all shards share, once, before ``image_shape`` is asked for and the
        source is sent to tasks.
        """

    def part(self, split: str, start: int, stop: int) -> "ImageSource":
        """A source with at least these images, under the same numbers, to send to one task."""
        return self

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        """Images uint8 ``(n, height, width, channels)`` and labels int64 ``(n,)``, -1 where there
        are none.
        """

    def examine(self, split: str, start: int, stop: int) -> Iterator[tuple[Images | BadImage, int]]:
        """Each image in turn: pixels ``(height, width, channels)`` or its error, and its label."""
        images, labels = self.read(split, start, stop)
        yield from zip(images, labels.tolist(), strict=True)

    def key(self, split: str, number: int) -> str:
        """The name of an image in messages and reports."""
        return f"{split}/{number}"

    def names(self, split: str, start: int, stop: int) -> list[str] | None:
        """The names of images in the source; None if they have none."""
        return None

    def unreadable(self, split: str, number: int, reason: BadImage) -> UserError:
        """The error for an image that cannot be read."""
        return UserError(f"cannot read {self.key(split, number)} ({reason}); mend or remove it")


def required_path(dataset: DatasetOptions) -> str:
    """``dataset.path``. Raises ``UserError`` if it is not set."""
    if not dataset.path:
        raise UserError(
            f"dataset.source={dataset.source.value} needs dataset.path, where its files are"
        )
    return dataset.path


def local_path(path: str) -> Path:
    """The absolute path of a local file or folder."""
    return Path(path).expanduser().absolute()


def content_sha256(arrays: dict[str, tuple[Images, Labels]]) -> str:
    """The sha256 of all images and labels, split by split."""
    content = hashlib.sha256()
    for split in SPLITS:
        for array in arrays[split]:
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def hash_fraction(key: str) -> float:
    """A hash of the key as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:6]) / 2**48
