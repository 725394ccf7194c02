"""``vlae evaluate``: a model's bounds on held-out images, what its codes know, and its pictures. It needs no Ray."""

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vlae
from pipeline import manifest, pictures
from pipeline.config import Binarization, EvaluateConfig
from pipeline.errors import UserError
from pipeline.information import Information
from pipeline.loader import Batch, EvalLoader, binarize
from pipeline.loop import TRAINING_FILE, keep_freed_memory
from pipeline.manifest import Manifest
from pipeline.measure import measure, report, with_error
from pipeline.metrics import Moments
from pipeline.probe import Codes, Probes, code_noise, encode
from pipeline.registry import Registry
from pipeline.storage import Storage, open_storage
from vlae.information import ACTIVE_VARIANCE

BATCH = 16
"""Images evaluated together; the samples of z multiply it."""

CODES_BATCH = 64
"""Images encoded together for the probes."""

PROBED = {"train": ", on the images that the probes were fitted on", "valid": ", on the images that chose the probes"}
"""What the report has to say of the probes' accuracy on a split that is not the test's."""

PROBES = {
    "linear": "linear probe",
    "two_layer": "two-layer probe",
    "linear_of_sample": "linear probe of one z",
    "majority": "always one class",
}

SHOWN = 16
"""So many values of a list are in the report."""

DECODINGS = 3
"""How many times each code is decoded in the picture of reconstructions."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, draw and write everything to ``config.output``; figures of a registered model are kept with its version, too.

    Raises UserError if the model, the data set or the split does not exist, or the images have another shape.
    """
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
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

    evaluation = Evaluation(config, model, data, contents, binarization, device)
    measured = evaluation.measure(
        rate_splits=max(model.arguments["flow_depth"], model.arguments["posterior_depth"]) <= 1,
        groups=training["config"]["train"].get("free_groups", 1),
    )
    if registry and version:
        registry.log_evaluation(version["name"], version["version"], config.split, measured)

    output = open_storage(config.output, config.storage.endpoint_url)
    generator = torch.Generator().manual_seed(config.bounds.seed)
    batch = next(iter(evaluation.loader(config.split, config.bounds.pictures, config.bounds.pictures)))
    x = binarize(batch, binarization, config.bounds.seed).to(device)
    drawn = [vlae.reconstruct(model, x, generator) for _ in range(DECODINGS)]
    output.write("reconstructions.png", pictures.reconstructions(x, drawn))
    output.write("samples.png", pictures.samples(vlae.sample(model, config.bounds.pictures, generator)))
    drawn_files = ["reconstructions", "samples"]
    latents = measured["latents"]
    if "capacity_bits" in latents:
        active = [variance > ACTIVE_VARIANCE for variance in latents["code_variance"]]
        output.write("latents.png", pictures.latents(latents["capacity_bits"], latents.get("rate_bits"), active))
        drawn_files.append("latents")
    result = {
        "model": config.model,
        "registry": {"name": version["name"], "version": version["version"]} if version else None,
        "architecture": training["config"]["model"],
        "dataset": {"url": url, "binarization": binarization.value, "manifest": contents.digest},
        config.split: measured,
        "pictures": [f"{output.url}/{name}.png" for name in drawn_files],
    }
    output.write_json("result.json", result)
    return result


@dataclass
class Evaluation:
    """One model on one data set."""

    config: EvaluateConfig
    model: vlae.VLAE
    data: Storage
    contents: Manifest
    binarization: Binarization
    device: torch.device

    def loader(self, split: str, batch_size: int, num_images: int | None) -> EvalLoader:
        return EvalLoader(self.data, self.contents, split=split, batch_size=batch_size, num_images=num_images)

    def measure(self, rate_splits: bool, groups: int) -> dict[str, Any]:
        """The figures of the evaluated images, under ``latents`` those of each latent, and, if there are classes, under ``probe``
        how well they are told from the code.

        ``rate_splits``: whether latents have rates of their own. ``groups``: how many parts of the code had their own free bits.
        """
        bounds = self.config.bounds
        images = self.loader(
            self.config.split, BATCH, bounds.num_images
        )  # first, since it finds out whether there is such a split
        probes = self.probes()
        information, right = Information(groups), Moments()

        @torch.no_grad()
        def account(batch: Batch, x: Tensor, estimate: vlae.Estimate) -> None:
            posterior, noise = self.model.encoder(x), code_noise(self.model, batch, bounds.seed).to(x.device)
            information.add(posterior, noise, estimate)
            codes = Codes.of(posterior, noise, batch.labels)
            if probes and len(codes.labels):
                right.add(probes.correct(codes))
            bar.update(len(x))

        with progress_bar(images, f"IWAE-{bounds.samples}") as bar:
            moments = measure(
                self.model,
                images,
                samples=bounds.samples,
                binarization=self.binarization,
                seed=bounds.seed,
                device=self.device,
                threads=num_threads(self.device),
                visit=account,
            )
        measured = report(moments, self.model, bounds.samples) | information.report(rate_splits)
        if probes and right.sums:
            measured["probe"] = {
                name: {"accuracy": right.mean(name), "accuracy_se": right.standard_error(name), **probes.chosen.get(name, {})}
                for name in right.sums
            }
        return measured

    def probes(self) -> Probes | None:
        """Fitted on ``train`` and chosen on ``valid``, whatever split is evaluated; none where there are no classes to tell apart."""
        contents, num_images = self.contents, self.config.probe_images
        if not num_images or (contents.num_classes or 0) < 2 or not {"train", "valid"} <= contents.splits.keys():
            return None
        return Probes(self.codes("train", num_images), self.codes("valid", num_images))

    def codes(self, split: str, num_images: int) -> Codes:
        """The codes of a split's first images."""
        images = self.loader(split, CODES_BATCH, num_images)
        with progress_bar(images, f"codes of {split}") as bar:
            return encode(
                self.model,
                images,
                binarization=self.binarization,
                seed=self.config.bounds.seed,
                device=self.device,
                threads=num_threads(self.device),
                progress=bar.update,
            )


def num_threads(device: torch.device) -> int:
    """How many batches to work on at once: on a CPU as many as this process may use cores.

    OMP_NUM_THREADS says so where it is set, as Ray does for what it starts.
    """
    if device.type == "cuda":
        return 1
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(images: EvalLoader, name: str) -> "tqdm[Any]":
    return tqdm(total=images.num_samples, unit=" images", desc=name, dynamic_ncols=True)


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
        rows += [
            (f"-IWAE, k = {measured['iwae_samples']}", "iwae_nats", f"{measured['iwae_bits_per_dim']:.4f} bits per dim"),
            ("posterior slack", "slack_nats", "code length less -IWAE"),
        ]
    if "mutual_information_nats" in measured:
        compared = measured["mutual_information_images"]
        told = (
            f"{measured['mutual_information_bits']:.2f} bits, of {math.log2(compared):.2f} that tell {compared:,} images apart"
        )
        rows += [
            ("I(x; z), at least", "mutual_information_nats", told),
            ("KL(q(z) || p(z)), at most", "marginal_kl_nats", "rate less I(x; z)"),
        ]
    lines = [f"{architecture_line(result)}; {measured['num_images']:,} {split} images, nats per image:"]
    lines += [f"  {label:<26}{with_error(measured, key, 3):<20}{extra}".rstrip() for label, key, extra in rows]
    latents = measured["latents"]
    lines.append(f"{measured['active_units']} of {len(latents['code_variance'])} latents are active")
    if "capacity_bits" in latents:
        lines[-1] += f"; the most that each can tell, in bits, together {measured['capacity_bits']:.2f}:"
        lines.append(_first(sorted(latents["capacity_bits"], reverse=True)))
    if "group_rate_bits" in latents:
        lines += ["rate of each group of latents, in bits:", _first(latents["group_rate_bits"])]
    if "probe" in measured:
        lines.append(f"class told from the code, accuracy in %{PROBED.get(split, '')}:")
        for name, label in PROBES.items():
            probe = measured["probe"][name]
            extra = (
                f"{100 * probe['valid_accuracy']:.2f} on valid" if "valid_accuracy" in probe else "most frequent in training"
            )
            lines.append(f"  {label:<26}{with_error(probe, 'accuracy', factor=100):<20}{extra}")
    return "\n".join(lines)


def _first(values: list[float]) -> str:
    """The first of many values."""
    return "  " + " ".join(f"{value:.2f}" for value in values[:SHOWN]) + (" ..." if len(values) > SHOWN else "")


def architecture_line(result: dict[str, Any]) -> str:
    """A model's architecture in a few words."""
    model = result["architecture"]
    return f"window {model['window']}, {model['latents']} latents, flow depth {model['flow_depth']}"


if __name__ == "__main__":
    from pipeline.cli import main

    main("evaluate")
