"""Sources of image files: a folder, tars, WebDataset shards.

A source is picklable, since Ray tasks read from it. A local path must be readable under the same
name on every machine that writes shards; only MNIST, IDX files and arrays are sent to the tasks.
"""

import copy
import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data import tar
from pipeline.data.images import BadImage, decode
from pipeline.data.sources.base import (
    SPLITS,
    Images,
    ImageSource,
    Labels,
    hash_fraction,
    required_path,
)
from pipeline.data.sources.members import MAX_MEMBER, read_samples
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage
from pipeline.storage.pieces import Pieces
from pipeline.storage.web import HttpStorage
from pipeline.values import JsonObject


@dataclass(frozen=True, slots=True)
class Item:
    """An image: a file, or a part of one."""

    key: str  # decides its split
    file: str  # the key of the file in storage
    label: int
    offset: int = 0  # in the file, in bytes; in Parquet, the row
    size: int = 0  # in bytes, if it is a part of a file


class FileSource(ImageSource):
    """Image files that are fetched one by one, or a few at a time.

    The sha256 of an image's key decides its split, so that images added later do not change the
    split of the others. Colours become grey or RGB, transparent pixels white. With
    ``shard.image_size`` all images are brought to that size; without, all must have the same size.
    """

    _kind: str
    _first = 0  # the number of the first item that is held of each split
    _mixed = True
    """Whether items are ordered by the hash, so that classes are mixed, or kept in file order."""

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "FileSource":
        return cls(required_path(dataset), options, endpoint_url)

    def __init__(self, path: str, options: ShardOptions, endpoint_url: str | None) -> None:
        self._storage, self._names, self._path = self._locate(path, endpoint_url)
        self._options = options
        items = list(self._list())
        if not items:
            raise UserError(f"there are no images in {path} (looked for {', '.join(self._wanted)})")
        self._items: dict[str, list[Item]] = {split: [] for split in SPLITS}
        valid_until = options.test_fraction + (1 - options.test_fraction) * options.valid_fraction
        if self._mixed:
            items.sort(key=lambda item: (hash_fraction(item.key), item.key))
        for item in items:
            place = hash_fraction(item.key)
            if place < options.test_fraction:
                split = "test"
            else:
                split = "valid" if place < valid_until else "train"
            self._items[self._assigned(item, split)].append(item)
        for split, chosen in self._items.items():
            if not chosen:
                raise UserError(
                    f"none of the {len(items)} images in {path} falls to {split}; add images or"
                    " change shard.*_fraction"
                )

    _wanted: tuple[str, ...]

    @abstractmethod
    def _list(self) -> Iterator[Item]:
        """All images, in an order that depends on the files alone."""

    @abstractmethod
    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        """The contents of image files, in the order of ``items``."""

    def _assigned(self, item: Item, split: str) -> str:
        """The split of an item; ``split`` is the one that the hash of its key gives."""
        return split

    def _locate(self, path: str, endpoint_url: str | None) -> tuple[Storage, list[str], str]:
        """The storage of ``path``, the keys of the files to read in it, and the path itself.

        If ``path`` is a single file, the storage is its folder.
        """
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
    def description(self) -> JsonObject:
        # Names and sizes, not contents: reading every file would take as long as sharding.
        content, sizes = hashlib.sha256(), self._sizes()
        for split in SPLITS:
            for item in self._items[split]:
                content.update(
                    f"{split}/{item.key}/{item.size or sizes.get(item.file)}\n".encode(
                        errors="surrogateescape"
                    )
                )
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
        return (
            {} if isinstance(self._storage, HttpStorage) else self._storage.sizes()
        )  # a web server lists nothing

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
                    f"{self._path}/{item.key} is {pixels.shape[1]} x {pixels.shape[0]}, but others"
                    f" are {width} x {height}; set shard.image_size to bring all to one size"
                )
            yield pixels, item.label

    def _pixels(self, content: bytes) -> Images | BadImage:
        options = self._options
        size = (options.image_size, options.image_size) if options.image_size else None
        try:
            return decode(
                content,
                options.channels,
                size,
                options.fit.value,
                int(options.max_megapixels * 1e6),
            )
        except BadImage as error:
            return error


class FolderSource(FileSource):
    """A folder of images. Each sub-folder, with all below it, is a class, in the order of names."""

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
            return [
                key
                for key in super()._find(storage)
                if not any(part.startswith(".") for part in key.split("/"))
            ]
        found = []
        for parent, folders, names in os.walk(storage.root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(parent).relative_to(storage.root)
            found += [
                (below / name).as_posix()
                for name in names
                if name.lower().endswith(self._wanted) and not name.startswith(".")
            ]
        return sorted(found)


def _classes(path: str, names: list[str]) -> dict[str, int]:
    """The label of each top folder, in the order of names; empty if no image is in a folder."""
    inside = [name for name in names if "/" in name]
    if inside and len(inside) < len(names):
        loose = next(name for name in names if "/" not in name)
        raise UserError(
            f"{path} has images both in sub-folders (the classes) and outside ({loose}); move these"
        )
    return {
        name: label
        for label, name in enumerate(sorted({name.partition("/")[0] for name in inside}))
    }


class TarSource(FileSource):
    """Tars of a folder tree of images. The folders below their common path are the classes."""

    _kind = "tar"
    _wanted = (".tar",)

    def _list(self) -> Iterator[Item]:
        found = []
        for file in self._names:
            url = f"{self._storage.url}/{file}"
            try:
                for member in tar.members(Pieces(self._storage.stream(file)), MAX_MEMBER):
                    if member.name.lower().endswith(FolderSource._wanted) and not Path(
                        member.name
                    ).name.startswith("."):
                        found.append(
                            (member.name.removeprefix("./"), file, member.offset, member.size)
                        )
            except tar.BadTar as error:
                raise UserError(
                    f"{url} is not a whole tar archive: {error}; copy or write it anew"
                ) from None
        folders = {tuple(name.split("/")[:-1]) for name, *_ in found}
        common = 0  # the length of the common path
        while (
            len({folder[: common + 1] for folder in folders}) == 1
            and min(map(len, folders)) > common
        ):
            common += 1
        short = ["/".join(name.split("/")[common:]) for name, *_ in found]
        labels = _classes(self._path, short)
        for name, (_, file, offset, size) in zip(short, found, strict=True):
            yield Item(name, file, labels.get(name.partition("/")[0], -1), offset, size)

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return _ranges(self._storage, items)


class WebDatasetSource(FileSource):
    """WebDataset shards, to be rewritten with other splits, at another size, or in blocks.

    Samples keep their order.
    """

    _kind = "webdataset"
    _wanted = (".tar",)
    _mixed = False

    def _list(self) -> Iterator[Item]:
        for file in self._names:
            pieces = Pieces(self._storage.stream(file))
            for sample in read_samples(
                f"{self._storage.url}/{file}", pieces, self._options.label_column
            ):
                yield Item(
                    f"{file}/{sample.key}", file, sample.label, sample.offset, len(sample.content)
                )

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return _ranges(self._storage, items)


GAP = 256 << 10
"""Bytes between two images that are read and thrown away, rather than starting a new read."""
RUN = 16 << 20
"""Bytes of the longest read."""


def _ranges(storage: Storage, items: list[Item]) -> Iterator[bytes]:
    """The contents of items that are parts of files; neighbours are read together."""
    first = 0
    while first < len(items):
        last, begin = first + 1, items[first]
        while last < len(items):
            before, after = items[last - 1], items[last]
            near = (
                before.file == after.file and 0 <= after.offset - before.offset - before.size <= GAP
            )
            if not near or after.offset + after.size - begin.offset > RUN:
                break
            last += 1
        end = items[last - 1].offset + items[last - 1].size
        data = memoryview(storage.read_range(begin.file, begin.offset, end - begin.offset))
        for item in items[first:last]:
            yield bytes(data[item.offset - begin.offset : item.offset - begin.offset + item.size])
        first = last
