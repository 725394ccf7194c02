"""One rank's part of a global batch, and its binarization."""

from dataclasses import dataclass

import torch

from pipeline import noise
from pipeline.config.sections import Binarization
from pipeline.data.manifest import Integers
from pipeline.noise import Purpose


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int  # since the start of training; for an evaluation, the number of this rank's batch
    images: torch.Tensor  # uint8 (local_batch, channels, height, width)
    labels: torch.Tensor  # int64 (local_batch,); -1 where there is none
    samples: Integers  # (local_batch,): each one's number in its split
    positions: Integers
    """(local_batch,): what noise is drawn by; in training step * global_batch + place, else
    samples.
    """


def binarize(batch: Batch, mode: Binarization, seed: int) -> torch.Tensor:
    """Images as models see them, float32 in [0, 1] of the shape of ``batch.images``: black and
    white, each pixel white with the probability of its grey value; or, with ``none``, as they are.

    ``dynamic`` draws anew for every position: in training each time an image is seen (``seed`` is
    the run's), in an evaluation once for each image (``seed`` is the evaluation's). ``static``
    draws once for each sample of a split, whatever the seed.
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
