"""Lossy blocks: each image is the number of a code, from which it is drawn again."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import noise
from pipeline.data.records import Integers
from pipeline.noise import Purpose
from vlae.coding import codebook
from vlae.model import VLAE
from vlae.sampling import draw_pixels, walk

BATCH = 64
"""Images that are drawn or weighed at a time."""
PART = 1 << 16
"""Candidates that are drawn from the prior at a time."""


@torch.no_grad()
def candidates(model: VLAE, bits: int, seed: int, sent: int | None = None) -> Tensor:
    """The codes that sender and receiver share, from the prior: (2^bits, sent).

    They are the first ``sent`` latents of codes; by default all.
    """
    parts = []
    for start in range(0, 1 << bits, PART):
        numbers = np.arange(start, min(start + PART, 1 << bits))
        normal = noise.normal((seed, Purpose.CODEBOOK), numbers, model.latents)
        parts.append(model.prior.sample(torch.from_numpy(normal))[:, :sent])
    return torch.cat(parts)


@torch.no_grad()
def encode(model: VLAE, x: Tensor, codes: Tensor, seed: int) -> bytes:
    """The numbers of the images' codes, packed. Raises ValueError if the posterior cannot be sent.

    x: (count, channels, height, width). codes: (2^bits, sent).
    """
    sent = codes.shape[1]
    uniform = noise.uniform((seed, Purpose.SELECTION), np.arange(len(codes)), 1)[:, 0]
    gumbel = -torch.log(-torch.log(torch.from_numpy(uniform).double() + 2.0**-25)).float()
    log_prob = torch.cat(
        [model.prior.log_prob(whole(model, part))[:, :sent].sum(-1) for part in codes.split(PART)]
    )
    chosen = [
        codebook.choose(model.encoder(part), codes, log_prob, gumbel) for part in x.split(BATCH)
    ]
    return pack(torch.cat(chosen).numpy(), int(np.log2(len(codes))))


@torch.no_grad()
def redraw(model: VLAE, z: Tensor, seed: int, first: int, most_likely: bool) -> Tensor:
    """x ~ p(x|z), or the most likely pixel at each place: (count, channels, height, width).

    z: (count, sent); latents that were not sent are 0. ``first`` is the number of the first image
    in its split.
    """
    decoder, size = model.decoder, model.image_shape[1:]
    parts = []
    for start in range(0, len(z), BATCH):
        part = whole(model, z[start : start + BATCH])
        if most_likely:
            drawn = walk(decoder, part, lambda distribution, row, column: distribution.mode())
        else:
            numbers = np.arange(first + start, first + start + len(part))
            length = decoder.likelihood.num_uniforms * size[0] * size[1]
            uniform = noise.uniform((seed, Purpose.REDRAWING), numbers, length)
            shape = (len(part), decoder.likelihood.num_uniforms, *size)
            drawn = draw_pixels(decoder, part, torch.from_numpy(uniform).view(shape))
        parts.append(drawn)
    return torch.cat(parts)


def whole(model: VLAE, codes: Tensor) -> Tensor:
    """Codes as the model takes them: (count, sent) -> (count, latents)."""
    return F.pad(codes, (0, model.latents - codes.shape[1]))


def pack(numbers: Integers, bits: int) -> bytes:
    """Numbers below 2^bits in ``bits`` bits each, the most significant first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((numbers[:, None] >> shifts & 1).astype(np.uint8)).tobytes()


def unpack(packed: bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    """Undo ``pack`` of ``count`` numbers; ``packed`` has at least their length."""
    flat = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flat.reshape(count, bits).astype(np.int64) @ weights
