"""The manifest of a data set: its shards, and the index of records of each shard.

::

    manifest.json            the images' shape, and per split its shards: name, size, number of
                             samples, checksums
    train/00000-1f3a5b7c.tar          a WebDataset tar; each record holds a block of images and
                                      their labels, or one image
    train/00000-1f3a5b7c.index.json   the offset, size, number of samples and checksum of each
                                      record of that tar
    pages/...                the list of shards, if it is too long for manifest.json

The manifest is written last: a data set exists once it is there. Nothing in it grows with the
number of samples; what does is in an index, which is read when its shard is opened. Shards may also
be elsewhere and belong to someone else (``vlae index``): then their names are whole addresses below
``places``, and only the indices are beside the manifest. Nothing in a manifest is trusted: every
value is checked for its type and form, and ``pipeline.places`` says which places are
followed.

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
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import get_args

import numpy as np

from pipeline import places as trusted
from pipeline.config.sections import Binarization
from pipeline.data.images import MAX_PIXELS, Fit
from pipeline.data.records import (
    REMEDY,
    Integers,
    PagedShards,
    Shard,
    check_counts,
    row_from_json,
    shards_from_json,
    shards_to_json,
)
from pipeline.errors import UserError
from pipeline.storage.base import ObjectNotFound, Storage, to_json
from pipeline.storage.recipe import differing
from pipeline.values import JsonObject, is_name

VERSION = 3
ENCODINGS = ("npy", "image")
PIXELS = ("binary", "values")
STATED = tuple(each.value for each in Binarization if each is not Binarization.auto)
"""What a manifest may say of binarization."""
MANIFEST_KEY = "manifest.json"


@dataclass(frozen=True)
class Decoding:
    """How the pixels of image files were decoded and resized: they are a function of the file,
    ``Manifest.fit`` and this.
    """

    method: str
    """The way of decoding, such as ``full``, or ``scaled`` for JPEG files that are decoded at a
    smaller size."""
    filter: str
    """The filter that resizes, such as ``lanczos``."""
    library: str
    """What decodes, with its version, such as ``Pillow 12.0.0``."""


@dataclass(frozen=True)
class Manifest:
    """The description of a data set, as ``manifest.json`` holds it."""

    name: str
    image_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int | None  # None: there are no labels
    block_size: int  # samples of a record; the last of a shard may hold fewer
    splits: Mapping[str, Sequence[Shard]]
    source: JsonObject = field(default_factory=dict)
    """The recipe: under ``source`` the kind of source, such as ``folder`` or ``index``; the images
    that it was made from; and the options."""
    encoding: str = "npy"
    fit: Fit | None = None
    """How images of other shapes are brought to ``image_shape``; None: they are errors."""
    pixels: str = "values"
    """``binary`` if each is 0 or 255, as far as they were looked at, else ``values``."""
    binarization: str = "none"
    """How models see the pixels unless they are told otherwise: a value of ``Binarization``."""
    class_names: list[str] | None = None
    """The name of each label, if the source has names."""
    decoding: Decoding | None = None
    """How image files become pixels when they are read; None if the shards hold pixels."""
    places: Sequence[str] = ()
    """Folders and addresses, below which the shards with whole addresses lie."""
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
            "decoding": asdict(self.decoding) if self.decoding else None,
            "places": list(self.places),
            "splits": {k: shards_to_json(v) for k, v in self.splits.items()},
        }


def _digest(content: JsonObject) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _command(url: str) -> str:
    """The command that makes the data set at ``url``."""
    folder, _, name = url.rpartition("/")
    if name == "mnist":
        return "vlae shard dataset=mnist"
    name = name if folder.endswith("/datasets") else "NAME"
    return (
        f"vlae shard dataset=folder dataset.path=FOLDER dataset.name={name}; for images that are"
        " not in a folder, see: vlae shard --help"
    )


def load(storage: Storage) -> Manifest:
    """The manifest in ``storage``.

    Raises ``UserError`` if there is none, or one that is damaged or of another version, or whose
    shards lie where they are not followed.
    """
    try:
        content = storage.read_json(MANIFEST_KEY)
    except ObjectNotFound:
        raise ObjectNotFound(
            f"there is no data set at {storage.url}; make one with: {_command(storage.url)}"
        ) from None
    url = f"{storage.url}/{MANIFEST_KEY}"
    if not isinstance(content, dict) or "version" not in content:
        raise UserError(f"{url} is damaged: it is not a manifest; {REMEDY}")
    if content["version"] != VERSION:
        raise UserError(
            f"{url} is of version {content['version']}, but this program reads version {VERSION};"
            f" {REMEDY}"
        )
    stated, actual = content.pop("sha256", None), _digest(content)
    if stated != actual:
        raise UserError(
            f"{url} is damaged or was edited: its sha256 is {actual}, but it states {stated};"
            f" {REMEDY}"
        )
    try:
        loaded = _from_json(storage, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url} is damaged ({error}); {REMEDY}") from None
    trusted.check(url, loaded.places)
    return loaded


def _from_json(storage: Storage, content: JsonObject) -> Manifest:
    """A manifest from JSON values. Raises an error of several kinds unless each is possible."""
    places = tuple(content.pop("places"))
    if not all(map(trusted.is_address, places)):
        raise ValueError(f"its places are {places!r}")
    splits = {
        _as_name(split, "a split"): shards_from_json(storage, listed, places)
        for split, listed in content.pop("splits").items()
    }
    channels, height, width = content.pop("image_shape")
    decoding = content.pop("decoding")
    loaded = Manifest(
        **content,
        splits=splits,
        image_shape=(channels, height, width),
        decoding=decoding and row_from_json(Decoding, decoding),
        places=places,
    )
    _check(loaded)
    return loaded


def _check(contents: Manifest) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless every value is possible."""
    _as_name(contents.name, "a data set")
    if not contents.splits or math.prod(check_counts(*contents.image_shape)) > 3 * MAX_PIXELS:
        raise ValueError("it has no splits, or impossible images")
    check_counts(contents.block_size, 1 if contents.num_classes is None else contents.num_classes)
    if contents.encoding not in ENCODINGS or contents.fit not in (None, *get_args(Fit)):
        raise ValueError(f"its encoding is {contents.encoding!r}, and its fit {contents.fit!r}")
    if not isinstance(contents.source, dict):
        raise TypeError("its source is no source")
    if contents.pixels not in PIXELS or contents.binarization not in STATED:
        raise ValueError(
            f"its pixels are {contents.pixels!r}, and their binarization {contents.binarization!r}"
        )
    if contents.image_shape[0] > 1 and contents.binarization != "none":
        raise ValueError(f"it has images in colour, with {contents.binarization} binarization")
    names = contents.class_names
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("its class names are no names")
        if len(names) != contents.num_classes:
            raise ValueError(f"it names {len(names)} of {contents.num_classes} classes")


def _as_name(value: object, what: str) -> str:
    if not is_name(value):
        raise ValueError(f"{value!r} is no name for {what}")
    return str(value)


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


def chosen_binarization(
    asked: Binarization, suggested: Binarization, image_shape: tuple[int, int, int], is_binary: bool
) -> str:
    """How models see the images: as ``asked`` for, else as the source ``suggested``, else as their
    values are.

    Raises UserError if images in colour were to be binarized.
    """
    if asked not in (Binarization.auto, Binarization.none) and image_shape[0] > 1:
        raise UserError(
            f"dataset.binarization={asked.value} makes pixels black or white, but the images are in"
            " colour; leave it out, or make them grey (channels=1)"
        )
    for choice in (asked, suggested):
        if choice is not Binarization.auto:
            return choice.value
    return (Binarization.static if is_binary else Binarization.none).value


def summary(contents: Manifest) -> JsonObject:
    """The sizes and the digest of a data set, as JSON values."""
    return {
        "image_shape": list(contents.image_shape),
        "num_classes": contents.num_classes,
        "pixels": contents.pixels,
        "binarization": contents.binarization,
        "class_names": contents.class_names,
        "splits": {
            split: {"images": contents.num_samples(split), "shards": len(shards)}
            for split, shards in contents.splits.items()
        },
        "bytes": sum(shard.size for shards in contents.splits.values() for shard in shards),
        "manifest_digest": contents.digest,
    }
