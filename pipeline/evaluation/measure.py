"""Measuring a model on held-out images: for training, a search and ``vlae evaluate``."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

import vlae
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation.moments import Moments
from pipeline.noise import Purpose, normal

QUANTITIES = ["distortion", "rate", "elbo", "iwae", "slack"]
"""What is measured of every image. ``slack`` is the IWAE bound less the ELBO."""

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


def measure(
    model: vlae.VLAE,
    loader: EvalLoader,
    *,
    samples: int,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int = 1,
    visit: Callable[[Batch, Tensor, vlae.Estimate], object] = lambda batch, x, estimate: None,
) -> Moments:
    """Measure ``QUANTITIES`` on the images of ``loader``, in nats per image.

    The IWAE bound uses k = ``samples``. All noise is drawn from (seed, image), and dynamic
    binarization draws every image once: the result depends neither on the batches nor on the
    number of ranks. ``threads`` batches are processed at once. ``visit`` is called in the loader's
    order with each batch, its images as the model sees them, and their estimate. The sums cover
    this rank's images only; see ``Moments.reduce``.
    """
    dtype = next(model.parameters()).dtype

    def bounds(batch: Batch) -> tuple[Batch, Tensor, vlae.Estimate]:
        x = binarize(batch, binarization, seed).to(device, dtype)
        noise = normal((Purpose.IMPORTANCE, seed), batch.positions, samples * model.latents)
        codes = torch.from_numpy(noise).unflatten(1, (samples, model.latents)).transpose(0, 1)
        return batch, x, vlae.estimate(model, x, codes.to(device, dtype))

    moments = Moments()
    for batch, x, estimate in map_batches(bounds, loader, threads):
        moments.add({name: getattr(estimate, name) for name in QUANTITIES})
        visit(batch, x, estimate)
    return moments


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
