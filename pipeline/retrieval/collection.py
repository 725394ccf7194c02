"""Splits as far as their images are compared: codes under each model, thumbnails, names, hashes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from pipeline.data import DataSet
from pipeline.data.batch import Batch, binarize, pick
from pipeline.data.loader import EvalLoader
from pipeline.data.reader import STRICT, Reader
from pipeline.errors import UserError
from pipeline.evaluation import encoding
from pipeline.evaluation.measure import map_batches
from pipeline.machine import device, num_threads
from pipeline.progress import progress_bar
from pipeline.runs import OpenedModel
from pipeline.storage.base import Storage

BATCH = 64
"""Images encoded at once."""
THUMBNAIL = 32
"""Pixels are compared at no more than this height and width, averaged down to it."""


@dataclass(frozen=True)
class Collection:
    """The images of a split, as far as they are compared."""

    split: str
    codes: dict[str, Tensor]
    """The codes under each model, by its address: (num_images, latents)."""
    pixels: Tensor
    """Thumbnails as uint8: (num_images, channels * height * width)."""
    labels: Tensor
    """(num_images,); -1 where there is none."""
    keys: list[str] | None
    """The images' names at their source, if they have any."""
    hashes: list[bytes]
    """Equal for equal images."""

    def name(self, number: int) -> str:
        """What an image is called: its key, or its number in the split."""
        return self.keys[number] if self.keys is not None else str(number)


def collect(
    data: DataSet,
    models: Sequence[OpenedModel],
    split: str,
    seed: int,
    stored: Mapping[str, Tensor],
) -> Collection:
    """Read a split once: encode, shrink and hash its images.

    ``stored``: codes that need not be computed, by the address of their model. The others are those
    that ``vlae encode`` writes with this seed.
    """
    loader = EvalLoader(data, split=split, batch_size=BATCH)
    for model in models:
        model.network.to(device())
    wanted = [model for model in models if model.reference not in stored]

    def see(
        batch: Batch,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, list[str] | None, list[bytes]]:
        with torch.no_grad():  # here, since the setting is per thread
            codes = {
                model.reference: model.network.encoder(
                    binarize(batch, model.binarization, seed).to(device())
                )
                .code.float()
                .cpu()
                for model in wanted
            }
        hashes = [xxhash.xxh3_128_digest(image.numpy()) for image in batch.images.contiguous()]
        return codes, thumbnails(batch.images), batch.labels, loader.keys(batch), hashes

    seen = []
    with progress_bar(loader.num_samples, f"codes of {split}") as bar:
        for each in map_batches(see, loader, num_threads(device())):
            seen.append(each)
            bar.update(len(each[2]))
    codes, pixels, labels, keys, hashes = zip(*seen, strict=True)
    computed = {
        model.reference: torch.cat([part[model.reference] for part in codes]) for model in wanted
    }
    return Collection(
        split,
        {**stored, **computed},
        torch.cat(pixels),
        torch.cat(labels),
        None if keys[0] is None else [key for part in keys for key in part or ()],
        [each for part in hashes for each in part],
    )


def thumbnails(images: Tensor) -> Tensor:
    """Images of at most ``THUMBNAIL`` pixels in height and width: uint8, flat.

    images: uint8, (batch, channels, height, width).
    """
    height, width = images.shape[-2:]
    size = min(height, THUMBNAIL), min(width, THUMBNAIL)
    if (height, width) != size:
        images = F.adaptive_avg_pool2d(images.float(), size).round().to(torch.uint8)
    return images.flatten(1).clone()


def stored_codes(
    folders: Sequence[Storage], model: OpenedModel, data: DataSet, split: str
) -> dict[str, Tensor]:
    """The codes of a split that ``vlae encode`` has written to one of ``folders``, if any.

    They stand under the model's address. Raises UserError if a folder's codes are not complete, or
    of another model or data set.
    """
    found = {}
    for storage in folders:
        if not storage.exists(encoding.RESULT):
            raise UserError(
                f"codes: {storage.url} holds no complete codes; run vlae encode with this output="
                " again, or leave it out"
            )
        record = storage.read_json(encoding.RESULT)
        for name, value, what in (
            ("weights", model.weights, f"another model than {model.reference}"),
            ("manifest", data.manifest.digest, f"another data set than {data.storage.url}"),
        ):
            if record.get(name) != value:
                raise UserError(f"codes: {storage.url} holds codes of {what}; leave it out")
        if record["split"] != split:
            continue
        parts = [
            pq.read_table(io.BytesIO(storage.read(key)), columns=["code"])["code"].combine_chunks()
            for key in sorted(storage.list("codes"))
        ]
        codes = np.concatenate([part.flatten().to_numpy() for part in parts])
        codes = codes.reshape(-1, model.network.latents)
        if len(codes) != data.manifest.num_samples(split):
            raise UserError(f"codes: {storage.url} lacks some of its codes; encode them anew")
        found[model.reference] = torch.from_numpy(codes.copy())
    return found


def images_at(data: DataSet, split: str, numbers: Sequence[int]) -> Tensor:
    """The images of a split with these numbers: float32 in [0, 1], (n, channels, height, width)."""
    return pick(Reader(data, split, STRICT), numbers).images.float() / 255
