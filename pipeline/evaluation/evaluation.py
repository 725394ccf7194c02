"""Evaluating a model: its bounds on held-out images, the information in its codes, its pictures."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config.evaluation import BoundOptions, EvaluateConfig
from pipeline.config.options import to_dict
from pipeline.config.sections import StorageOptions
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation import nested, pictures, sheets
from pipeline.evaluation.estimates import estimate_split, in_batches
from pipeline.evaluation.information import Information
from pipeline.evaluation.measure import map_batches, quantities, report
from pipeline.evaluation.moments import Moments
from pipeline.evaluation.probe import Codes, Probes, TooFewLabels, code_noise, encode
from pipeline.evaluation.resolution import resolution
from pipeline.machine import device, keep_freed_memory, num_threads
from pipeline.progress import progress_bar
from pipeline.runs import EVALUATION, RESULT, OpenedModel, Run, open_data
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.values import JsonObject
from vlae.information import ACTIVE_VARIANCE
from vlae.posterior import Posterior

CODES_BATCH = 64
"""Images in a batch that is only encoded or redrawn. Sums over images are added in such batches."""


def evaluate(
    config: EvaluateConfig, model: OpenedModel, connect: Callable[[], None] | None
) -> JsonObject:
    """Measure ``model``, draw its pictures, and write both to ``config.output``.

    ``connect`` connects to Ray, and is called if there is much to measure; if it is None, this
    process does it all. Returns the record. Raises UserError if the data set or the split does not
    exist, or the images have another shape.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    output = open_storage(config.output, config.storage.endpoint_url)
    evaluation = Evaluation(config, model)
    measured = evaluation.measure(output, connect)
    if model.is_nested:
        measured["nested"] = evaluation.measure_nested("probe" in measured)
    result: JsonObject = {
        "model": config.model,
        "weights": model.weights,
        "registry": dict(zip(("name", "version"), model.version, strict=True))
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
        "held_out": evaluation.is_held_out,
        config.split: measured,
        "pictures": [],
    }
    output.write_json(RESULT, result)  # before the pictures: the figures took long
    for name, picture in evaluation.pictures(measured):
        output.write(f"{name}.png", picture)
        result["pictures"].append(f"{output.url}/{name}.png")
    output.write_json(RESULT, result)
    return result


def evaluate_run(
    run: Run,
    bounds: BoundOptions,
    storage: StorageOptions,
    probe_images: int = 10_000,
) -> JsonObject:
    """Evaluate the model of a finished run on validation images, as its registration requires.

    It does so in this process, which may itself be a task that holds a core. Returns the record;
    that of an earlier evaluation if there is one. Raises UserError if there is no model.
    """
    model = run.open()
    found = run.evaluation(model.weights)
    config = EvaluateConfig(
        run.url,
        "valid",
        output=f"{run.url}/{EVALUATION}",
        probe_images=probe_images,
        bounds=bounds,
        storage=storage,
    )
    return found or evaluate(config, model, None)


class Evaluation:
    """The evaluation of one model on one data set.

    Raises UserError if the data set does not exist, or its images have another shape.
    """

    def __init__(self, config: EvaluateConfig, model: OpenedModel) -> None:
        self.config, self.opened, self.binarization = config, model, model.binarization
        self.device, self.model = device(), model.network
        self.data = open_data(model, config.dataset_url, config.storage)

    @property
    def is_held_out(self) -> bool:
        """Whether the model was not trained on the evaluated images."""
        training = self.opened.training
        seen = ("train", "valid") if training["config"]["train"].get("with_valid") else ("train",)
        same = training["manifest"] == self.data.manifest.digest
        return not (same and self.config.split in seen)

    def loader(self, split: str, batch_size: int, num_images: int | None) -> EvalLoader:
        return EvalLoader(self.data, split=split, batch_size=batch_size, num_images=num_images)

    def measure(self, output: Storage, connect: Callable[[], None] | None) -> JsonObject:
        """Measure the images of the evaluated split; bounds are kept in ``output``.

        ``latents`` holds the figures of each latent, and ``probe``, if there are classes, the
        accuracy with which classifiers predict them from the code, on ``probe_labelled`` images
        that have a label; ``probe_skipped`` says why labelled images could not be probed.
        """
        config, bounds = self.config, self.config.bounds
        # First, since it raises if there is no such split.
        blocks = estimate_split(
            self.opened,
            self.data,
            output,
            config.split,
            bounds,
            connect,
            config.cluster.use_gpu,
        )
        self.model.to(self.device)
        images = self.loader(config.split, CODES_BATCH, bounds.num_images)
        probes, skipped = None, None
        try:
            probes = self.probes()
        except TooFewLabels as error:
            skipped = str(error)
        # The groups of latents that had free bits of their own.
        groups = self.opened.training["config"]["train"].get("free_groups", 1)
        information, right, moments = Information(groups), Moments(), Moments()

        @torch.no_grad()
        def encode(batch: Batch) -> tuple[Posterior, Tensor, Codes]:
            x = binarize(batch, self.binarization, bounds.seed).to(self.device)
            posterior = self.model.encoder(x)
            noise = code_noise(self.model, batch, bounds.seed).to(self.device)
            return posterior, noise, Codes.of(posterior, noise, batch.labels)

        with progress_bar(images.num_samples, f"codes of {config.split}") as bar:
            encoded = map_batches(encode, images, num_threads(self.device))
            for (posterior, noise, codes), estimate in zip(
                encoded, in_batches(blocks, CODES_BATCH), strict=True
            ):
                moments.add(quantities(estimate))
                information.add(posterior, noise, estimate)
                if probes and len(codes.labels):
                    right.add(probes.correct(codes))
                bar.update(len(estimate.iwae))
        measured: JsonObject = dict(report(moments, self.model, bounds.samples))
        measured |= information.report(self.model.rate_splits)
        measured |= self.resolution()
        if probes and not right.sums:
            skipped = f"none of the measured {self.config.split} images has a label"
        if skipped:
            measured["probe_skipped"] = skipped
        if probes and right.sums:
            measured["probe_labelled"] = right.count("linear")
            measured["probe"] = {
                name: {
                    **right.measured(name).to_json("accuracy"),
                    **probes.chosen.get(name, {}),
                }
                for name in right.sums
            }
        return measured

    def measure_nested(self, with_probe: bool) -> list[JsonObject]:
        """Measure codes cut to each length, their resolution and what a linear probe knows."""
        config = self.config
        images = self.loader(config.split, nested.BATCH, config.bounds.num_images)
        with progress_bar(images.num_samples, "codes of each length") as bar:
            rows = nested.measure_curve(
                self.model,
                nested.lengths(self.model.latents),
                images,
                binarization=self.binarization,
                seed=config.bounds.seed,
                device=self.device,
                threads=num_threads(self.device),
                progress=bar.update,
            )
        if with_probe:
            train, valid = (self.codes(split, config.probe_images) for split in ("train", "valid"))
            measured = self.codes(config.split, config.bounds.num_images)
            nested.add_probes(rows, train, valid, measured)
        for row in rows:
            found = self.resolution(row["latents"])
            row |= {key: found[key] for key in ("resolution_px", "resolution_px_se") if found}
        return rows

    def resolution(self, sent: int | None = None) -> JsonObject:
        """The resolution of the codes of the split's first images; nothing if none is wanted.

        ``sent`` is the number of latents that codes are cut to; by default they are whole.
        """
        bounds = self.config.bounds
        num_images = min(bounds.resolution_images, bounds.num_images or bounds.resolution_images)
        if not num_images:
            return {}
        images = self.loader(self.config.split, CODES_BATCH, num_images)
        name = "resolution" if sent is None else f"resolution, {sent} latents"
        with progress_bar(images.num_samples, name) as bar:
            return resolution(
                self.model,
                images,
                binarization=self.binarization,
                seed=bounds.seed,
                device=self.device,
                threads=num_threads(self.device),
                progress=bar.update,
                sent=sent,
            ).to_json()

    def pictures(self, measured: JsonObject) -> Iterator[tuple[str, bytes]]:
        """Name and PNG of each picture; ``measured`` is what ``measure`` returned."""
        bounds, latents = self.config.bounds, measured["latents"]
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
        if "nested" in measured:
            rows = measured["nested"]
            yield "nested", nested.draw_curve(rows)
            yield "decodings", nested.draw_decodings(self.model, x, rows, generator)
        if "resolution" in measured:
            yield "resolution", sheets.resolutions({"": measured})

    def probes(self) -> Probes | None:
        """Probes fitted on ``train`` and chosen on ``valid``, whichever split is evaluated.

        None if no probe is wanted, there are fewer than two classes, or one of these splits is
        missing. Raises TooFewLabels.
        """
        contents, num_images = self.data.manifest, self.config.probe_images
        if (
            not num_images
            or (contents.num_classes or 0) < 2
            or not {"train", "valid"} <= contents.splits.keys()
        ):
            return None
        return Probes(self.codes("train", num_images), self.codes("valid", num_images))

    def codes(self, split: str, num_images: int | None) -> Codes:
        """The codes of a split's first images; None is all."""
        images = self.loader(split, CODES_BATCH, num_images)
        with progress_bar(images.num_samples, f"codes of {split}") as bar:
            return encode(
                self.model,
                images,
                binarization=self.binarization,
                seed=self.config.bounds.seed,
                device=self.device,
                threads=num_threads(self.device),
                progress=bar.update,
            )
