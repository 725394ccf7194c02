"""Resuming a command that makes a data set: a journal of the parts that are finished.

Each part has an entry, a JSON object below ``work/`` of the data set, which is kept until the
manifest is published.
"""

import hashlib
import json
from typing import Any

from pipeline.storage.base import ObjectNotFound, Storage
from pipeline.values import JsonObject

FOLDER = "work"


class Journal:
    """The finished parts of one recipe. Picklable; each recipe has a journal of its own."""

    def __init__(self, storage: Storage, recipe: JsonObject) -> None:
        self._storage = storage
        content = json.dumps(recipe, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._folder = storage.child(f"{FOLDER}/{digest}")

    def finished(self) -> set[str]:
        """The names of the finished parts."""
        return {key.removesuffix(".json") for key in self._folder.list()}

    def read(self, name: str) -> Any:
        """A part's entry; None if it has none."""
        try:
            return self._folder.read_json(f"{name}.json")
        except ObjectNotFound:
            return None

    def write(self, name: str, value: Any) -> None:
        """Enter a part as finished: call it when everything that the part writes is in place."""
        self._folder.write_json(f"{name}.json", value)

    def clear(self) -> None:
        """Delete all entries, also those of other recipes: the data set is published."""
        self._storage.delete(self._storage.list(FOLDER))
