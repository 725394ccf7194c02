"""Reading the samples of WebDataset shards that someone else wrote, safely.

A sample is the run of members whose names share everything before the first dot: ``0007.jpg``,
``0007.cls``. Its image is the member with the ending of an image file, or ``.npy`` where there is
none; its label the text of ``.cls``, or a key of ``.json``. Members that only unpickling could read
are refused by name, and so are names with a path that leaves its folder.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.data import tar
from pipeline.data.images import EXTENSIONS
from pipeline.data.sources.account import Account
from pipeline.data.sources.listing import Label
from pipeline.errors import UserError

LABEL_KEYS = (
    *("label", "labels", "class", "class_id", "class_label", "class_name", "category", "target"),
    *("fine_label", "fine_labels", "coarse_label", "cls"),
)
"""Usual names of labels, in JSON and in Parquet: the first that is there is taken."""
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "joblib")
MAX_MEMBER = 1 << 30
"""Bytes of the largest member that is read."""
MAX_NAME = 256
"""Characters of the longest name of a class."""


@dataclass(frozen=True)
class Sample:
    """One image of a shard."""

    key: str
    offset: int  # of the image file in the tar, in bytes
    content: bytes  # of the image file
    label: Label  # None if there is none


class SampleReader:
    """Reads the samples of the tar at ``url``, and keeps account of its members.

    label_key: the key of ``.json`` that holds the label; None tries ``LABEL_KEYS``. image_key:
    which image of a sample to take, where it has several: ``input`` for ``0007.input.png``.
    """

    def __init__(self, url: str, label_key: str | None, image_key: str | None) -> None:
        self.url, self.label_key, self.image_key = url, label_key, image_key
        self.account = Account("samples and other members")
        self.found_label = False
        """Whether any sample had a label."""

    def read(self, source: tar.Source) -> Iterator[Sample]:
        """The samples, in order. Raises ``UserError`` that names the member at fault."""
        group: dict[str, tar.Member] = {}
        current, seen = "", set[str]()
        with whole_tar(self.url):
            for member in tar.entries(source, MAX_MEMBER, wanted=self._is_read):
                if member.kind is tar.Kind.folder:
                    continue
                if member.kind is not tar.Kind.file:
                    self.account.pass_over(member.kind.value, f"{self.url}/{member.name}")
                    continue
                key, extension = self._split(member.name)
                if extension is None:  # not part of a sample
                    self.account.pass_over("no part of a sample", f"{self.url}/{member.name}")
                    continue
                if key != current:
                    if group:
                        yield from self._sample(current, group)
                    if key in seen:
                        raise UserError(
                            f"{self.url}: the members of sample {key!r} do not follow each other,"
                            " or it is there twice"
                        )
                    seen.add(key)
                    group, current = {}, key
                if extension in group:
                    raise UserError(f"{self.url}: member {member.name!r} is there twice")
                group[extension] = member
            if group:
                yield from self._sample(current, group)

    def _is_read(self, name: str) -> bool:
        ending = name.rpartition(".")[2].lower()
        return f".{ending}" in EXTENSIONS or ending in ("npy", "cls", "json")

    def _split(self, name: str) -> tuple[str, str | None]:
        """The key and extension of a member; extension None if it is not part of a sample."""
        if (
            name.startswith("/")
            or ".." in name.split("/")
            or "\\" in name
            or "\0" in name
            or not name.isprintable()
        ):
            raise UserError(
                f"{self.url}: the name of member {name!r} is not safe, so this shard is not read"
            )
        folder, _, file = name.rpartition("/")
        stem, dot, extension = file.removeprefix("./").partition(".")
        if not stem or not dot:
            return name, None
        if extension.lower().rpartition(".")[2] in PICKLES:
            raise UserError(
                f"{self.url}: member {name!r} could only be read by unpickling it, which may run"
                " any program; it is refused"
            )
        return f"{folder}/{stem}" if folder else stem, extension.lower()

    def _sample(self, key: str, group: dict[str, tar.Member]) -> Iterator[Sample]:
        """The sample of a group of members, unless it has no image."""
        images = [name for name in group if f".{name.rpartition('.')[2]}" in EXTENSIONS]
        images = images or [name for name in group if name.rpartition(".")[2] == "npy"]
        if self.image_key is not None:
            wanted = self.image_key.lower().removeprefix(".")
            chosen = [name for name in images if wanted in (name, name.rpartition(".")[0])]
            if images and not chosen:
                raise UserError(
                    f"{self.url}: sample {key!r} has no image {wanted!r}, only"
                    f" {', '.join(sorted(images))}"
                )
            images = chosen
        if not images:
            ending = ", ".join(f".{name}" for name in sorted(group))
            self.account.pass_over(f"sample without an image ({ending})", f"{self.url}/{key}")
            return
        if len(images) > 1:
            raise UserError(
                f"{self.url}: sample {key!r} has several images ({', '.join(sorted(images))});"
                f" say which to take by image_key={images[0].rpartition('.')[0] or images[0]}"
            )
        image = group[images[0]]
        self.account.used += 1
        yield Sample(key, image.offset, image.content, self._label(key, group))

    def _label(self, key: str, group: dict[str, tar.Member]) -> Label:
        try:
            if "cls" in group and self.label_key in (None, "cls"):
                label: object = _text(group["cls"].content)
            elif "json" in group:
                fields = json.loads(group["json"].content)
                label = self._field(fields) if isinstance(fields, dict) else None
            else:
                label = None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.url}: the label of sample {key!r} cannot be read ({error})"
            ) from None
        try:
            found = as_label(label)
        except ValueError:
            if self.label_key is None:  # nobody said that it is a class
                self.account.pass_over_label()
                found = None
            else:
                raise UserError(
                    f"{self.url}: the label of sample {key!r} is {label!r}, but a label is a whole"
                    " number or a name"
                ) from None
        self.found_label |= found is not None
        return found

    def _field(self, fields: dict[str, object]) -> object:
        keys = LABEL_KEYS if self.label_key is None else (self.label_key,)
        return next((fields[key] for key in keys if key in fields), None)


def as_label(value: object) -> Label:
    """A label from JSON or Parquet: a whole number, a name, or None for none (also -1).

    Raises ValueError if it is something else.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == -1 or value == "":
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and len(value) <= MAX_NAME:
        return _number(value.strip())
    raise ValueError(value)


def _text(content: bytes) -> object:
    return _number(content.decode().strip())


def _number(text: str) -> int | str | None:
    """A text as a whole number, if it is one, else as it is."""
    if not text or text == "-1":
        return None
    return int(text) if len(text) < 20 and text.removeprefix("-").isdecimal() else text


@contextmanager
def whole_tar(url: str) -> Iterator[None]:
    """Turn a block's ``BadTar`` into a UserError that names the archive."""
    try:
        yield
    except tar.BadTar as error:
        raise UserError(
            f"{url} is not a whole tar archive: {error}; copy or write it anew"
        ) from None
