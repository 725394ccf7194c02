r"""Random numbers as a pure function of a key and a counter.

There is no state to save, and the numbers are the same for any number of workers. Row ``i`` of a
result depends on ``key`` and ``ids[i]`` alone. So position ``p`` of the global batch at step ``s``
gets the numbers ``uniform((seed, Purpose.BINARIZATION), ids=[s * global_batch + p], ...)``,
whichever rank draws them, together with whichever other rows, and after any number of restarts.

Row ``i`` is a SplitMix64 sequence (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014). With :math:`m` the 64-bit finaliser (D. Stafford's variant 13, a
bijection in which every input bit flips every output bit with probability close to one half),

.. math:: s_i = m(k + \gamma\,\mathrm{id}_i), \quad g_i = m(s_i + \gamma) \mathbin{|} 1, \quad
b_{ij} = m(s_i + (j+1)\, g_i)

with :math:`k` a hash of the key and :math:`\gamma` the odd integer next to :math:`2^{64}/\phi`.
:math:`m` and the sum are bijections, so different ids have different :math:`s_i`: no two rows are
equal. Each row has its own increment :math:`g_i`. So two rows that share one number, as must happen
among :math:`10^9` rows of a thousand numbers, differ again in the next; with a common increment all
later numbers would be equal. SplitMix64 passes BigCrush. It is not a cipher, and need not be.

The integers are the same on every platform. ``normal`` uses the platform's logarithm and cosine,
whose last bit may differ.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

GAMMA = 0x9E3779B97F4A7C15
"""The odd integer next to 2^64 / phi."""
MASK = (1 << 64) - 1
"""Reduces an integer modulo 2^64."""
CHUNK = 1 << 16
"""Numbers generated at once, few enough for the processor's cache."""


class Purpose(IntEnum):
    """What random numbers are used for.

    It is part of the key, beside the seed, so that no two uses draw the same numbers.
    """

    BINARIZATION = 1
    POSTERIOR = 2
    IMPORTANCE = 7
    CODE = 8
    SYNTHETIC = 9
    INITIAL_BITS = 10
    CODEBOOK = 11
    SELECTION = 12
    REDRAWING = 13
    CANARY = 14
    RESOLUTION = 15
    RESAMPLING = 16
    SHOWN = 17
    SENT = 20
    STATIC_BINARIZATION = 3
    SHARD_ORDER = 4
    EPOCH_OFFSET = 5
    GROUP_ORDER = 6


def bits(key: tuple[int, ...], ids: npt.NDArray[np.integer], size: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit integers, shape ``(len(ids), size)``.

    ``key`` is any number of integers, and ``ids``, of shape ``(n,)``, numbers the rows. Only their
    values modulo 2^64 matter.
    """
    gamma = np.uint64(GAMMA)
    starts = _mix(np.uint64(_hash(key)) + gamma * ids.astype(np.uint64))  # (n,)
    increments = _mix(starts + gamma) | np.uint64(1)  # (n,)
    steps = np.arange(1, size + 1, dtype=np.uint64)  # (size,)
    return _mix(starts[:, None] + steps * increments[:, None])  # (n, size)


def uniform(
    key: tuple[int, ...], ids: npt.NDArray[np.integer], size: int
) -> npt.NDArray[np.float32]:
    """Uniform in [0, 1), multiples of 2^-24 (all that a float32 can hold), shape ``(len(ids),
    size)``.
    """
    # Through int32, which processors convert to float32 many times faster than uint64.
    return (bits(key, ids, size) >> np.uint64(40)).astype(np.int32).astype(np.float32) * np.float32(
        2.0**-24
    )


def normal(
    key: tuple[int, ...], ids: npt.NDArray[np.integer], size: int
) -> npt.NDArray[np.float32]:
    """Standard normal, shape ``(len(ids), size)``; no absolute value exceeds 8.6.

    Box-Muller in float64 on two 53-bit uniforms: one in (0, 1] for the radius, whose logarithm is
    therefore finite, and one for the angle. Do not use one key for both ``normal`` and
    ``uniform``: their numbers would come from the same bits.
    """
    half = (size + 1) // 2
    uniforms = (bits(key, ids, 2 * half) >> np.uint64(11)).astype(
        np.int64
    ) * 2.0**-53  # (n, 2 * half), in [0, 1)
    radius = np.sqrt(-2.0 * np.log(1.0 - uniforms[:, :half]))
    angle = 2.0 * np.pi * uniforms[:, half:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (n, 2 * half)
    return both[:, :size].astype(np.float32)


def permutation(key: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    """A random order of ``range(size)``, shape ``(size,)``.

    It is the order of random 64-bit numbers, ties by index.
    """
    values = np.empty(size, dtype=np.uint64)
    for start in range(0, size, CHUNK):
        values[start : start + CHUNK] = bits(key, np.arange(start, min(start + CHUNK, size)), 1)[
            :, 0
        ]
    return np.argsort(values, kind="stable")


def below(key: tuple[int, ...], limit: int) -> int:
    """One random integer in ``range(limit)``."""
    return (
        int(bits(key, np.zeros(1, dtype=np.uint64), 1)[0, 0]) % limit
    )  # biased by at most limit / 2^64


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Stafford's variant 13, in place; returns ``values``."""
    shifted = values >> np.uint64(30)
    values ^= shifted
    values *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(values, np.uint64(27), out=shifted)
    values ^= shifted
    values *= np.uint64(0x94D049BB133111EB)
    np.right_shift(values, np.uint64(31), out=shifted)
    values ^= shifted
    return values


def _hash(key: tuple[int, ...]) -> int:
    """A 64-bit hash of a key; the number and the order of its elements matter."""
    state = len(key)
    for element in key:
        mixed = _mix(np.array([(state + GAMMA) & MASK], dtype=np.uint64))[0]
        state = int(mixed) ^ (element & MASK)
    return int(_mix(np.array([(state + GAMMA) & MASK], dtype=np.uint64))[0])
