"""The stack of bits that images are coded on: asymmetric numeral systems (ANS)."""

import constriction
import numpy as np
import numpy.typing as npt

from pipeline import noise
from pipeline.noise import Purpose
from vlae.coding.decisions import PRECISION, Integers

Words = npt.NDArray[np.uint32]
DECISION = constriction.stream.model.Bernoulli(perfect=False)
WORD = 32
"""Bits of a word. The stack is a list of words, and a head of two."""


def initial_words(seed: int, block: int, number: int) -> Words:
    """The random words with which a block's stack begins."""
    numbers = noise.bits((seed, Purpose.INITIAL_BITS), np.array([block]), number)[0]
    words = (numbers >> np.uint64(64 - WORD)).astype(np.uint32)
    words[-1] |= 1  # a stack does not keep leading zeros
    return words


class Stack:
    """An ANS stack of bits, which begins with the given words.

    Reference: Duda, *Asymmetric Numeral Systems*, 2013, arXiv:1311.2540. The implementation is
    ``constriction`` (Bamler, arXiv:2201.01741). Its decisions are exact to 24 bits, so that it
    receives each probability without rounding.
    """

    def __init__(self, words: Words) -> None:
        self.coder = constriction.stream.stack.AnsCoder(words)
        self.lowest = len(words)

    @property
    def num_bits(self) -> int:
        """Its length."""
        return self.coder.num_valid_bits()

    @property
    def words(self) -> Words:
        """Its content, the head last."""
        return self.coder.get_compressed()

    @property
    def untouched(self) -> int:
        """Words at the bottom that were never popped."""
        return max(0, self.lowest - 2)

    def push(self, bits: Integers, ones: Integers) -> None:
        """Push decisions, whose probabilities of a 1 are ``ones / 2^PRECISION``."""
        self.coder.encode_reverse(bits.astype(np.int32), DECISION, ones / (1 << PRECISION))

    def pop(self, ones: Integers) -> Integers:
        """Undo ``push``."""
        bits = self.coder.decode(DECISION, ones / (1 << PRECISION))
        self.lowest = min(self.lowest, self.coder.num_words())
        return bits.astype(np.int64)
