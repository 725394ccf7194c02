"""``vlae sample``: images drawn from a model. It does not use Ray."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class SampleConfig:
    """Draw images from a model."""

    model: str = option(A_MODEL)
    num_images: int = option("the number of images", 40, at_least=1, below=1 << 14)
    seed: int = option("the seed of all random numbers", 0)
    output: str = option("where the picture goes", f"outputs/sample/{MODEL_NAME}", path=True)
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")


def run(config: SampleConfig) -> JsonObject:
    """Draw ``config.num_images`` images to a PNG; the same seed draws the same images."""
    import torch

    from pipeline.evaluation import pictures
    from pipeline.machine import device
    from pipeline.registry.models import open_model
    from pipeline.storage import open_storage

    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    output = open_storage(config.output, config.storage.endpoint_url)
    output.write(
        "samples.png",
        pictures.draw_samples(
            model.network.to(device()),
            config.num_images,
            torch.Generator().manual_seed(config.seed),
        ),
    )
    return {
        "model": config.model,
        "weights": model.weights,
        "seed": config.seed,
        "pictures": [f"{output.url}/samples.png"],
    }


def format_result(config: SampleConfig, result: JsonObject) -> str:
    """The pictures' addresses."""
    return "\n".join(f"picture: {url}" for url in result["pictures"])


COMMAND = Command(SampleConfig, run, format_result, lambda config: config.output)
