"""Parquet files with a column of images."""

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.data.images import BadImage, measure
from pipeline.data.sources.base import SPLITS
from pipeline.data.sources.files import HEADERS, FileSource
from pipeline.data.sources.listing import Candidate, Item, Label, Listing
from pipeline.data.sources.members import LABEL_KEYS, as_label
from pipeline.data.sources.names import split_of_file
from pipeline.errors import UserError
from pipeline.storage.folder import FolderStorage

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "image_bytes", "jpg", "png", "webp")
"""Usual names of the column of images: the first that is there is taken."""
ROWS = 16
"""Rows that are unpacked at a time: one large value may stand for all rows of a small file."""


class ParquetSource(FileSource):
    """Parquet files with a column of images, and optionally one of labels.

    Images are bytes, or ``{bytes, path}`` as on Hugging Face, whose names of classes are kept.
    Files, or folders, that are named after splits are these; for others, the hash of the file's
    name and the row decides. Rows keep their order.
    """

    _kind = "parquet"
    _wanted = (".parquet",)
    _mixed = False

    def _find(self) -> Iterator[Candidate]:
        self.account.unit = "rows and other files"
        options, files = self._options, list(self._files())
        self._names: list[str] | None = None
        stated = {entry.key: split_of_file(entry.key) for entry in files}
        labelled = False
        for entry in files:
            table = self._open(entry.key)
            image, label = self._columns(entry.key, table)
            labelled |= label is not None
            version = f"{entry.size} {entry.version} {image} {label}"
            for row, found in enumerate(self._labels(entry.key, table, label)):
                yield Candidate(
                    f"{entry.key}/{row}", entry.key, version, row, 0, found, stated[entry.key]
                )
        if options.label_column is not None and not labelled:
            raise UserError(
                f"no file in {self._path} has the column shard.label_column={options.label_column}"
            )

    def _columns(self, file: str, table: Any) -> tuple[str, str | None]:
        """The columns of images and of labels. Raises UserError if the first is missing."""
        options, names = self._options, list(table.schema_arrow.names)
        wanted = IMAGE_COLUMNS if options.image_column is None else (options.image_column,)
        image = next((name for name in wanted if name in names), None)
        if image is None and options.image_column is None:
            binary = [field.name for field in table.schema_arrow if _may_hold_images(field.type)]
            image = binary[0] if len(binary) == 1 else None
        if image is None:
            raise UserError(
                f"{self._storage.url}/{file} has no column {wanted[0]!r}, only"
                f" {', '.join(sorted(names))}; set shard.image_column"
            )
        keys = LABEL_KEYS if options.label_column is None else (options.label_column,)
        label = next((name for name in keys if name in names and name != image), None)
        return image, label

    def _labels(self, file: str, table: Any, column: str | None) -> Iterator[Label]:
        """The label of every row."""
        if column is None:
            yield from (None for _ in range(table.metadata.num_rows))
            return
        names = _class_names(table.schema_arrow, column)
        self._names = self._names or names
        row = 0
        for group in range(table.metadata.num_row_groups):
            for label in self._values(file, table, group, column):
                try:
                    yield as_label(label)
                except ValueError:
                    if self._options.label_column is not None:
                        raise UserError(
                            f"{self._storage.url}/{file}: the label of row {row} is {label!r},"
                            " which is neither a whole number nor a name"
                        ) from None
                    self.account.pass_over_label()
                    yield None
                row += 1

    def _name_classes(self, listing: Listing) -> list[str] | None:
        names = listing.name_labels()
        if names is None and self._names is not None:
            # The labels are numbers, which Hugging Face's schema names.
            return self._names if listing.largest_label() < len(self._names) else None
        return names

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else super().num_classes

    def _all_channels(self) -> Iterator[int]:
        # In one pass: for each image alone, its group would be unpacked up to it.
        for split in SPLITS:
            starts = range(0, self._splits[split], HEADERS)
            parts = (self._items(split, start, start + HEADERS) for start in starts)
            for content in self._contents(itertools.chain.from_iterable(parts)):
                with suppress(BadImage):  # whoever reads it will say so
                    channels = measure(content, self._max_pixels)[2]
                    yield channels
                    if channels == 3:
                        return

    def _contents(self, items: Iterable[Item]) -> Iterator[bytes]:
        file, rows, place = "", iter(()), 0
        for item in items:
            if item.file != file or item.offset < place:
                file, rows, place = item.file, self._images(item.file, item.offset), item.offset
            image = next(itertools.islice(rows, item.offset - place, None), None)
            place = item.offset + 1
            content = image.get("bytes") if isinstance(image, dict) else image
            yield content if isinstance(content, bytes) else b""

    def _images(self, file: str, first: int) -> Iterator[Any]:
        """What the column of images holds, from row ``first`` on."""
        table = self._open(file)
        column, _ = self._columns(file, table)
        begin = 0
        for group in range(table.metadata.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            skipped, begin = max(first - begin, 0), end
            if first < end:
                rows = self._values(file, table, group, column)
                yield from itertools.islice(rows, skipped, None)

    def _values(self, file: str, table: Any, group: int, column: str) -> Iterator[Any]:
        """The values of a column in a group of rows."""
        with self._readable(file):
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    yield value.as_py()

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
        except (pyarrow.ArrowException, OSError, ValueError, IndexError, MemoryError) as error:
            raise UserError(
                f"{self._storage.url}/{file} cannot be read as Parquet"
                f" ({' '.join(str(error).split()) or type(error).__name__})"
            ) from None


def _may_hold_images(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names of classes that Hugging Face's ``datasets`` stores with a column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if valid and len(set(names)) == len(names) > 0 else None
