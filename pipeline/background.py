"""Work in background threads."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Start ``work`` in a new thread, called ``name``; returns the future of its result.

    Whatever ``work`` raises, including StopIteration and KeyboardInterrupt, is raised by the
    future's ``result``. The thread is a daemon: unlike the threads of an executor, it does not keep
    the interpreter from ending while ``work`` hangs.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised in the thread that needs the result)
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def in_parallel(
    function: Callable[[Item], Any], items: Iterable[Item], num_threads: int, name: str
) -> None:
    """Call ``function`` on every item from several threads.

    The first error is raised when all threads have stopped. They are daemons: a read that hangs
    does not keep the interpreter alive.
    """
    if num_threads < 2:
        for item in items:
            function(item)
        return
    remaining, errors, turn = iter(items), list[BaseException](), threading.Lock()

    def work() -> None:
        while not errors:
            try:
                with turn:
                    item = next(remaining, done)
                if item is done:
                    return
                function(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001  (it belongs to the caller)
                errors.append(error)

    done = object()
    threads = [threading.Thread(target=work, name=name, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in the background while the previous one is in use.

    An error in making an item is raised where the item would have come. Each thread makes one item
    and ends, so a consumer that stops early leaves at most one thread running.
    """
    make = partial(start, partial(next, items), "loader")
    future = make()
    while True:
        try:
            item = future.result()
        except StopIteration:
            return
        future = make()
        yield item
