"""``vlae evaluate``: a model's rate, distortion and bounds on held-out images, and its pictures. It needs no Ray."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vlae
from pipeline import manifest, pictures
from pipeline.config import Binarization, EvaluateConfig
from pipeline.errors import UserError
from pipeline.loader import EvalLoader, binarize
from pipeline.loop import TRAINING_FILE, keep_freed_memory
from pipeline.measure import measure, report
from pipeline.registry import Registry
from pipeline.storage import open_storage

BATCH = 16
"""Images evaluated together; the samples of z multiply it."""

DECODINGS = 3
"""How many times each code is decoded in the picture of reconstructions."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, draw and write everything to ``config.output``; figures of a registered model are kept with its version, too.

    Raises UserError if the model, the data set or the split does not exist, or the images have another shape.
    """
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    threads = (
        1
        if device.type == "cuda"
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    registry = Registry(config.registry) if config.model.startswith("models:/") else None
    version = registry.resolve(config.model) if registry else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if registry and version:
            folder = registry.download(version["name"], version["version"], folder)
        else:
            download_run(config, folder)
        model = vlae.load(folder).to(device)
        training = json.loads((folder / TRAINING_FILE).read_text())
    binarization = Binarization[training["config"]["dataset"]["binarization"]]
    url = config.dataset_url or training["config"]["dataset"]["url"]
    data = open_storage(url, config.storage.endpoint_url)
    contents = manifest.load(data)
    if tuple(contents.image_shape) != tuple(model.image_shape):
        raise UserError(
            f"{config.model} was made for images of shape {model.image_shape}, but those of {url} are {contents.image_shape}"
        )

    def loader(batch_size: int, num_images: int | None) -> EvalLoader:
        return EvalLoader(data, contents, split=config.split, batch_size=batch_size, num_images=num_images)

    images = loader(BATCH, config.bounds.num_images)
    with tqdm(total=images.num_samples, unit=" images", desc=f"IWAE-{config.bounds.samples}", dynamic_ncols=True) as bar:
        moments = measure(
            model,
            images,
            samples=config.bounds.samples,
            binarization=binarization,
            seed=config.bounds.seed,
            device=device,
            threads=threads,
            progress=bar.update,
        )
    measured = report(moments, model, config.bounds.samples)
    if registry and version:
        registry.log_evaluation(version["name"], version["version"], config.split, measured)

    output = open_storage(config.output, config.storage.endpoint_url)
    generator = torch.Generator().manual_seed(config.bounds.seed)
    batch = next(iter(loader(config.bounds.pictures, config.bounds.pictures)))
    x = binarize(batch, binarization, config.bounds.seed).to(device)
    drawn = [vlae.reconstruct(model, x, generator) for _ in range(DECODINGS)]
    output.write("reconstructions.png", pictures.reconstructions(x, drawn))
    output.write("samples.png", pictures.samples(vlae.sample(model, config.bounds.pictures, generator)))
    result = {
        "model": config.model,
        "registry": {"name": version["name"], "version": version["version"]} if version else None,
        "architecture": training["config"]["model"],
        "dataset": {"url": url, "binarization": binarization.value, "manifest": contents.digest},
        config.split: measured,
        "pictures": [f"{output.url}/reconstructions.png", f"{output.url}/samples.png"],
    }
    output.write_json("result.json", result)
    return result


def download_run(config: EvaluateConfig, folder: Path) -> None:
    """Fetch the final model of a training run. Raises UserError if there is none."""
    run = open_storage(config.model, config.storage.endpoint_url)
    keys = run.list("model/")
    if not keys:
        raise UserError(f"{run.url} holds no finished model; give a run's folder, or models:/NAME@ALIAS from the registry")
    for key in keys:
        run.download(key, folder / Path(key).name)


def format_report(result: dict[str, Any], split: str) -> str:
    """The measured figures as text."""
    measured = result[split]
    rows = [
        ("rate", "rate_nats", f"{measured['rate_bits']:.2f} bits per image"),
        ("distortion", "distortion_nats", ""),
        ("code length (-ELBO)", "elbo_nats", f"{measured['elbo_bits_per_dim']:.4f} bits per dim"),
    ]
    if "iwae_nats" in measured:
        rows.append(
            (f"-IWAE, k = {measured['iwae_samples']}", "iwae_nats", f"{measured['iwae_bits_per_dim']:.4f} bits per dim")
        )
    lines = [f"{architecture_line(result)}; {measured['num_images']:,} {split} images, nats per image:"]
    lines += [
        f"  {label:<22}{measured[key]:>9.3f} +- {measured[key + '_se']:.3f}   {extra}".rstrip() for label, key, extra in rows
    ]
    return "\n".join(lines)


def architecture_line(result: dict[str, Any]) -> str:
    """A model's architecture in a few words."""
    model = result["architecture"]
    return f"window {model['window']}, {model['latents']} latents, flow depth {model['flow_depth']}"


if __name__ == "__main__":
    from pipeline.cli import main

    main("evaluate")
