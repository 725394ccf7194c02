"""Batches of images, and their binarization."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import noise
from pipeline.config.sections import Binarization
from pipeline.data.order import in_manifest_order
from pipeline.data.reader import Reader, Rows
from pipeline.data.records import Integers
from pipeline.noise import Purpose


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int  # since the start of training; for an evaluation, the number of this rank's batch
    images: torch.Tensor  # uint8 (local_batch, channels, height, width)
    labels: torch.Tensor  # int64 (local_batch,); -1 where there is none
    samples: Integers  # (local_batch,): the number of each in its split
    positions: Integers
    """(local_batch,): keys of the noise: step * global_batch + place in training, else samples."""


def pick(reader: Reader, samples: Sequence[int]) -> Batch:
    """The samples with these numbers in the reader's split, in this order; they must exist.

    Raises UserError if one is missing or damaged.
    """
    rows, circle = Rows.empty(len(samples), reader.image_shape), in_manifest_order(reader.sizes)
    if samples:
        segments = [circle.segments(sample, sample + 1) for sample in samples]
        reader.read_into(rows, np.concatenate(segments))
    numbers = np.array(samples, dtype=np.int64)
    images, labels = torch.from_numpy(rows.images), torch.from_numpy(rows.labels)
    return Batch(0, images, labels, numbers, numbers)


def binarize(batch: Batch, mode: Binarization, seed: int) -> torch.Tensor:
    """Images as models see them, float32 in [0, 1] of the shape of ``batch.images``.

    Each pixel becomes white with the probability of its grey value, else black; ``none`` keeps the
    grey values. ``dynamic`` draws again for every position: in training each time an image is seen
    (with the run's ``seed``), in an evaluation once for each image (with the evaluation's).
    ``static`` draws once for each sample of a split, whatever the seed.
    """
    grey = batch.images.float() / 255
    if mode is Binarization.none:
        return grey
    size = batch.images[0].numel()
    if mode is Binarization.dynamic:
        uniform = noise.uniform((seed, Purpose.BINARIZATION), batch.positions, size)
    else:
        uniform = noise.uniform((0, Purpose.STATIC_BINARIZATION), batch.samples, size)
    thresholds = torch.from_numpy(uniform)
    return (thresholds.view(grey.shape) < grey).float()  # < : 0 is always black, 255 always white
