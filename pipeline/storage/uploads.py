"""Writes in the background of training, retried while the storage is unavailable."""

import itertools
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from pipeline.storage import resume
from pipeline.storage.base import Unavailable

MAX_OUTAGE = 600.0
"""Seconds for which the storage may be unavailable before a run fails."""
MAX_PAUSE = 15.0
"""Most seconds between two attempts."""
GRACE = 20.0
"""Seconds for which pending writes may continue after an error."""

Result = TypeVar("Result")


def retry(work: Callable[[], Result]) -> Result:
    """The result of ``work``, which is retried while the storage is unavailable.

    Raises Unavailable after MAX_OUTAGE seconds of failures; any other error of ``work`` is raised
    at once.
    """
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return work()
        except Unavailable as error:
            if time.monotonic() - started > MAX_OUTAGE:
                raise Unavailable(f"{error}; retried for {MAX_OUTAGE / 60:.0f} minutes") from error
            resume.wait(error, min(MAX_PAUSE, 0.5 * 2**attempt))
    raise AssertionError("unreachable")


class UploadQueue:
    """Writes that a background thread makes one after the other, each with ``retry``.

    A context manager. Leaving the block waits for all writes. If an exception leaves it, pending
    writes have GRACE seconds, and the rest is dropped.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, Callable[[], None]] = {}
        self._running: str | None = None
        self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def submit(self, name: str, work: Callable[[], None]) -> None:
        """Add a write at the end of the queue.

        It replaces a waiting write of the same name. Raises the error of an earlier write that
        failed.
        """
        with self._changed:
            self._raise()
            self._waiting[name] = work
            self._changed.notify_all()

    def is_pending(self, name: str) -> bool:
        """Whether a write of this name is waiting or in progress."""
        with self._changed:
            return name in self._waiting or name == self._running

    def join(self) -> None:
        """Wait for all writes. Raises the error of one that failed."""
        with self._changed:
            self._changed.wait_for(self._is_idle)
            self._raise()

    def _is_idle(self) -> bool:
        return bool(self._error) or not (self._waiting or self._running)

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = next(iter(self._waiting))
                work = self._waiting.pop(self._running)
            try:
                retry(work)
            except Exception as error:  # noqa: BLE001  (raised in the thread that submits or joins)
                self._error = error
            with self._changed:
                self._running = None
                if self._error:
                    self._waiting.clear()
                self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.join()
        finally:
            with self._changed:
                self._changed.wait_for(self._is_idle, GRACE)
                self._closed = True
                self._waiting.clear()
                self._changed.notify_all()
