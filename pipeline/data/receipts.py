"""What makes a long command resumable: a receipt for each finished part, kept until the whole is
published.
"""

import hashlib
import json
from typing import Any

from pipeline.storage.base import ObjectNotFound, Storage

FOLDER = "work"


class Receipts:
    """The receipts of one recipe, below ``work/`` of a data set. Picklable; those of other recipes
    are never mixed up with them.
    """

    def __init__(self, storage: Storage, recipe: dict[str, Any]) -> None:
        self._storage = storage
        digest = hashlib.sha256(
            json.dumps(recipe, sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        self._place = storage.child(f"{FOLDER}/{digest}")

    def names(self) -> set[str]:
        """The parts that are finished."""
        return {key.removesuffix(".json") for key in self._place.list()}

    def read(self, name: str) -> Any:
        """A part's receipt; none if it has none."""
        try:
            return self._place.read_json(f"{name}.json")
        except ObjectNotFound:
            return None

    def write(self, name: str, value: Any) -> None:
        """Last, when all that the part wrote is in place."""
        self._place.write_json(f"{name}.json", value)

    def clear(self) -> None:
        """Forget all, those of earlier recipes too: the whole is published."""
        self._storage.delete(self._storage.list(FOLDER))
