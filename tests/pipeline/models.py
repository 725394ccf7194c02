"""Finished runs with a small model, as training and evaluation write them."""

import hashlib
import json
from typing import Any

import torch

import vlae
from pipeline import commands
from pipeline.config import options
from pipeline.evaluation import pictures
from pipeline.runs import Run
from pipeline.storage.base import Storage

MODEL = options.to_dict(commands.load("train", ["model=tiny"]))["model"]
FIGURES = {
    "elbo_nats": 90.5,
    "elbo_nats_se": 0.5,
    "elbo_bits_per_dim": 2.04,
    "distortion_nats": 82.0,
    "distortion_nats_se": 0.5,
    "rate_nats": 8.5,
    "rate_nats_se": 0.1,
    "rate_bits": 12.25,
    "iwae_nats": 88.0,
    "iwae_nats_se": 0.4,
    "iwae_bits_per_dim": 1.98,
    "iwae_samples": 8,
    "resolution_px": 5.2,
    "resolution_px_se": 0.05,
    "num_images": 1000,
}


def prepare_run(storage: Storage, seed: int, **figures: float) -> Run:
    """A finished and evaluated run with invented figures."""
    torch.manual_seed(seed)
    run = Run(storage.child(f"runs/{seed}"))
    settings = options.to_dict(commands.load("train", ["model=tiny", f"name=run-{seed}"]))
    training = {"config": settings, "manifest": "0" * 64, "valid": FIGURES}
    run.publish(vlae.build(image_shape=(1, 8, 8), **MODEL), training)
    drawn = {
        "reconstructions": pictures.reconstructions(torch.rand(2, 1, 8, 8), []),
        "samples": pictures.samples(torch.rand(2, 1, 8, 8)),
    }
    for name, picture in drawn.items():
        run.storage.write(f"evaluation/{name}.png", picture)
    evaluation: dict[str, Any] = {
        "weights": hashlib.sha256(run.storage.read("model/model.safetensors")).hexdigest(),
        "image_shape": [1, 8, 8],
        "bounds": {"samples": 8, "seed": 0},
        "split": "valid",
        "valid": FIGURES | figures,
        "pictures": [f"{run.url}/evaluation/{name}.png" for name in drawn],
    }
    run.storage.write_json("evaluation/result.json", json.loads(json.dumps(evaluation)))
    return run
