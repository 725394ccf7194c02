"""The manifest of a data set: its shards, and the index of records of each shard.

::

    manifest.json            the images' shape, and per split its shards: name, size, number of
                             samples, checksums
    train/00000.tar          a WebDataset tar; each record holds a block of images and their labels,
                             or one image
    train/00000.index.json   the offset, size, number of samples and checksum of each record of that
                             tar
    pages/...                the list of shards, if it is too long for manifest.json

The manifest is written last: a data set exists once it is there. Nothing in it grows with the
number of samples; what does is in an index, which is read when its shard is opened. Shards may also
be elsewhere and belong to someone else (``vlae index``): then their names are whole addresses, and
only the indices are beside the manifest.

The encoding says what a record is:

``npy``
    one WebDataset sample, KEY, of two members: ``KEY.images.npy``, uint8 ``(num_samples, channels,
    height, width)``, and ``KEY.labels.npy``, int64 ``(num_samples,)``, -1 where there is no label.
    Records follow each other without a gap.
``image``
    the content of one member, an image file (PNG, JPEG, WebP) or an array (``.npy``); the index
    holds its label too.

Either way any run of records is one range of bytes.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, TypeVar, get_args, overload

import numpy as np
import numpy.typing as npt

from pipeline.data.images import MAX_PIXELS, Fit
from pipeline.errors import UserError
from pipeline.storage.base import ObjectNotFound, Storage, to_json
from pipeline.storage.recipe import differing
from pipeline.values import JsonObject

VERSION = 3
ENCODINGS = ("npy", "image")
PIXELS = ("binary", "values")
BINARIZATIONS = ("dynamic", "static", "none")
MANIFEST_KEY = "manifest.json"
REMEDY = (
    "delete manifest.json there and run again the command that made it, vlae shard or vlae index"
)
PAGE = 10_000
"""Shards of a page; a split with more shards is stored in pages."""
Integers = npt.NDArray[np.int64]
Row = TypeVar("Row", "Shard", "Page")


@dataclass(frozen=True)
class Shard:
    """One tar, and its index."""

    name: str
    """Its key, such as train/00000.tar, or its address, such as s3://bucket/train/00000.tar."""
    size: int  # in bytes
    sha256: str
    num_samples: int
    index_name: str  # the index's key
    index_sha256: str


@dataclass(frozen=True)
class Page:
    """Up to ``PAGE`` shards of a split, in a Parquet file."""

    name: str  # its key
    num_shards: int
    sha256: str


class PagedShards(Sequence[Shard]):
    """The shards of a large split: memory holds their numbers of samples, and the pages in use."""

    def __init__(
        self, storage: Storage, pages: tuple[Page, ...], sizes_name: str, sizes_sha256: str
    ) -> None:
        self.pages, self.sizes_name, self.sizes_sha256 = pages, sizes_name, sizes_sha256
        self._storage = storage
        self._ends = np.cumsum([page.num_shards for page in pages])
        self._page = lru_cache(maxsize=16)(self._load)

    def __reduce__(self) -> tuple[Any, ...]:
        return PagedShards, (self._storage, self.pages, self.sizes_name, self.sizes_sha256)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        page = int(np.searchsorted(self._ends, index, side="right"))
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index - int(self._ends[page]) + self.pages[page].num_shards
        return Shard(**self._page(page).slice(row, 1).to_pylist()[0])

    @cached_property
    def num_samples(self) -> Integers:
        """The number of samples of every shard, ``(num_shards,)``."""
        content = read_verified(self._storage, self.sizes_name, self.sizes_sha256)
        return np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64, copy=False)

    def _load(self, page: int) -> Any:
        import pyarrow.parquet  # 40 MB that only data sets with pages need

        content = read_verified(self._storage, self.pages[page].name, self.pages[page].sha256)
        # Not read_table, which takes longer to load the rest of pyarrow than to read a page.
        return pyarrow.parquet.ParquetFile(io.BytesIO(content)).read(use_threads=False)

    @classmethod
    def write(
        cls, storage: Storage, split: str, shards: Iterator[Shard] | Sequence[Shard]
    ) -> "PagedShards":
        """Write shards to pages below ``storage``, with one page in memory."""
        import pyarrow
        import pyarrow.parquet

        pages, counts, rows = list[Page](), list[int](), list[Shard]()

        def flush() -> None:
            file = io.BytesIO()
            table = pyarrow.table(
                {item.name: [getattr(row, item.name) for row in rows] for item in fields(Shard)}
            )
            pyarrow.parquet.write_table(table, file, compression="zstd")
            name = f"pages/{split}-{len(pages):05d}.parquet"
            storage.write(name, file.getvalue())
            pages.append(Page(name, len(rows), hashlib.sha256(file.getvalue()).hexdigest()))
            rows.clear()

        for shard in shards:
            rows.append(shard)
            counts.append(shard.num_samples)
            if len(rows) == PAGE:
                flush()
        if rows:
            flush()
        sizes = io.BytesIO()
        np.save(sizes, np.array(counts, dtype=np.uint32), allow_pickle=False)
        name = f"pages/{split}-sizes.npy"
        storage.write(name, sizes.getvalue())
        return cls(storage, tuple(pages), name, hashlib.sha256(sizes.getvalue()).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The description of a data set, as ``manifest.json`` holds it."""

    name: str
    image_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int | None  # None: there are no labels
    block_size: int  # samples of a record; the last of a shard may hold fewer
    splits: Mapping[str, Sequence[Shard]]
    source: JsonObject = field(default_factory=dict)
    """The recipe: the images that it was made from, and the options."""
    encoding: str = "npy"
    fit: Fit | None = None
    """How images of other shapes are brought to ``image_shape``; None: they are errors."""
    pixels: str = "values"
    """``binary`` if each is 0 or 255, as far as they were looked at, else ``values``."""
    binarization: str = "none"
    """How models see the pixels unless they are told otherwise: a value of ``Binarization``."""
    class_names: list[str] | None = None
    """The name of each label, if the source has names."""
    version: int = VERSION

    def shards(self, split: str) -> Sequence[Shard]:
        """The shards of a split. Raises ``UserError`` if there is no such split."""
        if split not in self.splits:
            raise UserError(
                f"data set {self.name} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]

    def shard_samples(self, split: str) -> Integers:
        """The number of samples of every shard of a split, ``(num_shards,)``."""
        shards = self.shards(split)
        if isinstance(shards, PagedShards):
            return shards.num_samples
        return np.array([shard.num_samples for shard in shards], dtype=np.int64)

    def num_samples(self, split: str) -> int:
        return int(self.shard_samples(split).sum())

    @property
    def digest(self) -> str:
        """The sha256 of the manifest, and so of all data: it holds the sha256 of every shard."""
        return _digest(self._content())

    def publish(self, storage: Storage) -> None:
        """Write the manifest, which makes the data set exist. Everything it names must be there.

        Raises UserError if there is another one: somebody else was faster.
        """
        content = to_json({**self._content(), "sha256": self.digest})
        if not storage.create(MANIFEST_KEY, content) and load(storage).digest != self.digest:
            raise UserError(
                f"another command has written the data set at {storage.url} meanwhile; choose"
                " another dataset.name"
            )

    def _content(self) -> JsonObject:
        """As JSON values."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            **content,
            "image_shape": list(self.image_shape),
            "splits": {k: _shards_to_json(v) for k, v in self.splits.items()},
        }


def _digest(content: JsonObject) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _shards_to_json(shards: Sequence[Shard]) -> Any:
    if not isinstance(shards, PagedShards):
        return [asdict(shard) for shard in shards]
    pages = [asdict(page) for page in shards.pages]
    return {"pages": pages, "sizes_name": shards.sizes_name, "sizes_sha256": shards.sizes_sha256}


def load(storage: Storage) -> Manifest:
    """The manifest in ``storage``.

    Raises ``UserError`` if there is none, or one that is damaged or of another version.
    """
    try:
        content = storage.read_json(MANIFEST_KEY)
    except ObjectNotFound:
        raise ObjectNotFound(
            f"there is no data set at {storage.url}; make one with: vlae shard dataset=NAME"
        ) from None
    url = f"{storage.url}/{MANIFEST_KEY}"
    remedy = "delete it and run again the command that made it, vlae shard or vlae index"
    if not isinstance(content, dict) or "version" not in content:
        raise UserError(f"{url} is damaged: it is not a manifest; {remedy}")
    if content["version"] != VERSION:
        raise UserError(
            f"{url} is of version {content['version']}, but this program reads version {VERSION};"
            f" {remedy}"
        )
    stated, actual = content.pop("sha256", None), _digest(content)
    if stated != actual:
        raise UserError(
            f"{url} is damaged or was edited: its sha256 is {actual}, but it states {stated};"
            f" {remedy}"
        )
    try:
        splits = {
            split: _shards_from_json(storage, listed)
            for split, listed in content.pop("splits").items()
        }
        channels, height, width = content.pop("image_shape")
        loaded = Manifest(**content, splits=splits, image_shape=(channels, height, width))
        _check(loaded)
        return loaded
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url} is damaged ({error}); {remedy}") from None


def _check(contents: Manifest) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless every value is possible."""
    if not contents.splits or math.prod(_counts(*contents.image_shape)) > 3 * MAX_PIXELS:
        raise ValueError("it has no splits, or impossible images")
    _counts(contents.block_size, 1 if contents.num_classes is None else contents.num_classes)
    if contents.encoding not in ENCODINGS or contents.fit not in (None, *get_args(Fit)):
        raise ValueError(f"its encoding is {contents.encoding!r}, and its fit {contents.fit!r}")
    if not isinstance(contents.name, str) or not isinstance(contents.source, dict):
        raise TypeError("its name is no name, or its source no source")
    if contents.pixels not in PIXELS or contents.binarization not in BINARIZATIONS:
        raise ValueError(
            f"its pixels are {contents.pixels!r}, and their binarization {contents.binarization!r}"
        )
    _check_class_names(contents)


def _check_class_names(contents: Manifest) -> None:
    names = contents.class_names
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("its class names are no names")
    if len(names) != contents.num_classes:
        raise ValueError(f"it names {len(names)} of {contents.num_classes} classes")


def _counts(*values: object) -> list[int]:
    for value in values:
        if type(value) is not int or value < 1:
            raise ValueError(f"{value!r} is not a count")
    return list(values)  # type: ignore[arg-type]


def load_made_by(storage: Storage, recipe: JsonObject) -> Manifest | None:
    """The manifest in ``storage``, or None if there is none.

    Raises ``UserError`` if the data set was made by another recipe.
    """
    if not storage.exists(MANIFEST_KEY):
        return None
    contents = load(storage)
    if changed := differing(contents.source, recipe):
        raise UserError(
            f"the data set at {storage.url} was made from other images or options"
            f" ({', '.join(changed)}); choose another dataset.name, or delete"
            f" {storage.url}/{MANIFEST_KEY} to write it anew"
        )
    return contents


def summary(contents: Manifest) -> JsonObject:
    """The sizes and the digest of a data set, as JSON values."""
    return {
        "image_shape": list(contents.image_shape),
        "num_classes": contents.num_classes,
        "pixels": contents.pixels,
        "binarization": contents.binarization,
        "splits": {
            split: {"images": contents.num_samples(split), "shards": len(shards)}
            for split, shards in contents.splits.items()
        },
        "bytes": sum(shard.size for shards in contents.splits.values() for shard in shards),
        "manifest_digest": contents.digest,
    }


def paginate(storage: Storage, split: str, shards: Sequence[Shard]) -> Sequence[Shard]:
    """Write the shards to pages if there are more than ``PAGE``; else return them as they are."""
    return tuple(shards) if len(shards) <= PAGE else PagedShards.write(storage, split, shards)


def _shards_from_json(storage: Storage, listed: Any) -> Sequence[Shard]:
    if isinstance(listed, dict):
        pages = tuple(_row_from_json(Page, page) for page in listed["pages"])
        _counts(*(page.num_shards for page in pages), len(pages))
        return PagedShards(storage, pages, str(listed["sizes_name"]), str(listed["sizes_sha256"]))
    return tuple(_row_from_json(Shard, shard) for shard in listed)


def _row_from_json(kind: type[Row], values: Any) -> Row:
    """A ``Shard`` or ``Page`` from JSON values. Raises ``ValueError`` if one has a wrong type."""
    made = kind(**values)
    for item in fields(made):
        value = getattr(made, item.name)
        if type(value) is not item.type or (item.type is int and not 0 <= value < 1 << 62):
            raise ValueError(f"{item.name} is {value!r}")
    return made


def read_verified(storage: Storage, key: str, sha256: str) -> bytes:
    """A small object that the manifest names. Raises ``UserError`` if it is missing or damaged."""
    for _ in range(2):  # if it was altered on the network, it is intact the second time
        content = storage.read(key)
        actual = hashlib.sha256(content).hexdigest()
        if actual == sha256:
            return content
    raise UserError(
        f"{storage.url}/{key} is damaged: its sha256 is {actual}, the manifest says {sha256};"
        f" {REMEDY}"
    )
