"""A data set of small images that a model learns in seconds, and the options of a run on it."""

from typing import Any, ClassVar

import numpy as np

from pipeline import commands
from pipeline.config import run
from pipeline.data import DataSet
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import Images, ImageSource, Labels
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.pipeline.images import write_shard

SIZE = 8
SHARDS = {"train": (50, 46), "valid": (20,), "test": (7, 6)}

TINY = [
    "model=tiny",
    "dataset.name=strokes",
    "train=short",
    "train.global_batch=8",
    "train.num_streams=4",
    "train.images=240",
    "train.valid_images=20",
    "train.valid_every=80",
    "train.report_seconds=0",
    "train.checkpoint_seconds=0",
    "optim.warmup_steps=5",
    "optim.ema_decay=0.9",
]
"""30 steps in 3 parts; after the tenth, each step is reported and leaves a checkpoint."""


class Strokes(ImageSource):
    """Grey images of 8 x 8 with a horizontal or vertical bar, which is the label."""

    description: ClassVar[dict[str, Any]] = {"source": "strokes"}
    image_shape = (1, SIZE, SIZE)
    num_classes = 2
    splits: ClassVar[dict[str, int]] = {split: sum(sizes) for split, sizes in SHARDS.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images = np.empty((stop - start, SIZE, SIZE, 1), np.uint8)
        labels = np.empty(stop - start, np.int64)
        for index, number in enumerate(range(start, stop)):
            random = np.random.default_rng([list(SHARDS).index(split), number])
            picture = random.integers(0, 40, (SIZE, SIZE))
            place = random.integers(1, SIZE - 2)
            picture[place : place + 2, 1:-1] = random.integers(200, 256)
            labels[index] = random.integers(2)
            images[index, :, :, 0] = picture.T if labels[index] else picture
        return images, labels


def write(storage: Storage) -> DataSet:
    """Write the data set to ``storage``."""
    splits = {}
    for split, sizes in SHARDS.items():
        ends = np.cumsum(sizes).tolist()
        splits[split] = tuple(
            write_shard(storage, Strokes(), split, f"{split}/{number:05d}.tar", end - size, end, 16)
            for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
        )
    manifest = Manifest(
        "strokes", Strokes.image_shape, Strokes.num_classes, 16, splits, binarization="dynamic"
    )
    manifest.publish(storage)
    return DataSet(storage, manifest)


def train_config(root: str, *overrides: str) -> run.TrainConfig:
    """The options of a run on the data set below ``root``, which need not exist yet."""
    return commands.load("train", [*TINY, f"storage.root={root}", *overrides])


def data_storage(root: str) -> Storage:
    """The storage of the data set of ``train_config``."""
    return open_storage(f"{root}/datasets/strokes")
