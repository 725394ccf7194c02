"""The nearest of many vectors, exactly, and how well being near predicts the class.

Distances are compared in blocks of one matrix product each, in memory that does not grow with the
number of pairs. One core compares 2 * 10^8 pairs of 32 latents a second or more: all pairs of 10^5
vectors, or ten thousand with a million, take less than a minute. An approximate index would save
that minute and cost a dependency and the exactness.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.moments import Moments
from pipeline.values import JsonObject

QUERIES, ITEMS = 128, 1 << 14
"""Vectors of a block: their distances take 8 MB."""
GROUP = 64
"""Distances of which only the smallest is looked at first."""
SPARE = 16
"""How many more vectors than wanted are compared in float64, since float32 may order them wrongly.
"""
SCORED = 1000
"""Queries whose whole ranking is computed for the mean average precision, the first ones."""
RECALLS = (1, 10)
"""The k of recall@k."""


def nearest(
    queries: Tensor, items: Tensor, k: int, own: Tensor | None = None, threads: int = 1
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k nearest items of each query by Euclidean distance, block by block of queries.

    queries: (num_queries, size). items: (num_items, size), of any real dtype. own: (num_queries,),
    the number of the item that is the query itself and is left out, -1 for none. Yields the first
    query's number, the distances, (block, k) in float64, and the items' numbers, (block, k), the
    nearest first, equal distances in the order of the items; k is at most the number of items that
    are left. ``threads`` blocks are compared at once.

    Distances are exact. Which items are nearest is, too, unless more than ``SPARE`` others are at
    a distance that float32 does not tell from the k-th.
    """
    k = min(k, len(items) - (own is not None and bool((own >= 0).any())))
    center = items[:ITEMS].float().mean(0)

    def search(start: int) -> tuple[int, Tensor, Tensor]:
        part = queries[start : start + QUERIES]
        found, numbers = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long)
        left_out = None if own is None else own[start : start + QUERIES]
        for first, squares in _squares(part.float() - center, items, center):
            _leave_out(squares, left_out, first)
            squares, places = _smallest(squares, min(k + SPARE, squares.shape[1]))
            found, numbers = torch.cat([found, squares], 1), torch.cat([numbers, places + first], 1)
            found, places = found.topk(min(k + SPARE, found.shape[1]), largest=False)
            numbers = numbers.gather(1, places)
        numbers = numbers.sort()[0]
        exact = (items[numbers].double() - part[:, None].double()).square().sum(-1).sqrt()
        if left_out is not None:
            exact = exact.masked_fill(numbers == left_out[:, None], torch.inf)
        exact, places = exact.sort(stable=True)
        return start, exact[:, :k], numbers.gather(1, places)[:, :k]

    with ThreadPoolExecutor(threads) as pool:
        # Not all at once: results that nobody has taken yet stay in memory.
        starts = range(0, len(queries), QUERIES)
        for group in range(0, len(starts), 4 * threads):
            yield from pool.map(search, starts[group : group + 4 * threads])


def scores(
    queries: Tensor, labels: Tensor, items: Tensor, item_labels: Tensor, own: Tensor | None
) -> JsonObject:
    """How well the order of the items by their distance finds those of the query's class.

    ``recall_at_k``: the share of queries with one of their class among the k nearest.
    ``mean_average_precision``: the mean over queries of the mean, over the items of their class, of
    the share of that class among the items up to there. Both have standard errors over the queries.
    Only the first ``SCORED`` labelled queries of classes that other items have are used.

    Shapes as for ``nearest``; labels: (num_queries,) and (num_items,), -1 where there is none.
    """
    moments, center = Moments(), items[:ITEMS].float().mean(0)
    chosen = (labels >= 0).nonzero()[:SCORED, 0]
    for numbers in chosen.split(16):
        blocks = _squares(queries[numbers].float() - center, items, center)
        squares = torch.cat([block for _, block in blocks], 1)
        if own is not None:
            _leave_out(squares, own[numbers], 0)
        order = squares.argsort(1)[:, : len(items) - (own is not None)]
        same = item_labels[order] == labels[numbers, None]
        same = same[same.any(1)].double()
        if len(same):
            shares = same.cumsum(1) / torch.arange(1, same.shape[1] + 1)
            average = (shares * same).sum(1) / same.sum(1)
            recalls = {f"recall_at_{k}": same[:, :k].amax(1) for k in RECALLS}
            moments.add({**recalls, "mean_average_precision": average})
    figures: JsonObject = (
        {"num_images": moments.count("mean_average_precision")} if moments.sums else {}
    )
    for name in moments.sums:
        figures |= moments.measured(name).to_json(name)
    return figures


def _squares(queries: Tensor, items: Tensor, center: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Squared distances of centred queries to the items, block by block of items, in float32.

    Centering keeps the differences of large numbers small. Yields the first item's number and
    (num_queries, block).
    """
    lengths = queries.square().sum(1, keepdim=True)
    for first in range(0, len(items), ITEMS):
        block = items[first : first + ITEMS].float() - center
        yield first, torch.addmm(lengths + block.square().sum(1), queries, block.T, alpha=-2)


def _smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest values of each row, and their columns: both (rows, k).

    They are in the k groups with the smallest minima, which leaves few to be sorted.
    """
    if values.shape[1] <= 2 * k * GROUP:
        smallest = values.topk(k, largest=False)
        return smallest.values, smallest.indices
    fill = -values.shape[1] % GROUP
    groups = (F.pad(values, (0, fill), value=torch.inf) if fill else values).unflatten(
        1, (-1, GROUP)
    )
    near = groups.amin(2).topk(k, largest=False).indices
    kept = groups.gather(1, near[..., None].expand(-1, -1, GROUP)).flatten(1)
    smallest = kept.topk(k, largest=False)
    group, place = smallest.indices // GROUP, smallest.indices % GROUP
    return smallest.values, near.gather(1, group) * GROUP + place


def _leave_out(squares: Tensor, own: Tensor | None, first: int) -> None:
    """Put each query itself, if it is among the items from number ``first``, at the far end."""
    if own is not None:
        rows = ((own >= first) & (own < first + squares.shape[1])).nonzero()[:, 0]
        squares[rows, own[rows] - first] = torch.inf
