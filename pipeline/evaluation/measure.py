"""Measuring a model on held-out images, in training, in a search and in ``vlae evaluate``."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

import vlae
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation.moments import Moments
from pipeline.noise import Purpose, normal

QUANTITIES = ["distortion", "rate", "elbo", "iwae", "slack"]
Result = TypeVar("Result")


def several_at_once(
    work: Callable[[Batch], Result], loader: Iterable[Batch], threads: int
) -> Iterator[Result]:
    """``work`` done on every batch: the results in the order of the batches.

    ``threads`` batches are worked on at once; on a CPU that is better than many threads for one
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
    """Distortion, rate, ELBO, IWAE bound with k = ``samples``, and slack, in nats per image, of the
    images that ``loader`` gives.

    Dynamic binarization draws every image once, from (seed, image): the result does not depend on
    the batches or the number of ranks. ``threads`` batches are worked on at once. ``visit`` is
    called with each batch, its images as the model sees them and what was found, in the loader's
    order. The sums are this rank's own; see ``Moments.reduce``.
    """

    dtype = next(model.parameters()).dtype

    def bounds(batch: Batch) -> tuple[Batch, Tensor, vlae.Estimate]:
        x = binarize(batch, binarization, seed).to(device, dtype)
        noise = normal((Purpose.IMPORTANCE, seed), batch.positions, samples * model.latents)
        codes = torch.from_numpy(noise).unflatten(1, (samples, model.latents)).transpose(0, 1)
        return batch, x, vlae.estimate(model, x, codes.to(device, dtype))

    moments = Moments()
    for batch, x, estimate in several_at_once(bounds, loader, threads):
        moments.add({name: getattr(estimate, name) for name in QUANTITIES})
        visit(batch, x, estimate)
    return moments


def report(moments: Moments, model: vlae.VLAE, samples: int) -> dict[str, float | None]:
    """The measured quantities by name and unit, each with its standard error over images; none
    where a single image has none.

    ``*_nats`` are nats per image, ``*_bits`` bits per image, ``*_bits_per_dim`` bits per sub-pixel.
    ``elbo`` and ``iwae`` are reported as bounds on the negative log-likelihood: lower is better.
    The code length is the ELBO's; with one sample there is no other bound. ``slack`` is their
    difference; its standard error is that of the differences image by image.
    """
    per_dim = math.prod(model.image_shape) * math.log(2)
    elbo, iwae = -moments.mean("elbo"), -moments.mean("iwae")
    values = {
        "num_images": moments.count("elbo"),
        "rate_nats": moments.mean("rate"),
        "rate_nats_se": moments.standard_error("rate"),
        "rate_bits": moments.mean("rate") / math.log(2),
        "distortion_nats": moments.mean("distortion"),
        "distortion_nats_se": moments.standard_error("distortion"),
        "elbo_nats": elbo,
        "elbo_nats_se": moments.standard_error("elbo"),
        "elbo_bits_per_dim": elbo / per_dim,
    }
    if samples == 1:
        return values
    return values | {
        "iwae_nats": iwae,
        "iwae_nats_se": moments.standard_error("iwae"),
        "iwae_bits_per_dim": iwae / per_dim,
        "iwae_samples": samples,
        "slack_nats": moments.mean("slack"),
        "slack_nats_se": moments.standard_error("slack"),
    }


def with_error(values: Mapping[str, Any], key: str, digits: int = 2, factor: int = 1) -> str:
    """A measured quantity, times ``factor``, as text, with its standard error if it has one:
    ``85.36 +- 0.66``.
    """
    error = values[f"{key}_se"]
    return f"{factor * values[key]:.{digits}f}" + (
        "" if error is None else f" +- {factor * error:.{digits}f}"
    )
