"""The code of every image of a split as Parquet, by as many Ray tasks as there are cores.

The split into parts depends only on the number of images, each part is one file, and all noise is
drawn by an image's number: any number of tasks writes the same files. Files are written
atomically, so that a command that was killed continues with the missing ones. ``result.json``,
written last, marks the codes as complete.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import vlae
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.order import even_part
from pipeline.errors import UserError
from pipeline.evaluation.probe import code_noise
from pipeline.machine import device, keep_freed_memory
from pipeline.progress import progress_bar
from pipeline.runs import OpenedModel
from pipeline.storage.base import Storage
from pipeline.storage.recipe import begin
from pipeline.tasks import here_or_in_tasks
from pipeline.values import JsonObject
from vlae.distributions import DiagonalGaussian

RESULT, RECIPE = "result.json", "recipe.json"
BATCH = 64
"""Images in a batch. The number is fixed, since another one may round differently."""


def encode_split(
    model: OpenedModel,
    data: DataSet,
    output: Storage,
    split: str,
    seed: int,
    images_per_part: int,
    use_gpu: bool,
    connect: Callable[[], None],
) -> JsonObject:
    """Encode a split in Ray tasks. Returns what was written; complete codes are reused.

    ``connect`` connects to Ray, and is called only if there is something to encode. Raises
    UserError if there is no such split, or ``output`` holds other codes.
    """
    total = data.manifest.num_samples(split)
    recipe = {
        "weights": model.weights,
        "manifest": data.manifest.digest,
        "split": split,
        "binarization": model.binarization.value,
        "seed": seed,
        "images_per_part": images_per_part,
    }
    if begin(output, RECIPE, recipe):
        raise UserError(
            f"{output.url} holds the codes of another model, data set or setting; give another "
            "output=, or delete that folder"
        )
    if output.exists(RESULT):
        return {**output.read_json(RESULT), "reused": True}
    num_parts = math.ceil(total / images_per_part)
    done = set(output.list("codes"))
    missing = [part for part in range(num_parts) if _key(part) not in done]
    if missing:
        shared = (model.network, data, output)
        settings = (split, model.binarization, seed)
        ends = [even_part(total, part, num_parts) for part in missing]
        left = sum(stop - start for start, stop in ends)
        with progress_bar(total, f"codes of {split}", initial=total - left) as bar:
            calls = ((*settings, part, num_parts) for part in missing)
            for count in here_or_in_tasks(encode_part, shared, calls, connect, use_gpu):
                bar.update(count)
    result = {
        "model": model.reference,
        **recipe,
        "url": output.url,
        "images": total,
        "latents": model.network.latents,
        "parts": [f"{output.url}/{_key(part)}" for part in range(num_parts)],
    }
    output.write_json(RESULT, result)
    return {**result, "reused": False}


def encode_part(
    model: vlae.VLAE,
    data: DataSet,
    output: Storage,
    split: str,
    binarization: Binarization,
    seed: int,
    part: int,
    num_parts: int,
) -> int:
    """Write the codes of one part's images in the order of the manifest; returns their number."""
    keep_freed_memory()
    torch.set_num_threads(1)  # several threads sum in another order
    model = model.to(device())
    loader = EvalLoader(data, split=split, batch_size=BATCH, rank=part, world_size=num_parts)
    table = pa.concat_tables(
        [codes(model, batch, loader.keys(batch), binarization, seed) for batch in loader]
    )
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    output.write(_key(part), file.getvalue())
    return len(table)


@torch.no_grad()
def codes(
    model: vlae.VLAE, batch: Batch, keys: list[str] | None, binarization: Binarization, seed: int
) -> pa.Table:
    """The codes of a batch, one row per image.

    ``sample``: its number in the split. ``key``: its name at the source; omitted if images have no
    names. ``label``: null if it has none. ``code``: the posterior's mean. ``scale``: the
    posterior's standard deviations; omitted if an IAF makes the posterior non-Gaussian.
    ``rate_bits``: log2 q(z|x) - log2 p(z) of a z drawn from the posterior.
    """
    posterior = model.encoder(binarize(batch, binarization, seed).to(device()))
    z, log_posterior = posterior.sample_with_log_prob(code_noise(model, batch, seed).to(device()))
    rate = (log_posterior - model.prior.log_prob(z)).double().sum(-1) / math.log(2)
    labels = batch.labels.numpy()
    vectors = pa.list_(pa.float32(), model.latents)

    def column(values: torch.Tensor) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(values.float().cpu().numpy().ravel()), type=vectors
        )

    named = {"key": pa.array(map(as_text, keys), pa.string())} if keys is not None else {}
    scale = (
        {"scale": column(posterior.log_scale.exp())}
        if isinstance(posterior, DiagonalGaussian)
        else {}
    )
    return pa.table(
        {
            "sample": pa.array(batch.samples, pa.int64()),
            **named,
            "label": pa.array(labels, pa.int64(), mask=np.asarray(labels < 0)),
            "code": column(posterior.code),
            **scale,
            "rate_bits": pa.array(rate.cpu().numpy(), pa.float64()),
        }
    )


def as_text(key: str) -> str:
    """An image's name as Parquet accepts it: file names may hold bytes that are not valid text."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _key(part: int) -> str:
    return f"codes/part-{part:05d}.parquet"
