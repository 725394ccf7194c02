"""IDX files, the format of MNIST and of the data sets that followed it."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.sources.arrays import Array, ArraySource, check_fits
from pipeline.data.sources.base import Images, local_path, required_path
from pipeline.errors import UserError

NAME = re.compile(
    r"(?P<set>.*[-_.])?(?P<part>train|t10k|test)[-_.](?P<what>images|labels)[-_.]idx[13][-_.]ubyte"
    r"(?P<packed>\.gz)?",
    re.IGNORECASE,
)


class IdxSource(ArraySource):
    """The four IDX files in which MNIST, Fashion-MNIST, KMNIST, EMNIST and others are published.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``,
    ``t10k-labels-idx1-ubyte``, plain or gzipped as ``.gz``, also with dots for dashes, ``test`` for
    ``t10k``, and the name of the data set in front. The last ``valid_fraction`` of the training
    file is the split ``valid``. Without test files, the split ``test`` is taken from the training
    images; without any labels, there are none.
    """

    _kind = "idx"

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "IdxSource":
        path = local_path(required_path(dataset))
        if not path.is_dir():
            raise UserError(f"dataset.path={dataset.path} is not a folder")
        return cls(path, options.valid_fraction, options.test_fraction)

    def __init__(self, path: Path, valid_fraction: float, test_fraction: float = 0.1) -> None:
        files, unused = _find(path)
        if ("train", "images") not in files:
            name = "train-images-idx3-ubyte"
            raise UserError(f"there is no {name} or {name}.gz in {path}")
        parts = [part for part in ("train", "test") if (part, "images") in files]
        missing = [part for part in parts if (part, "labels") not in files]
        if ("test", "labels") in files and "test" not in parts:
            raise UserError(f"{path} has labels for test, but no t10k-images-idx3-ubyte")
        if missing and len(missing) < len(parts):
            other = files[next(part for part in parts if part not in missing), "labels"]
            raise UserError(
                f"{path} has no labels for {missing[0]}, but {other.name}; add these, or remove it"
            )
        arrays: dict[str, tuple[Array, Array | None]] = {
            part: (
                _read(files[part, "images"], dimensions=3),
                None if missing else _read(files[part, "labels"], dimensions=1),
            )
            for part in parts
        }
        for part, (images, labels) in arrays.items():
            if labels is not None and len(images) != len(labels):
                raise UserError(
                    f"{files[part, 'images']} has {len(images)} images, but there are {len(labels)}"
                    " labels"
                )
            if not images.size:
                raise UserError(f"{files[part, 'images']} holds no images")
        images, labels = arrays["train"]
        if len(images) < 2:
            raise UserError(
                f"{path} has {len(images)} training images; there must be 2 at least, for train and"
                " valid"
            )
        cut = min(max(round(len(images) * (1 - valid_fraction)), 1), len(images) - 1)
        found = {
            **arrays,
            "train": (images[:cut], None if labels is None else labels[:cut]),
            "valid": (images[cut:], None if labels is None else labels[cut:]),
        }
        origins = dict.fromkeys(found, "file name") | {"valid": "the end of the training file"}
        super().__init__(str(path), found, origins, {"test": test_fraction})
        if unused:
            self.account.notes.append(f"other files in {path}: {', '.join(unused[:5])}")


def _find(folder: Path) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """The files of each part, by (part, images or labels), and the names of all others.

    Raises UserError if the folder holds several data sets.
    """
    files: dict[tuple[str, str], Path] = {}
    sets: dict[str, str] = {}
    unused = []
    for path in sorted(folder.iterdir()):  # a plain file comes before its .gz
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            unused.append(path.name)
            continue
        sets.setdefault((match["set"] or "").lower(), path.name)
        part = "train" if match["part"].lower() == "train" else "test"
        role = part, match["what"].lower()
        if role not in files:
            files[role] = path
        elif files[role].name.lower() != path.name.lower().removesuffix(".gz"):
            sets.setdefault(path.name, path.name)
        else:
            unused.append(path.name)
    if len(sets) > 1:
        raise UserError(
            f"{folder} holds several data sets ({', '.join(sets.values())}); put the files of one"
            " into a folder of its own"
        )
    return files, unused


def _read(path: Path, dimensions: int) -> Images:
    """The array of one IDX file, of which no more is unpacked than its header says.

    Its format: two zero bytes, the type (8: bytes), the number of dimensions, 4 big-endian bytes
    for each dimension, the data.
    """
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise UserError(
                    f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it"
                    f" begins with {header[:4].hex(' ')}"
                )
            shape = tuple(np.frombuffer(header[4:], dtype=">u4").tolist())
            if not packed:
                _check_size(path, shape, path.stat().st_size - len(header))
            size = check_fits(str(path), shape, np.uint8)
            data = np.frombuffer(file.read(size + 1), dtype=np.uint8)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        reason = str(error) or "it does not fit in memory"
        raise UserError(f"cannot read {path}: {reason}") from None
    _check_size(path, shape, data.size)
    return data.reshape(shape)


def _check_size(path: Path, shape: tuple[int, ...], found: int) -> None:
    expected = int(np.prod(shape, dtype=object))  # object: Python's integers do not overflow
    if found != expected:
        count = f"{found} bytes" if found < expected else f"more than {expected} bytes"
        raise UserError(f"{path} is damaged: its header says {shape}, but {count} of data follow")
