"""Work in a background thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

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
