"""Opening a model: from the registry, from a run's folder, or one that comes with the package."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.data import DataSet
from pipeline.errors import UserError
from pipeline.runs import EVALUATION, OpenedModel, Run, open_data
from pipeline.values import JsonObject
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
    from pipeline.registry.versions import Registry  # here, since MLflow takes seconds

    versions = Registry(registry)
    version = versions.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:
        versions.download(version.name, version.number, Path(folder))
        return OpenedModel.read(reference, Path(folder), (version.name, version.number))


def open_models(
    references: Sequence[str],
    dataset_url: str | None,
    registry: RegistryOptions,
    storage: StorageOptions,
) -> tuple[list[OpenedModel], DataSet]:
    """Models to compare, and the data set whose images all of them see.

    By default it is that of the first model's training. Raises UserError as ``open_model`` and
    ``open_data`` do.
    """
    models = [open_model(each, registry, storage) for each in references]
    data = open_data(models[0], dataset_url, storage)
    for other in models[1:]:
        open_data(other, data.storage.url, storage)
    return models, data


def copy_evaluation(
    model: OpenedModel, registry: RegistryOptions, storage: StorageOptions, folder: Path
) -> JsonObject | None:
    """The record of an opened model's evaluation, whose pictures are copied into ``folder``.

    None if the model has not been evaluated. Raises UserError if a file is missing or damaged.
    """
    if model.version is None and not model.reference.startswith(PRETRAINED):
        run = Run.at(model.reference, storage.endpoint_url)
        evaluation = run.evaluation(model.weights)
        if evaluation is not None:
            run.download_pictures(evaluation, folder)
        return evaluation
    with tempfile.TemporaryDirectory() as place:
        if model.version:
            from pipeline.registry.versions import Registry

            source = Registry(registry).download(*model.version, Path(place))
        else:
            source = pretrained.folder(model.reference.removeprefix(PRETRAINED))
        evaluation = json.loads((source / f"{EVALUATION}.json").read_text())
        for picture in evaluation["pictures"]:
            file = picture.rpartition("/")[2]
            shutil.copyfile(source / file, folder / file)
    return evaluation


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
