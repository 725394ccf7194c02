"""Opening a model, from the registry or from a run's folder."""

import tempfile
from pathlib import Path

from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.registry.versions import Registry
from pipeline.runs import OpenedModel, Run


def open_model(reference: str, registry: RegistryOptions, storage: StorageOptions) -> OpenedModel:
    """The model of ``models:/NAME@ALIAS``, ``models:/NAME/NUMBER`` or a run's folder.

    Raises UserError if it does not exist or is damaged.
    """
    if not reference.startswith("models:/"):
        return Run.at(reference, storage.endpoint_url).open()
    versions = Registry(registry)
    version = versions.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:
        versions.download(version.name, version.number, Path(folder))
        return OpenedModel.read(reference, Path(folder), (version.name, version.number))
