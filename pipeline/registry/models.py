"""Opening a model: from the registry, from a run's folder, or one that comes with the package."""

import tempfile
from pathlib import Path

from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.registry.versions import Registry
from pipeline.runs import OpenedModel, Run
from vlae import pretrained

PRETRAINED = "pretrained/"
"""How the address of a model that comes with the package begins."""


def open_model(reference: str, registry: RegistryOptions, storage: StorageOptions) -> OpenedModel:
    """The model of ``models:/NAME@ALIAS``, ``models:/NAME/NUMBER``, ``pretrained/NAME`` or a run's
    folder.

    Raises UserError if it does not exist or is damaged.
    """
    if reference.startswith(PRETRAINED):
        return _open_pretrained(reference, storage)
    if not reference.startswith("models:/"):
        return Run.at(reference, storage.endpoint_url).open()
    versions = Registry(registry)
    version = versions.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:
        versions.download(version.name, version.number, Path(folder))
        return OpenedModel.read(reference, Path(folder), (version.name, version.number))


def _open_pretrained(reference: str, storage: StorageOptions) -> OpenedModel:
    """A model that comes with the package; its data set is the one of that name in ``storage``."""
    try:
        folder = pretrained.folder(reference.removeprefix(PRETRAINED))
    except ValueError as error:
        raise UserError(str(error)) from None
    model = OpenedModel.read(reference, folder)
    dataset = model.training["config"]["dataset"]
    dataset["url"] = f"{storage.root}/datasets/{dataset['name']}"
    return model
