"""Sources of tars: of a folder tree of images, and WebDataset shards."""

import posixpath
from collections.abc import Iterator

from pipeline.data import tar
from pipeline.data.images import EXTENSIONS
from pipeline.data.sources.files import FileSource, why_passed_over
from pipeline.data.sources.listing import Candidate, Item, Listing
from pipeline.data.sources.members import MAX_MEMBER, SampleReader, whole_tar
from pipeline.data.sources.names import Tree, stated_splits
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.storage.pieces import Pieces


class TarSource(FileSource):
    """Tars of a folder tree of images. The folders below their common path are the classes.

    A hard or symbolic link is the image that it leads to in the same tar.
    """

    _kind = "tar"
    _wanted = (".tar",)
    _stated_by = "folder"

    def _find(self) -> Iterator[Candidate]:
        self.account.unit = "files and members of tars"
        files = sorted(self._files(), key=lambda entry: entry.key)
        stated = stated_splits(entry.key for entry in files)
        self._by_file = bool(stated)
        for entry in files:
            version = f"{entry.size} {entry.version}"
            yield from self._members(entry.key, version, stated.get(entry.key))

    def _members(self, file: str, version: str, split: str | None) -> Iterator[Candidate]:
        places = dict[str, tuple[int, int]]()
        links = list[tar.Member]()

        def candidate(name: str, place: tuple[int, int]) -> Candidate:
            return Candidate(name, file, version, *place, split=split)

        with whole_tar(f"{self._storage.url}/{file}"):
            source = Pieces(self._storage.stream(file))
            for member in tar.entries(source, MAX_MEMBER, wanted=lambda name: False):
                name = posixpath.normpath(member.name)
                if member.kind is tar.Kind.folder:
                    continue
                shown = f"{file}/{name}"
                if reason := why_passed_over(name, EXTENSIONS):
                    self.account.pass_over(reason, shown)
                elif member.kind in (tar.Kind.link, tar.Kind.hard_link):
                    links.append(member)
                elif member.kind is not tar.Kind.file:
                    self.account.pass_over(member.kind.value, shown)
                elif name in places:
                    self.account.pass_over("the same name as another member", shown)
                else:
                    places[name] = (member.offset, member.size)
                    yield candidate(name, places[name])
        for link in links:
            name = posixpath.normpath(link.name)
            folder = posixpath.dirname(name) if link.kind is tar.Kind.link else ""
            target = posixpath.normpath(posixpath.join(folder, link.target))
            if target in places and name not in places:
                yield candidate(name, places[target])
            else:
                self.account.pass_over("link that leads to no image in its tar", f"{file}/{name}")

    def _arrange(self, listing: Listing) -> None:
        tree = Tree(self._path, listing.folders)
        self._classes = tree.classes
        listing.place(
            lambda folder: (tree.split(folder), tree.label(folder)),
            tree.around,
            keep_splits=self._by_file,
        )
        if self._by_file:
            self._stated_by = "file name"

    def _name_classes(self, listing: Listing) -> list[str] | None:
        return self._classes or None

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return ranges(self._storage, items)


class WebDatasetSource(FileSource):
    """WebDataset shards, to be rewritten with other splits, at another size, or in blocks.

    Samples keep their order.
    """

    _kind = "webdataset"
    _wanted = (".tar",)
    _mixed = False

    def _find(self) -> Iterator[Candidate]:
        self.account.unit = "samples and other files"
        files = list(self._files())
        stated = stated_splits(entry.key for entry in files)
        options, found_label = self._options, False
        for entry in files:
            reader = SampleReader(
                f"{self._storage.url}/{entry.key}", options.label_column, options.image_key
            )
            for sample in reader.read(Pieces(self._storage.stream(entry.key))):
                yield Candidate(
                    f"{entry.key}/{sample.key}",
                    entry.key,
                    f"{entry.size} {entry.version} {options.label_column} {options.image_key}",
                    sample.offset,
                    len(sample.content),
                    sample.label,
                    stated.get(entry.key),
                )
            self.account.add(reader.account)
            found_label |= reader.found_label
        self.account.used = 0  # counted when all are listed
        if options.label_column is not None and not found_label:
            raise UserError(
                f"no sample in {self._path} has the label shard.label_column="
                f"{options.label_column}; leave it out, or name a key of their .json"
            )

    def _contents(self, items: list[Item]) -> Iterator[bytes]:
        return ranges(self._storage, items)


GAP = 256 << 10
"""Bytes between two images that are read and thrown away, rather than starting a new read."""
RUN = 16 << 20
"""Bytes of the longest read."""


def ranges(storage: Storage, items: list[Item]) -> Iterator[bytes]:
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
