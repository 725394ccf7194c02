"""Parquet files with a column of images."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

from pipeline.data.sources.files import FileSource, Item
from pipeline.errors import UserError
from pipeline.storage.folder import FolderStorage


class ParquetSource(FileSource):
    """Parquet files with a column of images, and optionally one of labels.

    Images are bytes, or ``{bytes, path}`` as on Hugging Face. Files whose names begin with
    ``train``, ``valid`` or ``test`` are those splits; for others, the hash of the file's name and
    the row decides. Rows keep their order; one row group is read at a time.
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
                    f"{self._storage.url}/{file} has no column {options.image_column!r}, only"
                    f" {', '.join(sorted(names))}; set shard.image_column"
                )
            labels: Iterable[Any] = itertools.repeat(-1, table.metadata.num_rows)
            if options.label_column in names:
                with self._readable(file):
                    labels = table.read([options.label_column]).column(0).to_pylist()
            for row, label in enumerate(labels):
                if label is not None and (type(label) is not int or not -1 <= label < 1 << 31):
                    raise UserError(
                        f"{self._storage.url}/{file}: the label of row {row} is {label!r}, not a"
                        " whole number from 0"
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
                    images = (
                        table.read_row_group(group, [self._options.image_column])
                        .column(0)
                        .to_pylist()
                    )
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
                table, size = (
                    pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)),
                    len(content),
                )
            rows = table.metadata.num_rows
            if not 0 <= rows <= size:  # a list of that length could fill the memory
                raise ValueError(f"it is said to have {rows} rows, but has {size} bytes")
            return table

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._storage.url}/{file} cannot be read as Parquet"
                f" ({' '.join(str(error).split())})"
            ) from None


@lru_cache(maxsize=1 << 16)
def _stated_split(name: str) -> str | None:
    stem = name.rpartition("/")[2].lower()
    return next((split for split in ("train", "valid", "test") if stem.startswith(split[:5])), None)
