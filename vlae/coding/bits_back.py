"""Bits-back coding of images with a VLAE.

A batch of images is pushed in three moves: its codes are popped with q(z|x), the images are pushed
with p(x|z), and the codes are pushed with p(z). On average the stack grows by -log p(x|z) -
log p(z) + log q(z|x): the code length of the bound. The receiver undoes the moves in the opposite
order, and so gives back the bits from which the codes were popped.

Encoder and decoder compute each probability by the same operations on tensors of the same shape.
A network's output may differ in its last bits with another batch size, and the pixels of an image
with a parallel instead of a sequential pass.

Reference: Townsend, Bird, Barber, *Practical Lossless Compression with Latent Variables using Bits
Back Coding*, ICLR 2019, arXiv:1901.04866.
"""

import torch
from torch import Tensor

from vlae.coding import codes
from vlae.coding.decisions import Coder, Decide, Known, pop
from vlae.likelihood import Distribution
from vlae.model import VLAE
from vlae.sampling import Draw, walk


@torch.no_grad()
def push(coder: Coder, model: VLAE, x: Tensor) -> None:
    """Push images, (batch, channels, height, width), pixels as the likelihood requires.

    ``model`` is in single precision, on the CPU. Raises ValueError if there is no exact code for
    its prior or posterior.
    """
    codes.check(model.prior)
    posterior = model.encoder(_plain(x))
    z = codes.pop_posterior(coder, posterior)
    pixels = Known()
    walk(model.decoder, z, _known(model, x, pixels))
    pixels.push(coder)
    codes.push_prior(coder, model.prior, z)


@torch.no_grad()
def pull(coder: Coder, model: VLAE, batch: int) -> Tensor:
    """Undo ``push`` of ``batch`` images."""
    codes.check(model.prior)
    z = codes.pop_prior(coder, model.prior, batch, model.latents)
    x = walk(model.decoder, z, _decided(pop(coder)))
    x = _plain(x)
    codes.push_posterior(coder, model.encoder(x), z)
    return x


def batch_sizes(count: int, most: int) -> list[int]:
    """The sizes of the batches in which ``count`` images are pushed, at most ``most`` each.

    The first batch is a single image, and every batch at most a third of those before it. So
    the stack has enough bits to pop the batch's codes from, and only the codes of the first images
    need initial bits.
    """
    sizes: list[int] = []
    done = 0
    while done < count:
        sizes.append(min(most, max(1, done // 3), count - done))
        done += sizes[-1]
    return sizes


def _plain(x: Tensor) -> Tensor:
    """A copy whose strides are those of a new tensor: others may select another convolution.

    ``to`` and ``contiguous`` keep the strides of some tensors with a single image or channel.
    """
    return x.clone(memory_format=torch.contiguous_format)


def _decided(decide: Decide) -> Draw:
    def draw(distribution: Distribution, row: Tensor, column: Tensor) -> Tensor:
        return distribution.draw(decide)

    return draw


def _known(model: VLAE, x: Tensor, known: Known) -> Draw:
    pixels = x.permute(0, 2, 3, 1)

    def draw(distribution: Distribution, row: Tensor, column: Tensor) -> Tensor:
        known.bits = model.decoder.likelihood.digits(pixels[:, row, column])
        return distribution.draw(known)

    return draw
