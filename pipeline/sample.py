"""``vlae sample``: images drawn from a model. It needs no Ray."""

from typing import Any

import torch

import vlae
from pipeline import pictures
from pipeline.config import SampleConfig
from pipeline.storage import open_storage
from pipeline.versions import device, open_model


def run(config: SampleConfig) -> dict[str, Any]:
    """Draw ``config.num_images`` images to a PNG. The same seed draws the same images. Returns the result."""
    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    output = open_storage(config.output, config.storage.endpoint_url)
    output.write("samples.png", draw(model.network.to(device()), config.num_images, torch.Generator().manual_seed(config.seed)))
    result = {"model": config.model, "weights": model.weights, "seed": config.seed, "pictures": [f"{output.url}/samples.png"]}
    output.write_json("result.json", result)
    return result


def draw(model: vlae.VLAE, num_images: int, generator: torch.Generator) -> bytes:
    """A picture of images drawn from the model."""
    return pictures.samples(vlae.sample(model, num_images, generator))


if __name__ == "__main__":
    from pipeline.cli import main

    main("sample")
