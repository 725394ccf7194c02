"""A small data set whose images show their numbers."""

from typing import Any, ClassVar

import numpy as np
import pytest

from pipeline.data import DataSet
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import Images, ImageSource, Labels
from pipeline.storage.base import Storage
from tests.pipeline.images import write_shard

SHARDS = {"train": (7, 12, 1, 20, 10), "valid": (9,), "test": (4, 5)}
BLOCK_SIZE = 4


class NumberedImages(ImageSource):
    """RGB images of 2 x 3 pixels: value i of image n is (n + i) mod 256, and its label n mod 10."""

    description: ClassVar[dict[str, Any]] = {"source": "numbered"}
    image_shape = (3, 2, 3)
    num_classes = 10
    splits: ClassVar[dict[str, int]] = {split: sum(sizes) for split, sizes in SHARDS.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        numbers = np.arange(start, stop)
        images = (numbers[:, None] + np.arange(18)) % 256
        # The place counts in the order of a tensor, channels first.
        return images.astype(np.uint8).reshape(-1, 3, 2, 3).transpose(0, 2, 3, 1), numbers % 10


def write(storage: Storage) -> DataSet:
    """Write the numbered images to ``storage``."""
    splits = {}
    for split, sizes in SHARDS.items():
        ends = np.cumsum(sizes).tolist()
        splits[split] = tuple(
            write_shard(
                storage,
                NumberedImages(),
                split,
                f"{split}/{number:05d}.tar",
                end - size,
                end,
                BLOCK_SIZE,
            )
            for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
        )
    manifest = Manifest("numbered", (3, 2, 3), 10, BLOCK_SIZE, splits)
    manifest.publish(storage)
    return DataSet(storage, manifest)


@pytest.fixture
def numbered(storage: Storage) -> DataSet:
    """The numbered images in ``storage``."""
    return write(storage)
