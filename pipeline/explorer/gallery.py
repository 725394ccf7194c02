"""The images that the page offers: those of a split, by number or name, and what its user drew."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from pipeline.data import DataSet
from pipeline.data.batch import Batch, pick
from pipeline.data.reader import Images, Reader
from pipeline.errors import UserError

KEPT = 64
"""The images that are kept decoded."""


class Gallery:
    """The images of a split. Thread-safe. Raises UserError if there is no such split."""

    def __init__(self, data: DataSet, split: str, num_known: int) -> None:
        """``num_known``: how many images, the first ones, are found by their names."""
        self.data, self.split = data, split
        self.size = data.manifest.num_samples(split)
        self.num_known = min(num_known, self.size)
        self._reader = Reader(data, split)
        self.image = lru_cache(maxsize=KEPT)(lambda sample: self.read([sample]))
        """One image as ``read`` gives it, which is kept: the page asks often about the same."""
        if not self.size:
            raise UserError(
                f"split {split} of data set {data.manifest.name} has no images; choose another with"
                f" split=, one of {', '.join(data.manifest.splits)}"
            )

    def read(self, samples: Sequence[int]) -> Batch:
        """The images with these numbers, in this order.

        Raises UserError if there is no such image, or it is missing or damaged in storage.
        """
        for sample in samples:
            if not 0 <= sample < self.size:
                raise UserError(
                    f"there is no image {sample}; those of split {self.split} are 0 to"
                    f" {self.size - 1}"
                )
        return pick(self._reader, samples)

    def drawn(self, pixels: Images) -> Batch:
        """An image that is not of the data set: uint8 of shape (channels, height, width)."""
        number = np.zeros(1, dtype=np.int64)
        label = torch.full((1,), -1, dtype=torch.int64)
        return Batch(0, torch.from_numpy(pixels)[None], label, number, number)

    def names(self, samples: Sequence[int]) -> list[str] | None:
        """The names that images had in their source; None if they had none."""
        return self._reader.keys(np.array(samples, dtype=np.int64))

    def find(self, text: str, after: int) -> int:
        """The number of the next image whose name contains ``text``, searched from ``after`` on.

        The search begins anew at its end, and ignores case. Raises UserError if there is none.
        """
        if self._known_names is None:
            raise UserError("the images of this data set have no names; give a number")
        found = [
            number for number, name in enumerate(self._known_names) if text.lower() in name.lower()
        ]
        if not found:
            raise UserError(
                f"none of the first {self.num_known:,} images has a name with {text[:60]!r} in it;"
                " give another part of a name, or a number"
            )
        return next((number for number in found if number > after), found[0])

    @cached_property
    def _known_names(self) -> list[str] | None:
        return self.names(range(self.num_known))
