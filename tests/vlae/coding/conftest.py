"""A stack of bits without rounding: asymmetric numeral systems on one integer of any size."""

import math
import random

import numpy as np
import pytest

from vlae.coding.decisions import PRECISION, Integers


class Stack:
    """A stack whose ``state`` is a Python integer. Its length is log2 of the state, in bits."""

    def __init__(self, bits: int, seed: int = 0) -> None:
        self.state = random.Random(seed).getrandbits(bits) | 1 << bits

    @property
    def bits(self) -> float:
        return math.log2(self.state)

    def push(self, bits: Integers, ones: Integers) -> None:
        for bit, one in zip(bits[::-1].tolist(), ones[::-1].tolist(), strict=True):
            start, size = self._part(bit, one)
            quotient, rest = divmod(self.state, size)
            self.state = (quotient << PRECISION) + start + rest

    def pop(self, ones: Integers) -> Integers:
        bits = []
        for one in ones.tolist():
            place = self.state & ((1 << PRECISION) - 1)
            bit = int(place >= (1 << PRECISION) - one)
            start, size = self._part(bit, one)
            self.state = size * (self.state >> PRECISION) + place - start
            bits.append(bit)
        return np.array(bits, dtype=np.int64)

    @staticmethod
    def _part(bit: int, one: int) -> tuple[int, int]:
        assert 0 < one < 1 << PRECISION
        zero = (1 << PRECISION) - one
        return (zero, one) if bit else (0, zero)


@pytest.fixture(scope="session")
def make_stack() -> type[Stack]:
    """A stack with a given number of random bits."""
    return Stack
