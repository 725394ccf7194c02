"""What names say: the splits and classes that folders and files are named after."""

import re
from collections.abc import Callable, Iterable

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
    """What the folders of a tree of images say: splits and classes.

    Folders around everything say nothing. The top folders within them are splits if all are named
    so and one of them is the training split; those below them, or else the top folders, are the
    classes, in the order of their names. Splits may also lie in every class, as in
    ``cat/train/1.png``.
    """

    def __init__(self, where: str, folders: Callable[[], Iterable[tuple[str, ...]]]) -> None:
        """``folders()`` gives the parts of each image's folder below ``where``.

        Raises UserError if images lie both in classes and beside them, or in splits and beside
        them.
        """
        self.around = depth_around(folders())
        """The number of folders around everything."""
        found = {parts[self.around :][:2] for parts in folders()}
        tops, seconds = ({parts[depth : depth + 1] for parts in found} for depth in (0, 1))
        self._split_depth = 0 if are_splits(tops) else 1 if are_splits(seconds) else None
        splits = sorted(top[0] for top in tops if top and top[0].lower() in SPLIT_OF)
        if self._split_depth is None and {"train"} < {SPLIT_OF[name.lower()] for name in splits}:
            other = sorted("/".join(top) or "images" for top in tops if not set(top) & set(splits))
            raise UserError(
                f"{where} has folders of splits ({', '.join(splits)}) and, beside them, {other[0]};"
                " move that elsewhere"
            )
        levels = seconds if self._split_depth == 0 else tops
        self.classes = sorted(level[0] for level in levels if level)
        if () in levels and self.classes:
            raise UserError(
                f"{where} has images both in sub-folders (the classes, such as {self.classes[0]})"
                " and outside; move these"
            )
        self._labels = {name: label for label, name in enumerate(self.classes)}

    def split(self, folder: tuple[str, ...]) -> str | None:
        """The split that a folder states."""
        if self._split_depth is None:
            return None
        return SPLIT_OF[folder[self.around + self._split_depth].lower()]

    def label(self, folder: tuple[str, ...]) -> int:
        """The class of the images in a folder; -1 if there are no classes."""
        depth = self.around + (self._split_depth == 0)
        return self._labels[folder[depth]] if self._labels else -1


def are_splits(level: set[tuple[str, ...]]) -> bool:
    """Whether all folders of a level are named after splits, and one after the training split."""
    names = [part[0].lower() if part else "" for part in level]
    return "train" in {SPLIT_OF.get(name) for name in names} and all(map(SPLIT_OF.get, names))


def depth_around(folders: Iterable[tuple[str, ...]]) -> int:
    """The number of folders around all images that are neither a split nor a class.

    The innermost is a class if some images lie in it and others in folders below.
    """
    folders = iter(folders)
    first = next(folders, ())
    common = shallowest = deepest = len(first)
    for folder in folders:
        while folder[:common] != first[:common]:
            common -= 1
        shallowest, deepest = min(shallowest, len(folder)), max(deepest, len(folder))
    if shallowest == common < deepest:
        common -= common > 0
    splits = (depth for depth in range(common) if first[depth].lower() in SPLIT_OF)
    return next(splits, common)
