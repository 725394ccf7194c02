"""A data set: a manifest, and the storage that its shards are read from."""

from dataclasses import dataclass

from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.storage.base import Storage


@dataclass(frozen=True)
class DataSet:
    """Shards and their manifest. Small and picklable: pass it to workers as it is."""

    storage: Storage
    """Holds the manifest and the indices, and the shards unless they are elsewhere."""
    manifest: Manifest

    @classmethod
    def load(cls, storage: Storage) -> "DataSet":
        """The data set in ``storage``.

        Raises ``UserError`` if there is none, or one that is damaged or of another version, or
        whose shards lie where they are not followed (``pipeline.places``).
        """
        return cls(storage, manifests.load(storage))
