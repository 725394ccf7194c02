"""``vlae reconstruct``: images above their reconstructions. It does not use Ray."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, ANOTHER_DATA_SET, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class ReconstructConfig:
    """Draw images of a data set, each above its reconstructions by a model."""

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None, path=True)
    num_images: int = option("the number of images, the first ones", 40, at_least=1, below=1 << 14)
    seed: int = option("the seed of binarization and all noise", 0)
    output: str = option("where the picture goes", f"outputs/reconstruct/{MODEL_NAME}", path=True)
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")


def run(config: ReconstructConfig) -> JsonObject:
    """Draw the first images of a split to a PNG, each above several decodings of its code."""
    import torch

    from pipeline.data.batch import binarize
    from pipeline.data.loader import EvalLoader
    from pipeline.evaluation import pictures
    from pipeline.machine import device
    from pipeline.registry.models import open_model
    from pipeline.runs import open_data
    from pipeline.storage import open_storage

    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    data = open_data(model, config.dataset_url, config.storage)
    loader = EvalLoader(
        data,
        split=config.split,
        batch_size=config.num_images,
        num_images=config.num_images,
    )
    x = binarize(next(iter(loader)), model.binarization, config.seed)
    output = open_storage(config.output, config.storage.endpoint_url)
    output.write(
        "reconstructions.png",
        pictures.draw_reconstructions(
            model.network.to(device()), x.to(device()), torch.Generator().manual_seed(config.seed)
        ),
    )
    return {
        "model": config.model,
        "weights": model.weights,
        "dataset": {"url": data.storage.url, "manifest": data.manifest.digest},
        "split": config.split,
        "seed": config.seed,
        "pictures": [f"{output.url}/reconstructions.png"],
    }


def format_result(config: ReconstructConfig, result: JsonObject) -> str:
    """The pictures' addresses."""
    return "\n".join(f"picture: {url}" for url in result["pictures"])


COMMAND = Command(ReconstructConfig, run, format_result, lambda config: config.output)
