"""``vlae export``: a model for other programs and for a model hub. It does not use Ray."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.addresses import name_of
from pipeline.config.evaluation import A_MODEL, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class ExportConfig:
    """Write a model as ONNX and torch.export, with a card, as a folder that model hubs take."""

    model: str = option(A_MODEL)
    output: str = option(
        "where the folder `model` goes, which a hub takes as it is",
        f"outputs/export/{MODEL_NAME}",
        path=True,
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")


def run(config: ExportConfig) -> JsonObject:
    """Write the folder, once every graph in it is held to the model. Returns what was written.

    Raises UserError if the model does not exist, its licence is none, a package is missing, or a
    graph cannot be made or differs from the model.
    """
    import tempfile
    from pathlib import Path

    import torch

    from pipeline.export.folder import write_folder
    from pipeline.export.graphs import check_installed
    from pipeline.registry.bom import check_license
    from pipeline.registry.models import open_model
    from pipeline.runs import MODEL
    from pipeline.storage import open_storage

    check_installed()
    check_license(config.registry.license)
    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    output = open_storage(config.output, config.storage.endpoint_url)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        interface = write_folder(
            model, name_of(config.model), config.registry, config.storage, folder
        )
        files = sorted(path.name for path in folder.iterdir())
        for file in files:
            output.upload(f"{MODEL}/{file}", folder / file)
    return {
        "model": config.model,
        "weights": model.weights,
        "differences": {name: graph["difference"] for name, graph in interface["graphs"].items()},
        "url": f"{output.url}/{MODEL}",
        "files": files,
    }


def format_result(config: ExportConfig, result: JsonObject) -> str:
    """What was written, and how far the graphs are from the model."""
    differences = ", ".join(
        f"{name} within {difference:.0e}" for name, difference in result["differences"].items()
    )
    return f"{len(result['files'])} files written; of the model: {differences}\n{result['url']}"


COMMAND = Command(ExportConfig, run, format_result, lambda config: config.output)
