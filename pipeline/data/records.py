"""The shards of a split, their pages, and the index of each: the place of every record.

Nothing that is read here is trusted: every value is checked for its type and form.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import places as trusted
from pipeline.data.cache import ShardCache
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.storage.resume import rereads

REMEDY = (
    "delete manifest.json there and run again the command that made it, vlae shard or vlae index"
)
PAGE = 10_000
"""Shards of a page; a split with more shards is stored in pages."""
MAX_PAGE_BYTES = 1 << 26
"""Bytes of a page when it is unpacked; 10,000 shards of the longest usual names take 8 million."""
SHA256 = re.compile(r"[0-9a-f]{64}")
Integers = npt.NDArray[np.int64]
Row = TypeVar("Row")


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
    """The shards of a large split: memory holds their numbers of samples, and the pages in use.

    Raises UserError, also when a shard is looked up, if a page is damaged or names what a manifest
    must not name.
    """

    def __init__(
        self,
        storage: Storage,
        pages: tuple[Page, ...],
        sizes_name: str,
        sizes_sha256: str,
        places: Sequence[str] = (),
    ) -> None:
        self.pages, self.sizes_name, self.sizes_sha256 = pages, sizes_name, sizes_sha256
        self._storage, self._places = storage, places
        self._ends = np.cumsum([page.num_shards for page in pages])
        self._page = lru_cache(maxsize=16)(self._load)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self._storage, self.pages, self.sizes_name, self.sizes_sha256, self._places
        return PagedShards, arguments

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
        values = self._page(page).slice(row, 1).to_pylist()[0]
        try:
            shard = shard_from_json(values, self._places)
            if shard.num_samples != self.num_samples[index]:
                raise ValueError("it has another number of samples")
            return shard
        except (TypeError, ValueError) as error:
            raise self._damaged(self.pages[page].name, f"row {row}: {error}") from None

    @cached_property
    def num_samples(self) -> Integers:
        """The number of samples of every shard, ``(num_shards,)``."""
        content = read_verified(self._storage, self.sizes_name, self.sizes_sha256)
        try:
            # Not np.load: what a header says is the array's size may fill the memory.
            header = io.BytesIO()
            np.save(header, np.zeros(0, np.uint32), allow_pickle=False)
            sizes = np.frombuffer(content, np.uint32, offset=len(header.getvalue()))
            if content != _sizes_to_bytes(sizes) or len(sizes) != len(self):
                raise ValueError("they are no numbers of samples of its shards")
        except ValueError as error:
            raise self._damaged(self.sizes_name, str(error)) from None
        return sizes.astype(np.int64)

    def _load(self, page: int) -> Any:
        import pyarrow.parquet  # 40 MB that only data sets with pages need

        name, num_rows = self.pages[page].name, self.pages[page].num_shards
        content = read_verified(self._storage, name, self.pages[page].sha256)
        try:
            about = pyarrow.parquet.read_metadata(io.BytesIO(content))
            if about.num_rows != num_rows:
                raise ValueError(f"it has {about.num_rows} rows, not {num_rows}")
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > MAX_PAGE_BYTES:
                raise ValueError("it is too large")
            # A text that is stored once may be as long as a page, and stand in every row.
            texts = [item.name for item in fields(Shard) if item.type is str]
            if missing := set(texts) - set(about.schema.names):
                raise ValueError(f"it has no column {min(missing)}")
            # Not read_table, which takes longer to load the rest of pyarrow than to read a page.
            file = pyarrow.parquet.ParquetFile(io.BytesIO(content), read_dictionary=texts)
            return file.read(use_threads=False)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self._damaged(name, str(error)) from None

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(f"{self._storage.url}/{name} is damaged ({reason}); {REMEDY}")

    @classmethod
    def write(
        cls,
        storage: Storage,
        split: str,
        shards: Iterator[Shard] | Sequence[Shard],
        places: Sequence[str] = (),
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
        sizes = _sizes_to_bytes(np.array(counts, dtype=np.uint32))
        name = f"pages/{split}-sizes.npy"
        storage.write(name, sizes)
        return cls(storage, tuple(pages), name, hashlib.sha256(sizes).hexdigest(), places)


def _sizes_to_bytes(sizes: npt.NDArray[np.uint32]) -> bytes:
    file = io.BytesIO()
    np.save(file, sizes, allow_pickle=False)
    return file.getvalue()


def checksum(record: bytes) -> str:
    """The checksum that is verified each time a record is read: XXH3 with 128 bits.

    It detects damage ten times as fast as sha256. The sha256 of the whole shard and of the index
    detect forgery.
    """
    return xxhash.xxh3_128_hexdigest(record)


@dataclass(frozen=True)
class Index:
    """The records of one shard; arrays have shape ``(num_records,)`` unless stated."""

    offset: Integers  # in bytes
    size: Integers  # in bytes
    checksum: tuple[str, ...]
    starts: Integers
    """(num_records + 1,): the first sample of each record, and the number of samples."""
    labels: Integers | None
    """The labels of encoding "image", which has one sample in each record; else in the records."""
    keys: tuple[str, ...] | None
    """(num_samples,): the names that the samples had in their source, if any."""

    @staticmethod
    def to_bytes(
        offset: list[int], size: list[int], checksum: list[str], **others: list[int] | list[str]
    ) -> bytes:
        """The bytes of an index, from columns with one value for each record.

        ``others`` are ``num_samples`` or ``labels``, and ``keys``, which has one for each sample.
        """
        return json.dumps(
            {"offset": offset, "size": size, "checksum": checksum, **others}, separators=(",", ":")
        ).encode()

    @classmethod
    def load(cls, storage: Storage, shard: Shard, cache: ShardCache | None = None) -> "Index":
        """The index of a shard. Raises ``UserError`` if it is missing or damaged."""
        name, sha256 = shard.index_name, shard.index_sha256
        read = partial(read_verified, storage, name, sha256)
        content = cache.kept(sha256, f"{storage.url}/{name}", read) if cache else read()
        try:
            columns = json.loads(content)
            offset, size = (np.array(columns[name], dtype=np.int64) for name in ("offset", "size"))
            labels = np.array(columns["labels"], dtype=np.int64) if "labels" in columns else None
            counts = np.array(
                columns["num_samples"] if "num_samples" in columns else [1] * len(offset),
                dtype=np.int64,
            )
            keys = tuple(columns["keys"]) if "keys" in columns else None
            loaded = cls(
                offset,
                size,
                tuple(columns["checksum"]),
                np.append(0, np.cumsum(counts)),
                labels,
                keys,
            )
            lengths = {
                len(column)
                for column in (size, counts, loaded.checksum, labels)
                if column is not None
            }
            ends = np.append(0, offset + size)
            if (
                lengths != {len(offset)}
                or loaded.starts[-1] != shard.num_samples
                or (
                    keys is not None
                    and (
                        len(keys) != shard.num_samples
                        or not all(isinstance(key, str) for key in keys)
                    )
                )
                or min(size.min(initial=0), counts.min(initial=1)) < 0
            ):
                raise ValueError("its columns do not fit together")
            if (offset < ends[:-1]).any() or ends[-1] > shard.size:
                raise ValueError("its records do not follow each other within the shard")
            return loaded
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"{storage.url}/{shard.index_name} is no index of {shard.name} ({error})"
            ) from None


def paginate(
    storage: Storage, split: str, shards: Sequence[Shard], places: Sequence[str] = ()
) -> Sequence[Shard]:
    """Write the shards to pages if there are more than ``PAGE``; else return them as they are."""
    if len(shards) <= PAGE:
        return tuple(shards)
    return PagedShards.write(storage, split, shards, places)


def shards_to_json(shards: Sequence[Shard]) -> Any:
    """The shards as JSON values."""
    if not isinstance(shards, PagedShards):
        return [asdict(shard) for shard in shards]
    pages = [asdict(page) for page in shards.pages]
    return {"pages": pages, "sizes_name": shards.sizes_name, "sizes_sha256": shards.sizes_sha256}


def shards_from_json(storage: Storage, listed: Any, places: Sequence[str]) -> Sequence[Shard]:
    """The shards from JSON values. Raises an error of several kinds unless each is possible."""
    if not isinstance(listed, dict):
        return tuple(shard_from_json(shard, places) for shard in listed)
    pages = tuple(row_from_json(Page, page) for page in listed["pages"])
    check_counts(*(page.num_shards for page in pages), len(pages))
    sizes_name, sizes_sha256 = listed["sizes_name"], listed["sizes_sha256"]
    _check_names({"sizes_name": sizes_name}, {"sizes_sha256": sizes_sha256})
    for page in pages:
        _check_names({"name": page.name}, {"sha256": page.sha256})
        if page.num_shards > PAGE:
            raise ValueError(f"page {page.name} has {page.num_shards} shards")
    return PagedShards(storage, pages, sizes_name, sizes_sha256, places)


def shard_from_json(values: Any, places: Sequence[str] = ()) -> Shard:
    """A shard from JSON values.

    Raises ``TypeError`` or ``ValueError`` if one has a wrong type or form, or the shard lies
    neither below the manifest nor below one of the ``places``.
    """
    shard = row_from_json(Shard, values)
    _check_names(
        {"index_name": shard.index_name},
        {"sha256": shard.sha256, "index_sha256": shard.index_sha256},
    )
    if not trusted.is_key(shard.name) and not (
        trusted.is_address(shard.name) and trusted.is_below(shard.name, places)
    ):
        raise ValueError(
            f"name is {shard.name!r}, which is not below {' or '.join(places) or 'it'}"
        )
    return shard


def _check_names(keys: Mapping[str, object], digests: Mapping[str, object]) -> None:
    """Raise ``ValueError`` unless these are keys below the manifest, and sha256 in hex digits."""
    for field_name, value in keys.items():
        if not trusted.is_key(value):
            raise ValueError(f"{field_name} is {value!r}, which is no name of an object below it")
    for field_name, value in digests.items():
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise ValueError(f"{field_name} is {value!r}, which is no sha256")


def check_counts(*values: object) -> list[int]:
    """The values. Raises ``ValueError`` unless each is a whole number from 1."""
    for value in values:
        if type(value) is not int or value < 1:
            raise ValueError(f"{value!r} is not a count")
    return list(values)  # type: ignore[arg-type]


def row_from_json(kind: type[Row], values: Any) -> Row:
    """A row from JSON values. Raises ``TypeError`` or ``ValueError`` if one has a wrong type."""
    made = kind(**values)
    for item in fields(made):  # type: ignore[arg-type]
        value = getattr(made, item.name)
        if type(value) is not item.type or (item.type is int and not 0 <= value < 1 << 62):
            raise ValueError(f"{item.name} is {value!r}")
    return made


def read_verified(storage: Storage, key: str, sha256: str) -> bytes:
    """A small object that the manifest names. Raises ``UserError`` if it is missing or damaged."""
    for _ in rereads(storage.is_remote):
        content = storage.read(key)
        actual = hashlib.sha256(content).hexdigest()
        if actual == sha256:
            return content
    raise UserError(
        f"{storage.url}/{key} is damaged: its sha256 is {actual}, the manifest says {sha256};"
        f" {REMEDY}"
    )
