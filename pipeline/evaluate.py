"""``vlae evaluate``: a model's bounds on held-out images, what its codes know, and its pictures. It needs no Ray."""

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vlae
from pipeline import config as options
from pipeline import pictures, reconstruct, sample
from pipeline.config import BoundOptions, EvaluateConfig, to_dict
from pipeline.information import Information
from pipeline.loader import Batch, EvalLoader, binarize
from pipeline.loop import keep_freed_memory
from pipeline.measure import measure, report, with_error
from pipeline.metrics import Moments
from pipeline.probe import Codes, Probes, code_noise, encode
from pipeline.storage import Storage, open_storage
from pipeline.versions import EVALUATION, OpenedModel, Registry, device, find_evaluation, open_data, open_model
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


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, draw and write everything to ``config.output``; figures of a registered model are kept with its version, too.

    Raises UserError if the model, the data set or the split does not exist, or the images have another shape.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    model = open_model(config.model, config.registry, config.storage)
    evaluation = Evaluation(config, model)
    measured = evaluation.measure()
    output = open_storage(config.output, config.storage.endpoint_url)
    result = {
        "model": config.model,
        "weights": model.weights,
        "registry": {key: model.version[key] for key in ("name", "version")} if model.version else None,
        "architecture": model.training["config"]["model"],
        "image_shape": list(evaluation.contents.image_shape),
        "dataset": {
            "url": evaluation.data.url,
            "binarization": model.binarization.value,
            "manifest": evaluation.contents.digest,
        },
        "bounds": to_dict(config.bounds),
        "split": config.split,
        config.split: measured,
        "pictures": [],
    }
    output.write_json("result.json", result)  # what took long is safe, whatever becomes of the rest
    if model.version:
        Registry(config.registry).log_evaluation(model.version["name"], model.version["version"], config.split, measured)
    for name, picture in evaluation.pictures(measured["latents"]):
        output.write(f"{name}.png", picture)
        result["pictures"].append(f"{output.url}/{name}.png")
    output.write_json("result.json", result)
    return result


def of_run(
    folder: Storage, bounds: BoundOptions, storage: options.StorageOptions, registry: options.RegistryOptions, probe_images: int = 10_000
) -> dict[str, Any]:
    """Evaluate the model of a finished run on validation images, as what is registered has to be; not again if that was done.

    Returns the evaluation's record. Raises UserError if there is no model.
    """
    model = open_model(folder.url, registry, storage)
    found = find_evaluation(folder, model.weights)
    return found or run(
        EvaluateConfig(
            folder.url,
            "valid",
            output=f"{folder.url}/{EVALUATION}",
            probe_images=probe_images,
            bounds=bounds,
            storage=storage,
            registry=registry,
        )
    )


class Evaluation:
    """One model on one data set. Raises UserError if that does not exist, or its images have another shape."""

    def __init__(self, config: EvaluateConfig, model: OpenedModel) -> None:
        self.config, self.training, self.binarization = config, model.training, model.binarization
        self.device = device()
        self.model = model.network.to(self.device)
        self.data, self.contents = open_data(model, config.dataset_url, config.storage)

    def loader(self, split: str, batch_size: int, num_images: int | None) -> EvalLoader:
        return EvalLoader(self.data, self.contents, split=split, batch_size=batch_size, num_images=num_images)

    def measure(self) -> dict[str, Any]:
        """The figures of the evaluated images, under ``latents`` those of each latent, and, if there are classes, under ``probe``
        how well they are told from the code.
        """
        bounds = self.config.bounds
        groups = self.training["config"]["train"].get("free_groups", 1)  # parts of the code that had their own free bits
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
        measured = report(moments, self.model, bounds.samples) | information.report(self.model.rate_splits)
        if probes and right.sums:
            measured["probe"] = {
                name: {"accuracy": right.mean(name), "accuracy_se": right.standard_error(name), **probes.chosen.get(name, {})}
                for name in right.sums
            }
        return measured

    def pictures(self, latents: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name and PNG of each picture; ``latents`` are the figures of each."""
        bounds = self.config.bounds
        generator = torch.Generator().manual_seed(bounds.seed)
        batch = next(iter(self.loader(self.config.split, bounds.pictures, bounds.pictures)))
        x = binarize(batch, self.binarization, bounds.seed).to(self.device)
        yield "reconstructions", reconstruct.draw(self.model, x, generator)
        yield "samples", sample.draw(self.model, bounds.pictures, generator)
        if "capacity_bits" in latents:
            active = [variance > ACTIVE_VARIANCE for variance in latents["code_variance"]]
            yield "latents", pictures.latents(latents["capacity_bits"], latents.get("rate_bits"), active)

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
