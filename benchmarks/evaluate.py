"""How fast ``vlae evaluate`` estimates an IWAE bound, beside a plain loop over images.

    python benchmarks/evaluate.py [--model MODEL] [--images 16] [--samples 1024] [--rounds 5]

MODEL is ``fast``, ``long`` (the model of ``experiment=long``), or another model preset; its weights
are random, and so are the images, 28x28 and black and white. The plain loop encodes each image once
and decodes its codes, 64 at a time, with the image repeated for each. Both run on one core and on
two: the plain loop with PyTorch's threads, ``evaluate`` with passes side by side, and in Ray tasks.
All ways take turns; the figures are medians over the rounds, in images times samples per second.
"""

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlae
from pipeline import commands
from pipeline.cluster import connect
from pipeline.config.evaluation import BoundOptions
from pipeline.config.options import to_dict
from pipeline.config.sections import ClusterOptions, Encoding, StorageOptions
from pipeline.data import DataSet
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_images
from pipeline.evaluation import estimates
from pipeline.runs import OpenedModel
from pipeline.storage import open_storage

SHAPE = (1, 28, 28)
PLAIN_SAMPLES = 64
"""Codes that the plain loop decodes at once."""


def make_model(name: str) -> OpenedModel:
    """A model with random weights everywhere: fresh ones ignore their input."""
    chosen = "experiment=long" if name == "long" else f"model={name}"
    torch.manual_seed(0)
    config = to_dict(commands.load("train", ["dataset=mnist", chosen]))
    network = vlae.build(image_shape=SHAPE, **config["model"]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    config["dataset"]["binarization"] = "none"  # the images are black and white already
    return OpenedModel(name, network, {"config": config}, name)


def make_data(folder: str, count: int) -> DataSet:
    """Random black and white images."""
    storage, (channels, height, width) = open_storage(folder), SHAPE
    random = np.random.default_rng(0)
    images = list(255 * (random.random((count, height, width, channels)) < 0.2).astype(np.uint8))
    labels = np.full(count, -1, dtype=np.int64)
    shard = write_images(storage, "test/00000.tar", 0, images, labels, 100, Encoding.npy, None)
    manifest = Manifest("random", SHAPE, None, 100, {"test": (shard,)}, {"source": "random"})
    manifest.publish(storage)
    return DataSet(storage, manifest)


@torch.no_grad()
def plainly(model: vlae.VLAE, images: torch.Tensor, samples: int, threads: int) -> float:
    """The mean IWAE bound by a plain loop, in nats."""
    torch.set_num_threads(threads)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for x in images.split(1):
        posterior, weights = model.encoder(x), []
        for first in range(0, samples, PLAIN_SAMPLES):
            count = min(PLAIN_SAMPLES, samples - first)
            noise = torch.randn(count, model.latents, generator=generator)
            z, log_posterior = posterior.sample_with_log_prob(noise[:, None])
            z, repeated = z[:, 0], x.expand(count, *x.shape[1:])
            density = model.decoder(z, repeated).log_prob(repeated.permute(0, 2, 3, 1))
            rate = (log_posterior[:, 0] - model.prior.log_prob(z)).sum(-1)
            weights.append(density - rate)
        total += (torch.logsumexp(torch.cat(weights), 0) - math.log(samples)).item()
    return total / len(images)


def ours(
    model: OpenedModel, data: DataSet, samples: int, threads: int, *, tasks: bool = False
) -> float:
    """The mean IWAE bound as ``vlae evaluate`` estimates it, in nats."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(1)
    bounds = BoundOptions(samples=samples)
    # So few images are a single block, and would be measured here: tasks get an eighth each.
    passes = data.manifest.num_samples("test") * samples // 128
    estimates.BLOCK, estimates.ALONE = (max(1, passes // 8), 0) if tasks else (passes + 1, 0)
    with tempfile.TemporaryDirectory() as folder:
        found = estimates.estimate_split(
            model, data, open_storage(folder), "test", bounds, (lambda: None) if tasks else None
        )
        return float(torch.cat([each.iwae for each in found]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fast")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, samples = make_model(arguments.model), arguments.samples
    pairs = arguments.images * samples
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(str(Path(folder) / "data"), arguments.images)
        (batch,) = EvalLoader(data, split="test", batch_size=arguments.images)
        images = batch.images.float() / 255
        connect(ClusterOptions(), StorageOptions())
        ways: dict[str, Callable[[], float]] = {
            "plain_1_core": lambda: plainly(model.network, images, samples, 1),
            "plain_2_cores": lambda: plainly(model.network, images, samples, 2),
            "evaluate_1_core": lambda: ours(model, data, samples, 1),
            "evaluate_2_cores": lambda: ours(model, data, samples, 2),
            "evaluate_tasks": lambda: ours(model, data, samples, 1, tasks=True),
        }
        found = {name: way() for name, way in ways.items()}  # also warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
            print(
                f"round {number + 1}: { ({n: round(pairs / s[-1]) for n, s in seconds.items()}) }"
            )
    speed = {name: pairs / statistics.median(each) for name, each in seconds.items()}
    result: dict[str, Any] = {
        "model": arguments.model,
        "images": arguments.images,
        "samples": samples,
        "rounds": arguments.rounds,
        "pairs_per_second": {name: round(value) for name, value in speed.items()},
        "speedup_1_core": round(speed["evaluate_1_core"] / speed["plain_1_core"], 2),
        "speedup_2_cores": round(speed["evaluate_2_cores"] / speed["plain_2_cores"], 2),
        "hours_of_10000_images_4096_samples": round(
            1e4 * 4096 / max(speed["evaluate_2_cores"], speed["evaluate_tasks"]) / 3600, 2
        ),
        "iwae_nats": {name: round(value, 4) for name, value in found.items()},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
