"""What a data set is: ``manifest.json``, its shards, and each shard's index of records.

::

    manifest.json            the shape of the images, and per split its shards: name, size, number of samples, checksums
    train/00000.tar          a WebDataset tar; each record holds a block of images and their labels
    train/00000.index.json   where each record of that tar begins, how long it is, how many samples it holds, its sha256

The manifest is written last: a data set exists when it is there. Nothing in it grows with the number of samples; what
does is in the index, read when its shard is opened.

A record is one WebDataset sample, KEY, of two members: ``KEY.images.npy``, uint8 ``(num_samples, channels, height, width)``,
and ``KEY.labels.npy``, int64 ``(num_samples,)``, -1 where there is no label. Records follow each other without a gap, so
any run of them is one range of bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.storage import ObjectNotFound, Storage

VERSION = 1
ENCODING = "npy"
MANIFEST_KEY = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar, and its index."""

    name: str  # its key, such as train/00000.tar
    size: int  # in bytes
    sha256: str
    num_samples: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.json"


@dataclass(frozen=True)
class Manifest:
    """A data set."""

    name: str
    image_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int | None  # none: there are no labels
    block_size: int  # samples of a record; the last of a shard may hold fewer
    splits: dict[str, tuple[Shard, ...]]
    source: dict[str, Any] = field(default_factory=dict)  # what it was made from, and how
    encoding: str = ENCODING
    version: int = VERSION

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Raises ``UserError`` if there is no such split."""
        if split not in self.splits:
            raise UserError(f"data set {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def num_samples(self, split: str) -> int:
        return sum(shard.num_samples for shard in self.shards(split))

    @property
    def digest(self) -> str:
        """The sha256 of the manifest: it stands for all of the data, since it holds the shards' own."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def publish(self, storage: Storage) -> None:
        """Make the data set exist, when everything that it names is in place."""
        storage.write_json(MANIFEST_KEY, asdict(self))


def load(storage: Storage) -> Manifest:
    """The data set in ``storage``.

    Raises ``UserError`` if there is none, or one that is damaged or of another version.
    """
    try:
        content = storage.read_json(MANIFEST_KEY)
    except ObjectNotFound:
        raise ObjectNotFound(f"there is no data set at {storage.url}; make one with: vlae shard dataset=NAME") from None
    url = f"{storage.url}/{MANIFEST_KEY}"
    found = tuple(content.get(key) for key in ("version", "encoding")) if isinstance(content, dict) else (None, None)
    if found != (VERSION, ENCODING):
        raise UserError(f"{url} has format {found}, but this program reads {(VERSION, ENCODING)}; use the one that made it")
    try:
        splits = {split: tuple(Shard(**shard) for shard in shards) for split, shards in content.pop("splits").items()}
        channels, height, width = content.pop("image_shape")
        return Manifest(**content, splits=splits, image_shape=(channels, height, width))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url} is damaged ({error}); delete it and run vlae shard again") from None


@dataclass(frozen=True)
class Index:
    """The records of one shard; every array has shape ``(num_records,)``, but ``starts`` one more."""

    offset: npt.NDArray[np.int64]  # in bytes
    size: npt.NDArray[np.int64]  # in bytes
    sha256: tuple[str, ...]
    starts: npt.NDArray[np.int64]  # each record's first sample, and the number of all

    @staticmethod
    def to_bytes(offset: list[int], size: list[int], num_samples: list[int], sha256: list[str]) -> bytes:
        """The index object, from one value for each record."""
        columns = {"offset": offset, "size": size, "num_samples": num_samples, "sha256": sha256}
        return json.dumps(columns, separators=(",", ":")).encode()

    @classmethod
    def load(cls, storage: Storage, shard: Shard) -> "Index":
        """A shard's index. Raises ``UserError`` if it is missing or is not the one that the manifest names."""
        content = storage.read(shard.index_name)
        actual = hashlib.sha256(content).hexdigest()
        if actual != shard.index_sha256:
            raise UserError(
                f"{storage.url}/{shard.index_name} is damaged: its sha256 is {actual}, the manifest says {shard.index_sha256}; "
                f"delete {MANIFEST_KEY} beside it and run vlae shard again"
            )
        columns = json.loads(content)
        starts = np.concatenate([[0], np.cumsum(columns["num_samples"])]).astype(np.int64)
        offset, size = (np.array(columns[name], dtype=np.int64) for name in ("offset", "size"))
        return cls(offset, size, tuple(columns["sha256"]), starts)
