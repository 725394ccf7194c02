"""Measuring a model on held-out images: for training, a search and ``vlae evaluate``."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

import vlae
from pipeline.config.evaluation import MAX_SAMPLES
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.evaluation.moments import Moments
from pipeline.noise import Purpose, normal

QUANTITIES = ["distortion", "rate", "elbo", "iwae", "slack"]
"""What is measured of every image. ``slack`` is the IWAE bound less the ELBO."""
PASS_BYTES = 64 << 20
"""The features of all pixels that a pass through the model may compute, which limits its memory."""
MAX_PAIRS = {"cpu": 128, "cuda": 1024}
"""The most (image, sample) pairs of a pass, whatever their size; more are no faster."""
NOISE_PAIRS = 1024
"""Samples, of all images of a batch together, whose noise is drawn at a time."""

Result = TypeVar("Result")


def map_batches(
    work: Callable[[Batch], Result], loader: Iterable[Batch], threads: int
) -> Iterator[Result]:
    """Apply ``work`` to every batch; the results come in the order of the batches.

    ``threads`` batches are processed at once. On a CPU that is faster than several threads for one
    batch, which wait for each other.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for batch in chain(loader, [None] * threads):
            if batch is not None:
                pending.append(pool.submit(work, batch))
            if pending and (batch is None or len(pending) > threads):
                yield pending.popleft().result()


def estimates(
    model: vlae.VLAE,
    loader: Iterable[Batch],
    *,
    samples: int,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int = 1,
) -> Iterator[vlae.Estimate]:
    """The estimates of each batch, in the order of the batches.

    The IWAE bound uses k = ``samples``. Sample j of an image is drawn from (seed, image, j), and
    dynamic binarization draws every image once: the result depends neither on the batches nor on
    the number of ranks, and a larger k adds samples to those of a smaller one. ``threads`` batches
    are processed at once. Memory does not grow with k, nor with the batch; ``images_in_pass`` is
    the batch for which the last bit does not depend on other images either.
    """
    dtype, max_pairs = next(model.parameters()).dtype, pairs_in_pass(model, device)

    def bounds(batch: Batch) -> vlae.Estimate:
        x = binarize(batch, binarization, seed).to(device, dtype)
        parts = importance_noise(model, batch, samples, seed)
        return vlae.estimate(model, x, (part.to(device, dtype) for part in parts), max_pairs)

    return map_batches(bounds, loader, threads)


def importance_noise(model: vlae.VLAE, batch: Batch, samples: int, seed: int) -> Iterator[Tensor]:
    """Standard normal noise for samples of each image, in parts: (some samples, batch, latents)."""
    step = max(1, NOISE_PAIRS // max(1, len(batch.positions)))
    for first in range(0, samples, step):
        numbers = np.arange(first, min(first + step, samples))
        ids = batch.positions.astype(np.uint64) * MAX_SAMPLES + numbers[:, None].astype(np.uint64)
        noise = normal((Purpose.IMPORTANCE, seed), ids.ravel(), model.latents)
        yield torch.from_numpy(noise).unflatten(0, ids.shape)


def concatenate(parts: Iterable[vlae.Estimate]) -> vlae.Estimate:
    """The estimates of several batches as those of one, on the CPU."""
    return vlae.Estimate(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))


def pairs_in_pass(model: vlae.VLAE, device: torch.device) -> int:
    """The (image, sample) pairs that a pass through the model evaluates at once."""
    _, height, width = model.image_shape
    size = 4 * height * width * model.decoder.head.in_features
    most = MAX_PAIRS.get(device.type, MAX_PAIRS["cpu"])
    return max(1, min(most, PASS_BYTES * most // MAX_PAIRS["cpu"] // size))


def images_in_pass(samples: int, pairs: int) -> int:
    """The images of a pass, whose samples are those of one pass or more."""
    return max(1, pairs // samples)


def measure(
    model: vlae.VLAE,
    loader: Iterable[Batch],
    *,
    samples: int,
    binarization: Binarization,
    seed: int,
    device: torch.device,
) -> Moments:
    """Measure ``QUANTITIES`` on the images of ``loader``, in nats per image; see ``estimates``.

    The sums cover this rank's images only; see ``Moments.reduce``.
    """
    moments = Moments()
    for estimate in estimates(
        model, loader, samples=samples, binarization=binarization, seed=seed, device=device
    ):
        moments.add(quantities(estimate))
    return moments


def quantities(estimate: vlae.Estimate) -> dict[str, Tensor]:
    """``QUANTITIES`` of some images, each (images,), in nats."""
    return {name: getattr(estimate, name) for name in QUANTITIES}


def report(moments: Moments, model: vlae.VLAE, samples: int) -> dict[str, float | None]:
    """The measured quantities by name and unit, each with its standard error over images.

    ``*_nats`` are nats per image, ``*_bits`` bits per image, ``*_bits_per_dim`` bits per sub-pixel.
    ``elbo`` and ``iwae`` are reported as bounds on the negative log-likelihood: lower is better.
    The code length is the negative ELBO; with one sample there is no IWAE bound. ``slack`` is the
    difference of the two, and its standard error that of the differences image by image. Standard
    errors are none for a single image.
    """
    num_dims = math.prod(model.image_shape)
    rate, distortion = moments.measured("rate", "nats"), moments.measured("distortion", "nats")
    elbo, iwae = -moments.measured("elbo", "nats"), -moments.measured("iwae", "nats")
    values = {
        "num_images": elbo.count,
        **rate.to_json("rate_nats"),
        "rate_bits": rate.bits,
        **distortion.to_json("distortion_nats"),
        **elbo.to_json("elbo_nats"),
        "elbo_bits_per_dim": elbo.value / (num_dims * math.log(2)),
    }
    if samples == 1:
        return values
    return values | {
        **iwae.to_json("iwae_nats"),
        "iwae_bits_per_dim": iwae.value / (num_dims * math.log(2)),
        "iwae_samples": samples,
        **moments.measured("slack", "nats").to_json("slack_nats"),
    }
