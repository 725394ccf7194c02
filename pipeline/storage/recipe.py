"""The options that something was begun with, kept beside it so that they are not changed."""

from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.values import JsonObject


def differing(kept: JsonObject, wanted: JsonObject) -> list[str]:
    """The options in which two recipes differ, those of a section as ``section.option``."""
    names = []
    for key in sorted(kept.keys() | wanted.keys()):
        one, other = kept.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += [f"{key}.{name}" for name in differing(one, other)]
        elif one != other:
            names.append(key)
    return names


def begin(storage: Storage, key: str, recipe: JsonObject) -> list[str]:
    """Keep ``recipe`` as ``key``, unless one is kept; returns the options in which that differs."""
    if storage.exists(key):
        return differing(storage.read_json(key), recipe)
    storage.write_json(key, recipe)
    return []


def begin_named(storage: Storage, key: str, recipe: JsonObject, what: str) -> None:
    """``begin`` for what has a name and a manifest, such as a run.

    Raises UserError if ``what`` was begun with other options, or on another data set.
    """
    changed = begin(storage, key, recipe)
    if changed:
        names = ", ".join(name for name in changed if name != "manifest")
        raise UserError(
            f"{what} in {storage.url} was started with another {names or 'data set of this name'};"
            " give this one another name=, or delete that folder"
        )
