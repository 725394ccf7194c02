"""Evaluating a model: its bounds on held-out images, what its codes know, and its pictures."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vlae
from pipeline.config.evaluation import BoundOptions, EvaluateConfig
from pipeline.config.options import to_dict
from pipeline.config.sections import StorageOptions
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation import pictures
from pipeline.evaluation.information import Information
from pipeline.evaluation.measure import measure, report
from pipeline.evaluation.moments import Moments
from pipeline.evaluation.probe import Codes, Probes, code_noise, encode
from pipeline.machine import device, keep_freed_memory, num_threads
from pipeline.runs import EVALUATION, RESULT, OpenedModel, find_evaluation, open_data, open_run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.values import JsonObject
from vlae.information import ACTIVE_VARIANCE

BATCH = 16
"""Images evaluated together; the samples of z multiply it."""

CODES_BATCH = 64
"""Images encoded together for the probes."""


def evaluate(config: EvaluateConfig, model: OpenedModel) -> JsonObject:
    """Measure ``model``, draw its pictures and write all of it to ``config.output``; returns the
    record.

    Raises UserError if the data set or the split does not exist, or the images have another shape.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    evaluation = Evaluation(config, model)
    measured = evaluation.measure()
    output = open_storage(config.output, config.storage.endpoint_url)
    result: JsonObject = {
        "model": config.model,
        "weights": model.weights,
        "registry": {key: model.version[key] for key in ("name", "version")}
        if model.version
        else None,
        "architecture": model.training["config"]["model"],
        "image_shape": list(evaluation.data.manifest.image_shape),
        "dataset": {
            "url": evaluation.data.storage.url,
            "binarization": model.binarization.value,
            "manifest": evaluation.data.manifest.digest,
        },
        "bounds": to_dict(config.bounds),
        "split": config.split,
        config.split: measured,
        "pictures": [],
    }
    output.write_json(RESULT, result)  # the figures took long: they are safe if a picture fails
    for name, picture in evaluation.pictures(measured["latents"]):
        output.write(f"{name}.png", picture)
        result["pictures"].append(f"{output.url}/{name}.png")
    output.write_json(RESULT, result)
    return result


def of_run(
    folder: Storage,
    bounds: BoundOptions,
    storage: StorageOptions,
    probe_images: int = 10_000,
) -> JsonObject:
    """Evaluate the model of a finished run on validation images, as registering it requires.

    Returns the evaluation's record, that of an earlier evaluation if there is one. Raises UserError
    if there is no model.
    """
    model = open_run(folder)
    found = find_evaluation(folder, model.weights)
    config = EvaluateConfig(
        folder.url,
        "valid",
        output=f"{folder.url}/{EVALUATION}",
        probe_images=probe_images,
        bounds=bounds,
        storage=storage,
    )
    return found or evaluate(config, model)


class Evaluation:
    """One model on one data set. Raises UserError if that does not exist, or its images have
    another shape.
    """

    def __init__(self, config: EvaluateConfig, model: OpenedModel) -> None:
        self.config, self.training, self.binarization = config, model.training, model.binarization
        self.device = device()
        self.model = model.network.to(self.device)
        self.data = open_data(model, config.dataset_url, config.storage)

    def loader(self, split: str, batch_size: int, num_images: int | None) -> EvalLoader:
        return EvalLoader(self.data, split=split, batch_size=batch_size, num_images=num_images)

    def measure(self) -> dict[str, Any]:
        """The figures of the evaluated images, under ``latents`` those of each latent, and, if
        there are classes, under ``probe`` how well they are told from the code.
        """
        bounds = self.config.bounds
        groups = self.training["config"]["train"].get(
            "free_groups", 1
        )  # parts of the code that had their own free bits
        images = self.loader(
            self.config.split, BATCH, bounds.num_images
        )  # first, since it finds out whether there is such a split
        probes = self.probes()
        information, right = Information(groups), Moments()

        @torch.no_grad()
        def account(batch: Batch, x: Tensor, estimate: vlae.Estimate) -> None:
            posterior, noise = (
                self.model.encoder(x),
                code_noise(self.model, batch, bounds.seed).to(x.device),
            )
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
        measured = report(moments, self.model, bounds.samples) | information.report(
            self.model.rate_splits
        )
        if probes and right.sums:
            measured["probe"] = {
                name: {
                    "accuracy": right.mean(name),
                    "accuracy_se": right.standard_error(name),
                    **probes.chosen.get(name, {}),
                }
                for name in right.sums
            }
        return measured

    def pictures(self, latents: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name and PNG of each picture; ``latents`` are the figures of each."""
        bounds = self.config.bounds
        generator = torch.Generator().manual_seed(bounds.seed)
        batch = next(iter(self.loader(self.config.split, bounds.pictures, bounds.pictures)))
        x = binarize(batch, self.binarization, bounds.seed).to(self.device)
        yield "reconstructions", pictures.draw_reconstructions(self.model, x, generator)
        yield "samples", pictures.draw_samples(self.model, bounds.pictures, generator)
        if "capacity_bits" in latents:
            active = [variance > ACTIVE_VARIANCE for variance in latents["code_variance"]]
            yield (
                "latents",
                pictures.latents(latents["capacity_bits"], latents.get("rate_bits"), active),
            )

    def probes(self) -> Probes | None:
        """Fitted on ``train`` and chosen on ``valid``, whatever split is evaluated; none where
        there are no classes to tell apart.
        """
        contents, num_images = self.data.manifest, self.config.probe_images
        if (
            not num_images
            or (contents.num_classes or 0) < 2
            or not {"train", "valid"} <= contents.splits.keys()
        ):
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


def progress_bar(images: EvalLoader, name: str) -> "tqdm[Any]":
    return tqdm(total=images.num_samples, unit=" images", desc=name, dynamic_ncols=True)
