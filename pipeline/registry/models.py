"""Opening a model, from the registry or from a run's folder."""

import tempfile
from pathlib import Path

from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.registry.versions import Registry
from pipeline.runs import OpenedModel, open_run, opened
from pipeline.storage import open_storage


def open_model(reference: str, registry: RegistryOptions, storage: StorageOptions) -> OpenedModel:
    """The model of ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a run's folder.

    Raises UserError if it is not there or damaged.
    """
    if not reference.startswith("models:/"):
        return open_run(open_storage(reference, storage.endpoint_url))
    versions = Registry(registry)
    version = versions.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:
        versions.download(version["name"], version["version"], Path(folder))
        return opened(reference, Path(folder), version)
