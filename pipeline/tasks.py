"""Calls that Ray tasks share, or that this process makes alone, without importing Ray."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any


def here_or_in_tasks(
    function: Callable[..., Any],
    shared: Sequence[Any],
    calls: Iterable[tuple[Any, ...]],
    connect: Callable[[], None] | None,
    use_gpu: bool = False,
) -> Iterator[Any]:
    """Call ``function(*shared, *call)`` for each of ``calls``, and yield the results.

    In Ray tasks, see ``cluster.in_tasks``. ``connect`` connects to Ray; if it is None, the calls
    are made in this process, one after the other.
    """
    if connect is None:
        yield from itertools.starmap(partial(function, *shared), calls)
        return
    from pipeline.cluster import in_tasks

    connect()
    yield from in_tasks(function, calls, use_gpu, shared)
