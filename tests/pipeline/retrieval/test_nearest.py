"""The blocked search finds what a loop over all pairs finds, and scores are their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.retrieval import nearest as module
from pipeline.retrieval.duplicates import _near
from pipeline.retrieval.nearest import nearest, scores


def vectors(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def found(
    queries: Tensor, items: Tensor, k: int, own: Tensor | None = None, threads: int = 1
) -> tuple[Tensor, Tensor]:
    starts, distances, numbers = zip(*nearest(queries, items, k, own, threads), strict=True)
    assert list(starts) == sorted(starts)
    return torch.cat(distances), torch.cat(numbers)


def naive(
    queries: Tensor, items: Tensor, k: int, own: Tensor | None
) -> list[list[tuple[float, int]]]:
    """For each query the k pairs (distance, number), by distance and then by number."""
    rows = []
    for place, query in enumerate(queries.double().numpy()):
        pairs = [
            (float(np.sqrt(((query - item) ** 2).sum())), number)
            for number, item in enumerate(items.double().numpy())
            if own is None or number != own[place]
        ]
        rows.append(sorted(pairs)[:k])
    return rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(2, 60),
    st.integers(1, 9),
    st.integers(1, 70),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_neighbours_are_those_of_a_loop_over_all_pairs(
    num_queries: int, num_items: int, size: int, k: int, within: bool, threads: int, seed: int
) -> None:
    items = vectors(num_items, size, seed)
    queries = items[:num_queries] if within else vectors(num_queries, size, seed + 1)
    own = torch.arange(len(queries)) if within else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERIES", 7)
        patch.setattr(module, "ITEMS", 16)
        patch.setattr(module, "SPARE", 3)
        patch.setattr(module, "GROUP", 2)
        distances, numbers = found(queries, items, k, own, threads)
    expected = naive(queries, items, k, own)
    assert numbers.tolist() == [[number for _, number in row] for row in expected]
    np.testing.assert_allclose(
        distances, [[each for each, _ in row] for row in expected], rtol=1e-12
    )


def test_equal_distances_are_in_the_order_of_the_items_and_the_query_itself_is_left_out() -> None:
    items = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0], [-1, 0], [0, 0]])
    distances, numbers = found(items, items, 4, torch.arange(6))
    assert numbers[1].tolist() == [3, 5, 0, 2]
    assert distances[1].tolist() == [0, 0, 1, 1]
    assert numbers[3].tolist() == [1, 5, 0, 2]
    assert not (numbers == torch.arange(6)[:, None]).any()


def test_small_differences_of_large_vectors_are_not_lost() -> None:
    items = (1e4 + 0.01 * vectors(200, 8, 0)).double()
    distances, numbers = found(items, items, 5, torch.arange(200))
    expected = naive(items, items, 5, torch.arange(200))
    assert numbers.tolist() == [[number for _, number in row] for row in expected]
    assert float(distances.max()) < 0.1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.booleans(), st.integers(0, 99))
def test_scores_are_their_definitions(count: int, within: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items, item_labels = (
        vectors(count, 3, seed),
        torch.randint(-1, 3, (count,), generator=generator),
    )
    queries, labels, own = items, item_labels, torch.arange(count)
    if not within:
        queries, labels = vectors(9, 3, seed + 1), torch.randint(-1, 4, (9,), generator=generator)
    used = own if within else None
    recalls: dict[int, list[float]] = {1: [], 10: []}
    averages = []
    for query, row in enumerate(naive(queries, items, count, used)):
        same = [bool(item_labels[number] == labels[query]) for _, number in row]
        if labels[query] < 0 or not any(same):
            continue
        for k, values in recalls.items():
            values.append(any(same[:k]))
        ranks = [rank for rank, each in enumerate(same, 1) if each]
        averages.append(np.mean([place / rank for place, rank in enumerate(ranks, 1)]))
    figures = scores(queries, labels, items, item_labels, used)
    if not averages:
        assert figures == {}
        return
    assert figures["num_images"] == len(averages)
    assert figures["mean_average_precision"] == pytest.approx(np.mean(averages))
    for k, values in recalls.items():
        assert figures[f"recall_at_{k}"] == pytest.approx(np.mean(values))
    if len(averages) > 1:
        error = np.std(averages, ddof=1) / len(averages) ** 0.5
        assert figures["mean_average_precision_se"] == pytest.approx(error, abs=1e-9)


def test_copies_with_small_changes_are_found_and_similar_images_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    # Images of few shapes, so that all have close neighbours.
    shapes = 255 * torch.rand(6, 144, generator=generator)
    weights = torch.rand(300, 6, generator=generator)
    images = (weights / weights.sum(1, keepdim=True)) @ shapes
    copies = images[:20] + torch.randn(20, 144, generator=generator)
    pixels = torch.cat([images, copies]).clamp(0, 255).round().to(torch.uint8)
    codes = pixels.float() @ torch.randn(144, 8, generator=generator) / 144
    pairs = {(one, other) for one, other, _ in _near(codes, pixels, 1)}
    planted = {(number, 300 + number) for number in range(20)}
    assert planted <= pairs
    assert len(pairs - planted) <= 11  # of 51,020; so few shapes make some images alike
