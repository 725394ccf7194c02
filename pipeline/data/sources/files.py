"""Sources of image files, and the first of them: a folder.

A source is picklable, since Ray tasks read from it. A local path must be readable under the same
name on every machine that writes shards; only MNIST, IDX files and arrays are sent to the tasks.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.images import EXTENSIONS, BadImage, decode, measure
from pipeline.data.sources.account import Account
from pipeline.data.sources.base import SPLITS, Images, ImageSource, Labels, required_path
from pipeline.data.sources.listing import Candidate, Item, Listing
from pipeline.data.sources.names import Tree
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Entry, Storage
from pipeline.storage.folder import FolderStorage, Kind, walk
from pipeline.values import JsonObject

THREADS = 8
"""Files whose headers are read at a time."""
HEADERS = 512
"""Images whose headers are looked at before the next ones are asked for."""


class FileSource(ImageSource):
    """Image files that are fetched one by one, or a few at a time.

    Folders and files that are named after splits decide an image's split; otherwise the sha256 of
    its key does, so that images added later do not change the split of the others. Colours become
    grey or RGB, transparent pixels white. With ``shard.image_size`` all images are brought to that
    size; without, all must have the same size.
    """

    _kind: str
    _first = 0  # the number of the first item that is held
    _mixed = True
    """Whether items are ordered by the hash, so that classes are mixed, or kept in file order."""
    _stated_by = "file name"
    """What states an image's split, if anything does."""
    _wanted: tuple[str, ...]

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "FileSource":
        return cls(required_path(dataset), options, endpoint_url)

    def __init__(self, path: str, options: ShardOptions, endpoint_url: str | None) -> None:
        self._path, self._options = path, options
        self._storage, self._only = self._locate(path, endpoint_url)
        self._account = Account()
        self._listing: Listing | None = Listing(self._mixed)
        self._held: list[Item] = []
        self._listing.add_all(self._find())
        if not self._listing.num_found:
            raise UserError(
                f"there are no images in {path} (looked for {', '.join(self._wanted)};"
                f" {self._passed_over()})"
            )
        self._arrange(self._listing)
        self._class_names = self._name_classes(self._listing)
        self.account.origins = self._listing.divide(
            options.test_fraction, options.valid_fraction, self._stated_by
        )
        self.account.used = self._listing.num_found
        for split, count in self._listing.counts.items():
            if not count:
                raise UserError(
                    f"none of the {self._listing.num_found} images in {path} falls to {split}; add"
                    " images"
                )
        self._num_classes = self._listing.num_classes
        self.account.unlabelled = self._listing.num_unlabelled if self._num_classes else 0
        self._splits, self._sha256 = self._listing.counts, self._listing.sha256()
        self._channels = options.channels

    @abstractmethod
    def _find(self) -> Iterator[Candidate]:
        """All images, in an order that depends on the files alone; the rest goes to the account."""

    @abstractmethod
    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        """The contents of image files, in the order of ``items``."""

    def _arrange(self, listing: Listing) -> None:
        """Give images the splits and labels that only the whole listing tells."""

    def _name_classes(self, listing: Listing) -> list[str] | None:
        """Number the labels, and return their names, if they have any."""
        return listing.name_labels()

    def _locate(self, path: str, endpoint_url: str | None) -> tuple[Storage, str | None]:
        """The storage of ``path``, and its key there if it is a single file."""
        if path.lower().endswith(self._wanted):
            folder, _, name = path.rpartition("/")
            return open_storage(folder or ".", endpoint_url), name
        if ".tar" in self._wanted:
            refuse_compressed(path)
        storage = open_storage(path, endpoint_url)
        if isinstance(storage, FolderStorage) and not storage.root.is_dir():
            raise UserError(f"dataset.path={path} is not a folder")
        return storage, None

    def _files(self) -> Iterator[Entry]:
        """The files with the wanted endings, in the order of names if there is an order to keep.

        All other files are passed over.
        """
        if self._only is not None:
            yield self._storage.entry(self._only)
            return
        entries = (entry for entry in self._entries() if self._is_wanted(entry.key))
        yield from entries if self._mixed else sorted(entries, key=lambda entry: entry.key)

    def _entries(self) -> Iterator[Entry]:
        if not isinstance(self._storage, FolderStorage):
            yield from self._storage.entries()
            return
        root = self._storage.root
        try:
            for found in walk(root):
                key = found.path.relative_to(root).as_posix()
                if found.kind is Kind.file:
                    yield Entry(key, found.size, str(found.changed))
                else:
                    self.account.pass_over(found.kind.value, key)
        except OSError as error:
            raise UserError(
                f"cannot list {error.filename or root}: {error.strerror or error}; make it"
                " readable, or move it out of the way"
            ) from None

    def _is_wanted(self, key: str) -> bool:
        """Whether a file is one of those to read; if not, it is passed over."""
        if reason := why_passed_over(key, self._wanted):
            self.account.pass_over(reason, key)
            return False
        return True

    def _passed_over(self) -> str:
        reasons = sorted(self.account.passed_over.items(), key=lambda item: -item[1])[:3]
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        return f"found {found}" if found else "it is empty"

    @cached_property
    def description(self) -> JsonObject:
        # Names, sizes and times, not contents: reading all files takes as long as sharding them.
        options = self._options
        names = ("image_size", "channels", "valid_fraction", "test_fraction")
        return {
            "source": self._kind,
            "files": self._sha256,
            "fit": options.fit.value,
            **{name: getattr(options, name) for name in names},
        }

    def prepare(self) -> None:
        """Find out how many channels the images have, unless the options say it."""
        if self._channels is None:
            self._channels = max(self._all_channels(), default=3)

    def _all_channels(self) -> Iterator[int]:
        """The numbers of channels of images, until one is in colour."""

        def look(item: Item) -> int:
            try:
                return measure(next(self._contents([item])), self._max_pixels)[2]
            except UserError:
                return 1  # whoever reads it will say what is wrong

        with ThreadPoolExecutor(THREADS) as threads:
            for split in SPLITS:
                for start in range(0, self._splits[split], HEADERS):
                    for found in threads.map(look, self._items(split, start, start + HEADERS)):
                        yield found
                        if found == 3:
                            return

    @property
    def _max_pixels(self) -> int:
        return int(self._options.max_megapixels * 1e6)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        assert self._channels is not None, "prepare() comes first"
        if self._options.image_size is not None:
            return self._channels, self._options.image_size, self._options.image_size
        for start in range(self._splits["train"]):
            (item,) = self._items("train", start, start + 1)
            pixels = self._pixels(next(self._contents([item])))
            if not isinstance(pixels, BadImage):
                return self._channels, *pixels.shape[:2]
        raise UserError(f"none of the images in {self._path} can be read")

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self._class_names

    @property
    def splits(self) -> dict[str, int]:
        return self._splits

    def key(self, split: str, number: int) -> str:
        (item,) = self._items(split, number, number + 1)
        return f"{self._path}/{item.key}"

    def names(self, split: str, start: int, stop: int) -> list[str]:
        return [item.key for item in self._items(split, start, stop)]

    def part(self, split: str, start: int, stop: int) -> "FileSource":
        _ = self.image_shape  # which a part could not find out
        held = copy.copy(self)
        held._held, held._first, held._listing = self._items(split, start, stop), start, None
        held._class_names, held._account = None, Account()
        return held

    def _items(self, split: str, start: int, stop: int) -> list[Item]:
        if self._listing is not None:
            return self._listing.items(split, start, stop)
        return self._held[start - self._first : stop - self._first]

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images, labels = [], []
        for number, (pixels, label) in enumerate(self.examine(split, start, stop), start):
            if isinstance(pixels, BadImage):
                raise self.unreadable(split, number, pixels)
            images.append(pixels)
            labels.append(label)
        return np.stack(images), np.array(labels, dtype=np.int64)

    def examine(self, split: str, start: int, stop: int) -> Iterator[tuple[Images | BadImage, int]]:
        self.prepare()
        channels, height, width = self.image_shape
        items = self._items(split, start, stop)
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
            assert self._channels is not None
            return decode(content, self._channels, size, options.fit.value, self._max_pixels)
        except BadImage as error:
            return error


COMPRESSED_TAR = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def refuse_compressed(path: str) -> None:
    """Raise UserError if a file that was named is a compressed tar."""
    if path.lower().endswith(COMPRESSED_TAR):
        raise UserError(
            f"{path} is compressed, and its parts cannot be read alone; give the plain .tar, as"
            " `gunzip` or the like leaves it"
        )


def why_passed_over(key: str, wanted: tuple[str, ...]) -> str | None:
    """Why a file is none of those to read, by its name; None if it is one."""
    if any(part.startswith(".") for part in key.split("/")):
        return "hidden"
    if key.lower().endswith(wanted):
        return None
    name = key.rpartition("/")[2].lower()
    if ".tar" in wanted and name.endswith(COMPRESSED_TAR):
        return "compressed tar, which has to be unpacked first"
    ending = name.rpartition(".")[2] if "." in name else ""
    kind = f".{ending}" if ending else "without an ending"
    return f"not read here ({kind})"


class FolderSource(FileSource):
    """A folder of images. Each sub-folder, with all below it, is a class, in the order of names.

    If the top folders are named after splits, they are these, and the classes lie below them.
    Folders around all of them do not count.
    """

    _kind = "folder"
    _wanted = EXTENSIONS
    _stated_by = "folder"

    def _find(self) -> Iterator[Candidate]:
        self.account.unit = "files"
        for entry in self._files():
            yield Candidate(entry.key, "", f"{entry.size} {entry.version}")

    def _arrange(self, listing: Listing) -> None:
        tree = Tree(self._path, listing.folders)
        listing.place(lambda folder: (tree.split(folder), tree.label(folder)))
        self._classes = tree.classes

    def _name_classes(self, listing: Listing) -> list[str] | None:
        return self._classes or None

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return (self._storage.read(item.key) for item in items)
