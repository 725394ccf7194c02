"""``vlae reconstruct``: images beside what a model makes of their codes. It needs no Ray."""

from typing import Any

import torch
from torch import Tensor

import vlae
from pipeline import pictures
from pipeline.config import ReconstructConfig
from pipeline.loader import EvalLoader, binarize
from pipeline.storage import open_storage
from pipeline.versions import device, open_data, open_model

DECODINGS = 3
"""How many times each code is decoded."""


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Draw the first ``config.num_images`` images of a split, each above several decodings of its code, to a PNG. Returns the result."""
    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    data, contents = open_data(model, config.dataset_url, config.storage)
    loader = EvalLoader(data, contents, split=config.split, batch_size=config.num_images, num_images=config.num_images)
    x = binarize(next(iter(loader)), model.binarization, config.seed)
    output = open_storage(config.output, config.storage.endpoint_url)
    output.write(
        "reconstructions.png", draw(model.network.to(device()), x.to(device()), torch.Generator().manual_seed(config.seed))
    )
    result = {
        "model": config.model,
        "weights": model.weights,
        "dataset": {"url": data.url, "manifest": contents.digest},
        "split": config.split,
        "seed": config.seed,
        "pictures": [f"{output.url}/reconstructions.png"],
    }
    output.write_json("result.json", result)
    return result


def draw(model: vlae.VLAE, x: Tensor, generator: torch.Generator) -> bytes:
    """A picture of images (num_images, channels, height, width), as the model sees them, and of decodings of their codes."""
    return pictures.reconstructions(x, [vlae.reconstruct(model, x, generator) for _ in range(DECODINGS)])


if __name__ == "__main__":
    from pipeline.cli import main

    main("reconstruct")
