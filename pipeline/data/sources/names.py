"""What names say: the splits and classes that folders and files are named after."""

import re
from collections.abc import Iterable

from pipeline.errors import UserError

NAMES = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
"""The names of each split, in lower case."""
SPLIT_OF = {name: split for split, names in NAMES.items() for name in names}


def split_of_file(name: str) -> str | None:
    """The split in the name of a file or of the folders around it: ``val-00.tar``, ``test/0.tar``.

    None if it states none.
    """
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SPLIT_OF:
            return SPLIT_OF[folder]
    words = [word for word in re.split(r"[^a-z]+", file.partition(".")[0]) if word]
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


def stated_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits that files state, by the files' names; none if no file is the training split."""
    found = {name: split for name in names if (split := split_of_file(name))}
    return found if "train" in found.values() else {}


class Tree:
    """What the folders of a tree of images say: splits, then classes, then whatever is below.

    The top folders are splits if all are named so and one of them is the training split; those
    below them, or else the top folders, are the classes, in the order of their names.
    """

    def __init__(self, where: str, folders: Iterable[tuple[str, ...]]) -> None:
        """``folders`` are the parts of each image's folder below ``where``.

        Raises UserError if images lie both in classes and beside them.
        """
        found = {parts[:2] for parts in folders}
        tops = {parts[:1] for parts in found}
        named = {top[0] for top in tops if top and top[0].lower() in SPLIT_OF}
        splits = {SPLIT_OF[name.lower()] for name in named}
        self.has_splits = "train" in splits and len(named) == len(tops)
        if "train" in splits and len(splits) > 1 and not self.has_splits:
            other = sorted("/".join(top) or "images" for top in tops if not set(top) & named)
            raise UserError(
                f"{where} has folders of splits ({', '.join(sorted(named))}) and, beside them,"
                f" {other[0]}; move that elsewhere"
            )
        depth = int(self.has_splits)
        levels = {parts[depth : depth + 1] for parts in found}
        if () in levels and len(levels) > 1:
            inside = sorted(level[0] for level in levels if level)
            raise UserError(
                f"{where} has images both in sub-folders (the classes, such as {inside[0]}) and"
                " outside; move these"
            )
        self.classes = sorted(level[0] for level in levels if level)
        self._labels = {name: label for label, name in enumerate(self.classes)}

    def split(self, folder: tuple[str, ...]) -> str | None:
        """The split that a folder states."""
        return SPLIT_OF[folder[0].lower()] if self.has_splits else None

    def label(self, folder: tuple[str, ...]) -> int:
        """The class of the images in a folder; -1 if there are no classes."""
        depth = int(self.has_splits)
        return self._labels[folder[depth]] if self._labels else -1
