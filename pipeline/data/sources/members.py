"""Reading the samples of WebDataset shards that someone else wrote, safely.

A sample is the run of members whose names share everything before the first dot: ``0007.jpg``,
``0007.cls``. Its image is the member with the extension ``.jpg``, ``.png``, ``.webp`` or ``.npy``;
its label the text of ``.cls``, or a key of ``.json``. Members that only unpickling could read are
refused by name, and so are names with a path that leaves its folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data import tar
from pipeline.errors import UserError

IMAGES = ("png", "jpg", "jpeg", "webp", "npy")
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "joblib")
MAX_MEMBER = 1 << 30
"""Bytes of the largest member that is read."""


@dataclass(frozen=True)
class Sample:
    """One image of a shard."""

    key: str
    offset: int  # of the image file in the tar, in bytes
    content: bytes  # of the image file
    label: int  # -1 if there is none


def read_samples(url: str, source: tar.Source, label_key: str) -> Iterator[Sample]:
    """The samples of the tar at ``url``. Raises ``UserError`` that names the member at fault."""
    group: dict[str, tar.Member] = {}
    current, seen = "", set[str]()
    try:
        for member in tar.members(source, MAX_MEMBER):
            key, extension = _split(url, member.name)
            if extension is None:  # not part of a sample: hidden, or without an extension
                continue
            if key != current:
                if group:
                    yield _sample(url, current, group, label_key)
                if key in seen:
                    raise UserError(
                        f"{url}: the members of sample {key!r} do not follow each other, or it is"
                        " there twice"
                    )
                seen.add(key)
                group, current = {}, key
            if extension in group:
                raise UserError(f"{url}: member {member.name!r} is there twice")
            group[extension] = member
        if group:
            yield _sample(url, current, group, label_key)
    except tar.BadTar as error:
        raise UserError(
            f"{url} is not a whole tar archive: {error}; copy or write it anew"
        ) from None


def _split(url: str, name: str) -> tuple[str, str | None]:
    """The key and extension of a member; extension None if it is not part of a sample."""
    if (
        name.startswith("/")
        or ".." in name.split("/")
        or "\\" in name
        or "\0" in name
        or not name.isprintable()
    ):
        raise UserError(
            f"{url}: the name of member {name!r} is not safe, so this shard is not read"
        )
    folder, _, file = name.rpartition("/")
    stem, dot, extension = file.removeprefix("./").partition(".")
    if not stem or not dot:
        return name, None
    if extension.lower().rpartition(".")[2] in PICKLES:
        raise UserError(
            f"{url}: member {name!r} could only be read by unpickling it, which may run any"
            " program; it is refused"
        )
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _sample(url: str, key: str, group: dict[str, tar.Member], label_key: str) -> Sample:
    image = next((group[extension] for extension in IMAGES if extension in group), None)
    if image is None:
        raise UserError(
            f"{url}: sample {key!r} has no image ({', '.join(IMAGES)}), only"
            f" {', '.join(sorted(group))}"
        )
    return Sample(key, image.offset, image.content, _label(url, key, group, label_key))


def _label(url: str, key: str, group: dict[str, tar.Member], label_key: str) -> int:
    try:
        if "cls" in group:
            label: object = int(group["cls"].content)
        elif "json" in group:
            fields = json.loads(group["json"].content)
            label = fields.get(label_key, -1) if isinstance(fields, dict) else -1
        else:
            return -1
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url}: the label of sample {key!r} cannot be read ({error})") from None
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < 1 << 31:
        raise UserError(
            f"{url}: the label of sample {key!r} is {label!r}, but labels are whole numbers from 0"
        )
    return label
