"""Noise: a pure function of key and counter, and random enough."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.noise import below, bits, normal, permutation, uniform

KEY = (3, 7)
EXPECTED_BITS = [
    [13955315004847907548, 225536546052956454],
    [1882079410597750710, 11826663142632199982],
]
EXPECTED_PERMUTATION = [3, 6, 2, 4, 0, 5, 7, 1]
EXPECTED_NORMAL = [0.4774277, -0.0564683, 1.6116751]


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=20), st.integers(1, 40))
def test_a_row_depends_on_its_id_alone(ids: list[int], size: int) -> None:
    rows = np.array(ids, dtype=np.uint64)
    for draw in (uniform, normal):
        together = draw(KEY, rows, size)
        alone = np.concatenate([draw(KEY, rows[i : i + 1], size) for i in range(len(ids))])
        np.testing.assert_array_equal(together, alone)
        assert together.shape == (len(ids), size)
        assert together.dtype == np.float32


def test_the_numbers_never_change() -> None:
    """Runs resume, and static binarization is reproduced, across versions: these are fixed for
    good.
    """
    assert bits((1, 2), np.array([5, 6]), 2).tolist() == EXPECTED_BITS
    assert permutation((1, 2), 8).tolist() == EXPECTED_PERMUTATION
    np.testing.assert_allclose(normal((1, 2), np.array([5]), 3)[0], EXPECTED_NORMAL, rtol=1e-6)


def test_uniform_has_the_moments_of_the_uniform() -> None:
    u = uniform(KEY, np.arange(2000), 500).astype(np.float64)  # 10^6 numbers
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / u.size)
    counts = np.bincount((u * 256).astype(int).ravel(), minlength=256)
    assert ((counts - u.size / 256) ** 2 / (u.size / 256)).sum() < 255 + 5 * np.sqrt(2 * 255)
    np.testing.assert_array_equal(u * 2**24, np.round(u * 2**24))


def test_normal_has_the_moments_of_the_normal() -> None:
    z = normal(KEY, np.arange(2000), 501).astype(np.float64)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * np.sqrt(variance / z.size)
    assert np.abs(z).max() < 8.6


@pytest.mark.parametrize("first_id", [0, 2**40])
def test_rows_columns_and_keys_are_uncorrelated(first_id: int) -> None:
    ids = first_id + np.arange(400)
    u = uniform(KEY, ids, 784).astype(np.float64) - 0.5
    bound = 5 / np.sqrt(u.size) / 12
    assert abs((u[1:] * u[:-1]).mean()) < bound
    assert abs((u[:, 1:] * u[:, :-1]).mean()) < bound
    assert abs((u[1:, :-1] * u[:-1, 1:]).mean()) < bound
    for other in ((3, 8), (4, 7), (7, 3), (3, 7, 0), (3,), (-3, 7)):
        assert abs((u * (uniform(other, ids, 784) - 0.5)).mean()) < bound, other


def test_every_bit_is_even() -> None:
    drawn = bits(KEY, np.arange(1000), 100)
    ones = np.array([(drawn >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(drawn.size)


def test_no_two_rows_share_a_number() -> None:
    drawn = bits(
        KEY, np.arange(100_000), 10
    )  # 10^6 of 2^64 numbers: one pair in common would be a 1 in 37 million event
    assert len(np.unique(drawn)) == drawn.size


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_a_permutation_is_one(size: int, seed: int) -> None:
    assert sorted(permutation((seed,), size)) == list(range(size))


def test_every_permutation_is_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(permutation((seed,), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 23 + 5 * np.sqrt(46)


def test_below_covers_its_range_evenly() -> None:
    counts = np.bincount([below((seed,), 7) for seed in range(7000)], minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 6 + 5 * np.sqrt(12)


def test_it_is_fast() -> None:
    ids = np.arange(16)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        uniform(KEY, ids, 784)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3  # seconds, for a batch of 16 MNIST images
