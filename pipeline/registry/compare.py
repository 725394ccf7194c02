"""Comparing two model versions on the same images, with the same noise."""

import torch
from torch import Tensor

import vlae
from pipeline.config.evaluation import BoundOptions
from pipeline.config.options import to_dict
from pipeline.config.sections import Binarization, StorageOptions
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.measure import concatenate, estimates, images_in_pass, pairs_in_pass
from pipeline.evaluation.moments import Moments
from pipeline.machine import device, keep_freed_memory, num_threads
from pipeline.progress import progress_bar
from pipeline.registry.summaries import COMPARED, PARTS
from pipeline.runs import OpenedModel, open_data
from pipeline.values import JsonObject, Measured

CERTAIN = 2.0
"""A model is better if its lead exceeds this many standard errors of the difference."""


def compare(
    version: OpenedModel,
    other: OpenedModel,
    *,
    split: str,
    dataset_url: str | None,
    bounds: BoundOptions,
    storage: StorageOptions,
) -> JsonObject:
    """Measure two versions of a model on the same images, with the same binarization, k and noise.

    Each quantity is given for both, and as the difference ``version`` less ``other``; its standard
    error is that of the differences image by image. The images are those of ``dataset_url``, by
    default of the first version's training. Raises UserError if one version models images of 256
    values and the other binary ones.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    models = (version, other)
    numbers = [model.version[1] if model.version else None for model in models]
    kinds = [model.binarization for model in models]
    if Binarization.none in kinds and kinds[0] != kinds[1]:
        raise UserError(
            f"{version.reference} and {other.reference} cannot be compared: one models images of"
            " 256 values, the other black and white ones"
        )
    url = dataset_url or version.training["config"]["dataset"]["url"]
    measured = [_per_image(model, url, kinds[0], split, bounds, storage) for model in models]
    values: dict[str, JsonObject] = {}
    for name in COMPARED:
        moments, (new, old) = Moments(), (each[name] for each in measured)
        moments.add({"version": new, "other": old, "difference": new - old})
        values[name] = {}
        for part in PARTS:
            values[name] |= moments.measured(part, "nats").to_json(part)
    difference = Measured.from_json(values["nll"], "difference")
    return {
        "version": numbers[0],
        "other": numbers[1],
        "dataset": {"url": url, "split": split, "binarization": kinds[0].value},
        "num_images": len(measured[0]["nll"]),
        "bounds": to_dict(bounds),
        "nats": values,
        "better": difference.value + CERTAIN * (difference.error or 0.0) < 0,
    }


def _per_image(
    model: OpenedModel,
    url: str,
    binarization: Binarization,
    split: str,
    bounds: BoundOptions,
    storage: StorageOptions,
) -> dict[str, Tensor]:
    """What ``COMPARED`` names, of each image: (num_images,), in float64."""
    data, place = open_data(model, url, storage), device()
    loader = EvalLoader(
        data,
        split=split,
        batch_size=images_in_pass(bounds.samples, pairs_in_pass(model.network, place)),
        num_images=bounds.num_images,
    )
    found = estimates(
        model.network.to(place),
        loader,
        samples=bounds.samples,
        binarization=binarization,
        seed=bounds.seed,
        device=place,
        threads=num_threads(place),
    )
    parts = list[vlae.Estimate]()
    with progress_bar(loader.num_samples, model.reference.removeprefix("models:/")) as bar:
        for part in found:
            parts.append(part)
            bar.update(len(part.iwae))
    estimate = concatenate(parts)
    return {"nll": -estimate.iwae, "code_length": -estimate.elbo, "rate": estimate.rate}
