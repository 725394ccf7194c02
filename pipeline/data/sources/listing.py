"""The images of a source, listed on disk, so that memory does not grow with their number."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.data.sources.base import SPLITS, hash_fraction
from pipeline.errors import UserError

BATCH = 10_000
"""Rows that are written or read at once."""
SCALE = 1 << 48
"""Of ``hash_fraction``, as an integer."""
MAX_CLASSES = 1 << 20
"""Different labels; more are no classes."""
Label = int | str | None


@dataclass(frozen=True, slots=True)
class Item:
    """An image: a file, or a part of one."""

    key: str  # decides its split
    file: str  # the key of the file in storage
    label: int  # -1 if there is none
    offset: int = 0  # in the file, in bytes; in Parquet, the row
    size: int = 0  # in bytes, if it is a part of a file


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image as it was found, before its split and label are known."""

    key: str
    file: str
    version: str
    """Something that changes with its content, such as the size and the time of the change."""
    offset: int = 0
    size: int = 0
    label: Label = None
    split: str | None = None
    """The split that its file states."""


class Listing:
    """All images of a source, in splits.

    SQLite keeps the rows in a temporary file, sorts them there, and deletes it when the process
    ends. Images are ordered by the hash of their keys, so that classes are mixed; without ``mixed``
    in the order in which they were found.
    """

    def __init__(self, mixed: bool) -> None:
        self._mixed = mixed
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode=OFF")
        self._rows.execute(
            "CREATE TABLE found (number INTEGER PRIMARY KEY, hash INTEGER, key BLOB, file BLOB,"
            " version BLOB, offset INTEGER, size INTEGER, label, split TEXT)"
        )
        self.counts = dict.fromkeys(SPLITS, 0)
        self.num_found = 0

    def add_all(self, candidates: Iterator[Candidate]) -> None:
        """Add images, one by one."""
        rows = (
            (
                _hash(each.key),
                os.fsencode(each.key),
                os.fsencode(each.file),
                each.version.encode(errors="surrogateescape"),
                each.offset,
                each.size,
                str(each.label) if is_huge(each.label) else each.label,
                each.split,
            )
            for each in candidates
        )
        while batch := list(islice(rows, BATCH)):
            self._rows.execute("BEGIN")
            self._rows.executemany(
                "INSERT INTO found (hash, key, file, version, offset, size, label, split)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                batch,
            )
            self._rows.execute("COMMIT")
            self.num_found += len(batch)

    def folders(self) -> Iterator[tuple[str, ...]]:
        """The parts of the folder of each image's key."""
        for (key,) in self._rows.execute("SELECT key FROM found"):
            yield _folder(key)

    def place(
        self,
        where: Callable[[tuple[str, ...]], tuple[str | None, int]],
        drop: int = 0,
        keep_splits: bool = False,
    ) -> None:
        """Give each image the split and the label that the folder of its key has.

        Then ``drop`` parts are cut off the front of every key. ``keep_splits`` leaves the splits as
        they were found.
        """
        self._define("split_of", lambda key: where(_folder(key))[0])
        self._define("label_of", lambda key: where(_folder(key))[1])
        self._rows.execute("UPDATE found SET label = label_of(key)")
        if not keep_splits:
            self._rows.execute("UPDATE found SET split = split_of(key)")
        if drop:
            self._define("short", lambda key: b"/".join(key.split(b"/")[drop:]))
            self._define("hashed", lambda key: _hash(os.fsdecode(key)))
            self._rows.execute("UPDATE found SET key = short(key)")
            self._rows.execute("UPDATE found SET hash = hashed(key)")

    def name_labels(self) -> list[str] | None:
        """Number labels that are names, in their order, and return these; None if all are numbers.

        Numbers too large or too sparse to count classes by are names, too. Raises UserError if
        there are too many.
        """
        found = self._rows.execute("SELECT DISTINCT label FROM found WHERE label IS NOT NULL")
        labels = [label for (label,) in islice(found, MAX_CLASSES + 1)]
        names = class_names(labels)
        if names is None:
            return None
        order = {name: number for number, name in enumerate(names)}
        self._define("number_of", lambda label: -1 if label == -1 else order[str(label)])
        self._rows.execute("UPDATE found SET label = number_of(label) WHERE label IS NOT NULL")
        return names

    def largest_label(self) -> int:
        """The largest label, of numbers; -1 if there is none."""
        ((largest,),) = self._rows.execute("SELECT max(label) FROM found")
        return -1 if largest is None else int(largest)

    def divide(self, test_fraction: float, valid_fraction: float, stated_by: str) -> dict[str, str]:
        """Put every image into a split, and sort. Returns what decided it, by split.

        What states a split keeps it; where no image states ``valid`` or ``test``, the hash takes
        some of the others for it, and at least one if ``train`` keeps one.
        """
        stated = {
            split for (split,) in self._rows.execute("SELECT DISTINCT split FROM found") if split
        }
        test = int(test_fraction * SCALE)
        valid = int((test_fraction + (1 - test_fraction) * valid_fraction) * SCALE)
        origins = {split: stated_by if split in stated else "hash of the key" for split in SPLITS}
        bounds = {"test": (0, test), "valid": (test, valid)}
        for split, (first, last) in bounds.items():
            if split not in stated:
                self._rows.execute(
                    "UPDATE found SET split = ? WHERE coalesce(split, 'train') = 'train'"
                    " AND hash >= ? AND hash < ?",
                    (split, first, last),
                )
        self._rows.execute("UPDATE found SET split = 'train' WHERE split IS NULL")
        for split in bounds:
            self._count()
            if not self.counts[split] and self.counts["train"] > 1:
                self._rows.execute(
                    "UPDATE found SET split = ? WHERE number = (SELECT number FROM found"
                    " WHERE split = 'train' ORDER BY hash, key LIMIT 1)",
                    (split,),
                )
                origins[split] += " (one image, so that it has any)"
        self._count()
        order = "hash, key, number" if self._mixed else "number"
        self._rows.execute(
            "CREATE TABLE item (place INTEGER PRIMARY KEY, split TEXT, key BLOB, file BLOB,"
            " version BLOB, offset INTEGER, size INTEGER, label INTEGER)"
        )
        self._rows.execute(
            "INSERT INTO item (split, key, file, version, offset, size, label)"
            " SELECT split, key, file, version, offset, size, coalesce(label, -1) FROM found"
            f" ORDER BY CASE split WHEN 'train' THEN 0 WHEN 'valid' THEN 1 ELSE 2 END, {order}"
        )
        self._rows.execute("DROP TABLE found")
        return origins

    def _count(self) -> None:
        self.counts = dict.fromkeys(SPLITS, 0) | dict(
            self._rows.execute("SELECT split, count(*) FROM found GROUP BY split")
        )

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label; None if there are no labels."""
        ((largest,),) = self._rows.execute("SELECT max(label) FROM item")
        return None if largest is None or largest < 0 else int(largest) + 1

    @property
    def num_unlabelled(self) -> int:
        ((count,),) = self._rows.execute("SELECT count(*) FROM item WHERE label < 0")
        return int(count)

    def items(self, split: str, start: int, stop: int) -> list[Item]:
        """The images ``start`` to ``stop`` of a split."""
        first = 1 + sum(self.counts[name] for name in SPLITS[: SPLITS.index(split)])
        rows = self._rows.execute(
            "SELECT key, file, label, offset, size FROM item WHERE place >= ? AND place < ?",
            (first + start, first + min(stop, self.counts[split])),
        )
        return [
            Item(os.fsdecode(key), os.fsdecode(file), label, offset, size)
            for key, file, label, offset, size in rows
        ]

    def sha256(self) -> str:
        """Of the keys, versions and labels of all images, split by split."""
        content = hashlib.sha256()
        for split, key, version, label in self._rows.execute(
            "SELECT split, key, version, label FROM item ORDER BY place"
        ):
            content.update(split.encode() + b"/" + key + b"/" + version + b"/%d\n" % label)
        return content.hexdigest()

    def _define(self, name: str, function: Callable[..., str | int | bytes | None]) -> None:
        self._rows.create_function(name, 1, function, deterministic=True)


def _hash(key: str) -> int:
    return int(hash_fraction(key) * SCALE)


def _folder(key: bytes) -> tuple[str, ...]:
    """The parts of the folder of a key."""
    return tuple(os.fsdecode(key).split("/")[:-1])


def class_names(labels: Collection[Label]) -> list[str] | None:
    """The names of the classes of different labels, in their order; None if all are numbers.

    Numbers too large or too sparse to count classes by are names, too. Raises UserError if there
    are too many.
    """
    if len(labels) > MAX_CLASSES:
        raise UserError(
            f"there are more than {MAX_CLASSES:,} different labels, which are no classes"
        )
    return names_of(labels)


def names_of(labels: Collection[Label]) -> list[str] | None:
    """``class_names``, however many there are."""
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels) and is_dense(numbers):
        return None
    named = [str(number) for number in sorted(numbers) if number != -1]
    words = sorted({str(label) for label in labels if isinstance(label, str)} - set(named))
    return [*named, *words]


def is_huge(label: Label) -> bool:
    """Whether it is a number that SQLite cannot hold."""
    return isinstance(label, int) and not -(1 << 63) <= label < 1 << 63


def is_dense(labels: list[int]) -> bool:
    """Whether numbers count classes from 0: not negative but for -1, and with few gaps."""
    return min(labels, default=0) >= -1 and max(labels, default=0) < max(1000, 20 * len(labels))
