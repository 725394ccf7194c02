r"""The resolution of a code: the finest structure of images that the code keeps, in pixels.

From each image x a code is drawn, z ~ q(z|x), and from the code another image, x' ~ p(x'|z). Where
the code decides the image, the two agree; where the decoder fills it in, they are independent. The
*Fourier ring correlation* compares them at each spatial frequency, over a set of images: with
:math:`F` and :math:`F'` the Fourier coefficients of x and x' less their mean images,

.. math:: c(r) = \frac{\sum_{x} \sum_{k \in r} \mathrm{Re}\, F_k \bar F'_k}
    {\sqrt{\sum_{x} \sum_{k \in r} |F_k|^2 \; \sum_{x} \sum_{k \in r} |F'_k|^2}}

over the coefficients k of a ring r: those of nearly the same frequency in every direction, of all
channels. If x is what the code decides plus an independent rest, and x' the same plus another such
rest, c(r) is the share of the variance at that frequency that the code decides. At 0.5 the code
decides as much as it leaves open.

The frequency where the correlation falls to 0.5, as a wavelength in pixels, is the resolution.

References: van Heel, *Similarity measures between images*, Ultramicroscopy 21 (1987); Rosenthal,
Henderson, *Optimal determination of particle orientation, absolute hand, and contrast loss in
single-particle electron cryomicroscopy*, J. Mol. Biol. 333 (2003). There two halves of the
measurements are compared; here an image and what its code makes of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import vlae
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation.measure import map_batches
from pipeline.noise import Purpose, normal, uniform
from pipeline.values import JsonObject
from vlae.sampling import draw_pixels

THRESHOLD = 0.5
"""The correlation at which the code decides as much of the variance as it leaves open."""
DRAWS = 2
"""Codes and images that are drawn for each image."""
REPLICATES = 1000
"""Resamplings of the images, from which standard errors are computed."""
CHUNK = 16
"""Images whose Fourier coefficients are held at once."""
ONE_DEVIATION = (0.1587, 0.8413)
"""The quantiles one standard deviation below and above the mean of a normal distribution."""


@dataclass(frozen=True)
class Resolution:
    """The ring correlations of a set of images with what their codes make of them."""

    images: int
    size: int
    """Rings are ``1 / size`` cycles per pixel wide: the shorter side of the images, in pixels."""
    correlation: list[float]
    """Of ring 0, the brightness of the whole image, to ring ``size // 2``, the finest."""
    correlation_se: list[float | None]
    """Standard errors over images; none for a single image."""
    px: float | None
    """The resolution, a wavelength in pixels; none if only the brightness, or not even that, has a
    correlation of 0.5.

    It is the wavelength of the finest ring, 2 pixels if ``size`` is even, where that ring has one:
    the code may keep more than pixels can show.
    """
    px_se: float | None
    """Its standard error over images; none for a single image, and if it has no bound."""

    def to_json(self) -> JsonObject:
        """``resolution_px`` with its error and, under ``resolution``, the whole curve.

        There ``lost_px`` are the wavelengths of rings that are coarser than the resolution and
        still have a correlation below 0.5; ``coarsest_px`` and ``finest_px`` those of the first
        ring after the brightness and of the last one.
        """
        last = self.size // 2
        kept = [ring for ring in range(1, last + 1) if self.correlation[ring] >= THRESHOLD]
        lost = [ring for ring in range(1, max(kept, default=0)) if ring not in kept]
        return {
            "resolution_px": self.px,
            "resolution_px_se": self.px_se,
            "resolution": {
                "num_images": self.images,
                "draws": DRAWS,
                "coarsest_px": self.size,
                "finest_px": self.size / max(1, last),
                "lost_px": [self.size / ring for ring in lost],
                "cycles_per_px": [ring / self.size for ring in range(last + 1)],
                "correlation": self.correlation,
                "correlation_se": self.correlation_se,
            },
        }


def resolution(
    model: vlae.VLAE,
    loader: EvalLoader,
    *,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int,
    progress: Callable[[int], object],
    sent: int | None = None,
) -> Resolution:
    """The resolution of a model's codes, on the images of ``loader``.

    ``sent`` is how many latents of each code are sent, the first ones; by default all.
    All noise is drawn from (seed, image): neither the batches nor ``threads``, the number of
    batches that are drawn at once, change the result. ``progress`` is called with the number of
    images of each batch.
    """

    @torch.no_grad()
    def drawn(batch: Batch) -> tuple[Tensor, Tensor]:
        x, decoder = binarize(batch, binarization, seed).to(device), model.decoder
        shape = (decoder.likelihood.num_uniforms, *decoder.image_shape[1:])
        key = (Purpose.RESOLUTION, seed)
        noise = normal((*key, 0), batch.positions, DRAWS * model.latents)
        pixels = uniform((*key, 1), batch.positions, DRAWS * math.prod(shape))
        z = model.encoder(x).sample(_draws_first(noise, (model.latents,)).to(x))
        if sent is not None:
            z = model.truncated(z, sent)
        redrawn = draw_pixels(
            decoder, z.flatten(0, 1), _draws_first(pixels, shape).flatten(0, 1).to(x)
        )
        return _as_bytes(x), _as_bytes(redrawn.unflatten(0, (DRAWS, -1)))

    images, redrawn = [], []
    for x, others in map_batches(drawn, loader, threads):
        images.append(x)
        redrawn.append(others)
        progress(len(x))
    return compare(torch.cat(images), torch.cat(redrawn, 1), seed)


def compare(images: Tensor, redrawn: Tensor, seed: int = 0) -> Resolution:
    """The resolution from images and redrawn ones, whose pixels may have any scale.

    images: (num_images, channels, height, width). redrawn: (draws, num_images, channels, height,
    width). ``seed`` resamples the images for the standard errors.
    """
    sums, size = ring_sums(images, redrawn), min(images.shape[-2:])
    curve = correlation(sums.sum(1))
    px = float(crossing(curve, size))
    errors: list[float | None] = [None] * len(curve)
    error = math.inf
    if len(images) > 1:
        # Resampling leaves the mean images as they are: to first order, the sums do not change
        # with them.
        weights = _resamplings(len(images), seed)
        replicates = correlation(torch.einsum("bn,snr->sbr", weights, sums))
        errors = replicates.std(0).tolist()
        found = crossing(replicates, size).sort()[0]  # a replicate that keeps nothing comes last
        low, high = (float(found[round(part * (len(found) - 1))]) for part in ONE_DEVIATION)
        error = (high - low) / 2
    return Resolution(
        len(images),
        size,
        curve.tolist(),
        errors,
        px if math.isfinite(px) else None,
        error if math.isfinite(px) and math.isfinite(error) else None,
    )


def ring_sums(images: Tensor, redrawn: Tensor) -> Tensor:
    """What the correlation is made of: (3, num_images, rings), float64.

    For each image and ring, the sums of Re F conj(F'), |F|^2 and |F'|^2, means over the draws of
    F'. Shapes are those of ``compare``.
    """
    ring, weight = rings(*images.shape[-2:])
    inside, count = ring >= 0, min(images.shape[-2:]) // 2 + 1
    mean, redrawn_mean = images.double().mean(0), redrawn.double().mean((0, 1))
    parts = []
    for x, others in zip(images.split(CHUNK), redrawn.split(CHUNK, 1), strict=True):
        f = torch.fft.rfft2(x.double() - mean)
        g = torch.fft.rfft2(others.double() - redrawn_mean)  # (draws, batch, ...)
        terms = [(f * g.mean(0).conj()).real, f.abs().square(), g.abs().square().mean(0)]
        table = weight * torch.stack(terms).sum(2)  # (3, batch, height, width // 2 + 1)
        zeros = table.new_zeros(3, len(x), count)
        parts.append(zeros.index_add(2, ring[inside], table[..., inside]))
    return torch.cat(parts, 1)


def rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The ring of each coefficient of ``rfft2``, and how often it counts.

    Both have the shape (height, width // 2 + 1). The ring of the frequency f is the integer next to
    f * min(height, width); -1 for what is finer than the finest ring, in the corners. Coefficients
    count twice where ``rfft2`` omits the conjugate ones.
    """
    size = min(height, width)
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    right = torch.fft.rfftfreq(width, dtype=torch.float64)
    ring = (torch.hypot(down, right) * size).round().long()
    weight = torch.full((height, width // 2 + 1), 2.0, dtype=torch.float64)
    weight[:, 0] = 1
    if width % 2 == 0:
        weight[:, -1] = 1
    return ring.masked_fill(ring > size // 2, -1), weight


def correlation(sums: Tensor) -> Tensor:
    """The ring correlations, (..., rings), from sums over images, (3, ..., rings).

    0 where the images, or the redrawn ones, do not vary.
    """
    cross, own, redrawn = sums
    scale = (own * redrawn).sqrt()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), 0.0)


def crossing(curve: Tensor, size: int) -> Tensor:
    """The wavelength in pixels at which ring correlations fall to 0.5: (..., rings) -> (...).

    It lies beyond the finest ring that reaches 0.5, interpolated linearly in frequency. So a coarse
    ring in which only the decoder's part varies, such as the brightness of a texture, does not hide
    what finer rings keep. Infinite if no ring but the brightness reaches 0.5; the wavelength of the
    finest ring if that ring does.
    """
    last, numbers = curve.shape[-1] - 1, torch.arange(curve.shape[-1])
    ring = torch.where(curve >= THRESHOLD, numbers, 0).amax(-1)
    here, beyond = (
        curve.gather(-1, number[..., None])[..., 0] for number in (ring, (ring + 1).clamp(max=last))
    )
    step = torch.where(ring < last, (here - THRESHOLD) / (here - beyond), 0.0)
    return torch.where(ring > 0, size / (ring + step), math.inf)


def _resamplings(num_images: int, seed: int) -> Tensor:
    """How often each image is drawn in each resampling: (replicates, num_images), float64."""
    draws = uniform((Purpose.RESAMPLING, seed), np.arange(REPLICATES), num_images)
    numbers = torch.from_numpy((draws.astype(np.float64) * num_images).astype(np.int64))
    counts = torch.zeros(REPLICATES, num_images, dtype=torch.float64)
    return counts.scatter_add_(1, numbers, torch.ones_like(counts))


def _draws_first(noise: npt.NDArray[np.float32], shape: tuple[int, ...]) -> Tensor:
    """Noise of each image, (batch, draws * ...), as (draws, batch, ...)."""
    return torch.from_numpy(noise).unflatten(1, (DRAWS, *shape)).transpose(0, 1)


def _as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], which are multiples of 1 / 255, as integers: less memory for many."""
    return (pixels * 255).round().to(torch.uint8).cpu()
