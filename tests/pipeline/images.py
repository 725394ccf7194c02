"""Writes small shards, IDX files and folders of images for tests."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.sections import Encoding
from pipeline.data import writer
from pipeline.data.records import Shard
from pipeline.data.sources.base import ImageSource
from pipeline.storage.base import Storage


def write_shard(
    storage: Storage,
    source: ImageSource,
    split: str,
    name: str,
    start: int,
    stop: int,
    block_size: int,
) -> Shard:
    """Write images ``start`` to ``stop`` of a split to one shard of blocks, with its index."""
    images, labels = source.read(split, start, stop)
    return writer.write_images(storage, name, start, images, labels, block_size, Encoding.npy)


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(size.to_bytes(4, "big") for size in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx(
    folder: Path, num_train: int = 60, num_test: int = 10, seed: int = 0, packed: bool = False
) -> dict[str, np.ndarray]:
    """The four files, with random images of 5 x 4; returns the arrays by the file's name."""
    random = np.random.default_rng(seed)
    arrays = {
        "train-images-idx3-ubyte": random.integers(0, 256, (num_train, 5, 4)),
        "train-labels-idx1-ubyte": np.arange(num_train) % 3,
        "t10k-images-idx3-ubyte": random.integers(0, 256, (num_test, 5, 4)),
        "t10k-labels-idx1-ubyte": np.arange(num_test) % 3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return arrays


def write_images(
    folder: Path, names: list[str], size: tuple[int, int] = (6, 4), mode: str = "RGB"
) -> None:
    """Image files of one colour each, ``size`` being width and height."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = number % 256
        Image.new(mode, size, (grey, 255 - grey, 7) if mode == "RGB" else grey).save(path)
