"""Blocks of images as bytes, each coded on a stack that begins afresh."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.coding.stack import Stack, initial_words
from pipeline.errors import DamagedData
from vlae.coding import bits_back
from vlae.model import VLAE

BATCH = 128
"""Most images that are coded together. Larger batches are faster and need more memory."""
DIGEST = 8
"""Bytes of a checksum."""


@dataclass(frozen=True)
class Block:
    """A coded block of images."""

    payload: bytes
    """The words of the stack, little-endian."""
    initial_words: int
    """How many of the stack's initial words the payload contains."""
    pixels: bytes
    """The checksum of the images."""

    @property
    def initial_bits(self) -> int:
        """Random bits in the payload, from which the codes of the first images were popped."""
        return 32 * self.initial_words


@contextmanager
def single_thread() -> Iterator[None]:
    """Run PyTorch on one thread: several add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode(model: VLAE, x: Tensor, seed: int, number: int) -> Block:
    """Code images x, (count, channels, height, width), as block ``number`` of a file."""
    start = initial_words(seed, number, _most_initial_words(model))
    stack, done = Stack(start), 0
    with single_thread():
        for size in bits_back.batch_sizes(len(x), BATCH):
            bits_back.push(stack, model, x[done : done + size].clone())
            done += size
    return Block(
        stack.words[stack.untouched :].astype("<u4").tobytes(),
        len(start) - stack.untouched,
        digest(x),
    )


def decode(model: VLAE, block: Block, count: int, seed: int, number: int) -> Tensor:
    """Undo ``encode``.

    Raises DamagedData if the images or the initial bits are not those that were coded. The caller
    says which block it is.
    """
    if len(block.payload) % 4 or not any(block.payload[-4:]):
        raise DamagedData("its content is no stack of bits")
    stack = Stack(np.frombuffer(block.payload, "<u4").astype(np.uint32))
    with single_thread():
        parts = [
            bits_back.pull(stack, model, size)
            for size in reversed(bits_back.batch_sizes(count, BATCH))
        ]
    x = torch.cat(parts[::-1]) if parts else torch.zeros(0, *model.image_shape)
    start = initial_words(seed, number, _most_initial_words(model))
    left = start[len(start) - block.initial_words :]
    if digest(x) != block.pixels or not np.array_equal(stack.words, left):
        raise DamagedData("its images are not those that were compressed")
    return x


def digest(x: Tensor) -> bytes:
    """The checksum of images in [0, 1]."""
    return hashlib.blake2b(to_bytes(x).tobytes(), digest_size=DIGEST).digest()


def to_bytes(x: Tensor) -> "np.typing.NDArray[np.uint8]":
    """Images in [0, 1] as 8-bit values of the same shape."""
    return (255 * x).round().to(torch.uint8).numpy()


def _most_initial_words(model: VLAE) -> int:
    """More than the codes of one batch take, each latent in each step of a flow."""
    return 64 + 4 * BATCH * model.latents
