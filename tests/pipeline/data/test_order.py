"""The order of training is a permutation, the same for all world sizes and from any step."""

import doctest
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import order
from pipeline.data.order import Circle, Order, even_part, in_manifest_order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    num_streams = draw(st.sampled_from([1, 2, 4, 8]))
    global_batch = num_streams * draw(st.integers(1, 5))
    sizes = draw(
        st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(
            lambda sizes: sum(sizes) >= global_batch
        )
    )
    return Order(
        tuple(sizes),
        draw(st.integers(0, 100)),
        global_batch,
        num_streams,
        group_samples=draw(st.integers(1, 60)),
    )


def spread(segments: np.ndarray) -> list[tuple[int, int]]:
    """Segments as a list of (shard, sample)."""
    return [
        (shard, sample) for shard, start, stop in segments.tolist() for sample in range(start, stop)
    ]


def stream_samples(order: Order, epoch: int, stream: int) -> list[tuple[int, int]]:
    """The samples of one stream in the order of their use."""
    circle, used = order.circle(epoch), []
    for index in range(-(-order.stream_length // order.group_length)):
        group = order.group(epoch, circle, stream, index)
        samples = spread(group.segments)
        assert len(samples) == len(group.permutation) <= order.group_length
        used += [samples[place] for place in group.permutation]
    return used


def batches(order: Order, epoch: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    """What one rank reads at each step of an epoch."""
    streams = range(
        rank * order.num_streams // world_size, (rank + 1) * order.num_streams // world_size
    )
    used = [stream_samples(order, epoch, stream) for stream in streams]
    part = order.stream_batch
    return [
        [s for stream in used for s in stream[step * part : (step + 1) * part]]
        for step in range(order.steps_per_epoch)
    ]


@settings(deadline=None)
@given(orders(), st.integers(0, 5))
def test_an_epoch_sees_every_sample_once_but_for_the_tail(order: Order, epoch: int) -> None:
    used = [sample for batch in batches(order, epoch, 0, 1) for sample in batch]
    assert (
        len(used) == len(set(used)) == order.num_samples // order.global_batch * order.global_batch
    )
    assert set(used) <= {
        (shard, sample) for shard, size in enumerate(order.sizes) for sample in range(size)
    }


@settings(deadline=None)
@given(orders(), st.integers(0, 5))
def test_a_global_batch_is_the_same_for_every_number_of_ranks(order: Order, epoch: int) -> None:
    alone = batches(order, epoch, 0, 1)
    for world_size in (2, 4, 8):
        if order.num_streams % world_size == 0:
            ranks = [batches(order, epoch, rank, world_size) for rank in range(world_size)]
            assert [
                [s for part in parts for s in part] for parts in zip(*ranks, strict=True)
            ] == alone


@settings(deadline=None)
@given(orders())
def test_groups_are_bounded_and_hold_whole_batches(order: Order) -> None:
    assert order.group_length % order.stream_batch == 0
    assert order.group_length <= max(order.group_samples, order.stream_batch)


@settings(deadline=None)
@given(orders(), st.data())
def test_any_part_of_the_circle_is_that_part_of_the_whole(
    order: Order, data: st.DataObject
) -> None:
    circle = order.circle(epoch=1)
    whole = spread(circle.segments(0, order.num_samples))
    assert sorted(whole) == [
        (shard, sample) for shard, size in enumerate(order.sizes) for sample in range(size)
    ]
    start = data.draw(st.integers(0, order.num_samples))
    stop = data.draw(st.integers(start, order.num_samples))
    assert spread(circle.segments(start, stop)) == whole[start:stop]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def used(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
        return tuple(stream_samples(Order((50, 60, 70), seed, 12, 4, 1000), epoch, 1))

    assert used(0, 0) == used(0, 0)
    assert len({used(0, 0), used(0, 1), used(1, 0), used(1, 1)}) == 4


def test_every_sample_is_equally_likely_to_be_left_out() -> None:
    left_out: Counter[tuple[int, int]] = Counter()
    everything = {(shard, sample) for shard, size in enumerate((3, 5, 2)) for sample in range(size)}
    epochs = 3000
    order = Order(
        (3, 5, 2), seed=0, global_batch=4, num_streams=2, group_samples=100
    )  # 2 of 10 are left out
    for epoch in range(epochs):
        circle = order.circle(epoch)
        left_out.update(everything - set(spread(circle.segments(0, 8))))
    expected = epochs * 2 / 10
    assert set(left_out) == everything
    assert sum((count - expected) ** 2 / expected for count in left_out.values()) < 9 + 5 * np.sqrt(
        18
    )


def test_the_worked_example_holds() -> None:
    results = doctest.testmod(order)
    assert results.attempted >= 8
    assert results.failed == 0


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 16 is more than all 10 samples"):
        Order((4, 6), 0, 16, 4, 100)
    with pytest.raises(ValueError, match="a global batch of 6 cannot be shared by 4 streams"):
        Order((4, 6), 0, 6, 4, 100)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50))
def test_evaluation_sees_everything_once_over_any_number_of_ranks(
    num_samples: int, world_size: int
) -> None:
    shares = [even_part(num_samples, rank, world_size) for rank in range(world_size)]
    assert [position for start, stop in shares for position in range(start, stop)] == list(
        range(num_samples)
    )
    assert (
        max(stop - start for start, stop in shares) - min(stop - start for start, stop in shares)
        <= 1
    )


def test_evaluation_goes_in_the_order_of_the_manifest() -> None:
    circle = in_manifest_order((2, 0, 3))
    assert isinstance(circle, Circle)
    assert circle.segments(0, 5).tolist() == [[0, 0, 2], [2, 0, 3]]
    assert circle.segments(1, 3).tolist() == [[0, 1, 2], [2, 0, 1]]
