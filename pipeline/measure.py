"""Measuring a model on held-out images: the same in training, in a search and in ``vlae evaluate``."""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import torch

import vlae
from pipeline.config import Binarization
from pipeline.loader import Batch, EvalLoader, binarize
from pipeline.metrics import Moments
from pipeline.noise import Purpose, normal

QUANTITIES = ["distortion", "rate", "elbo", "iwae"]


def measure(
    model: vlae.VLAE,
    loader: EvalLoader,
    *,
    samples: int,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int = 1,
    progress: Callable[[int], object] = lambda images: None,
) -> Moments:
    """Distortion, rate, ELBO and IWAE bound with k = ``samples``, in nats per image, of the images that ``loader`` gives.

    Dynamic binarization draws every image once, from (seed, image): the result does not depend on the batches or the number of ranks.
    ``threads`` batches are worked on at once; on a CPU that is better than many threads for one batch, which wait for each other.
    ``progress`` is called with the number of images of each batch. The sums are this rank's own; see ``Moments.reduce``.
    """

    def bounds(batch: Batch) -> vlae.Estimate:
        x = binarize(batch, binarization, seed).to(device)
        noise = normal((Purpose.IMPORTANCE, seed), batch.positions, samples * model.latents)
        codes = torch.from_numpy(noise).unflatten(1, (samples, model.latents)).transpose(0, 1)
        return vlae.estimate(model, x, codes.to(device))

    moments = Moments()
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[vlae.Estimate]] = deque()
        for batch in chain(loader, [None] * threads):
            if batch is not None:
                pending.append(pool.submit(bounds, batch))
            if pending and (batch is None or len(pending) > threads):
                estimate = pending.popleft().result()
                moments.add({name: getattr(estimate, name) for name in QUANTITIES})
                progress(len(estimate.iwae))
    return moments


def report(moments: Moments, model: vlae.VLAE, samples: int) -> dict[str, float]:
    """The measured quantities by name and unit, each with its standard error over images.

    ``*_nats`` are nats per image, ``*_bits`` bits per image, ``*_bits_per_dim`` bits per sub-pixel. ``elbo`` and ``iwae`` are
    reported as bounds on the negative log-likelihood: lower is better. The code length is the ELBO's; with one sample there is no
    other bound.
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
    }
