"""Writing to storage in the background of training, and with patience: storage may be away for a
while.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from pipeline.storage.base import Unavailable

logger = logging.getLogger(__name__)

PATIENCE = 600.0
"""Seconds for which storage may be away before a run ends."""
LONGEST_PAUSE = 15.0
"""Seconds between two attempts."""
GRACE = 20.0
"""Seconds."""

Result = TypeVar("Result")


def patiently(work: Callable[[], Result], failed: Callable[[], None] = lambda: None) -> Result:
    """The result of ``work``, tried again for as long as PATIENCE while storage is away; ``failed``
    is called at each failure.

    Raises Unavailable if it stays away, and at once whatever else ``work`` raises.
    """
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return work()
        except Unavailable as error:
            failed()
            if time.monotonic() - started > PATIENCE:
                raise Unavailable(
                    f"{error}; this went on for {PATIENCE / 60:.0f} minutes"
                ) from error
            pause = min(LONGEST_PAUSE, 0.5 * 2**attempt)
            logger.warning("%s; trying again in %.1f s", error, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


class Uploads:
    """Work for storage, done one after the other in a thread of its own, each ``patiently``. A
    context manager.

    Leaving the block waits for all of it; an exception that leaves it gives it GRACE seconds, and
    drops the rest.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, Callable[[], None]] = {}
        self._running: str | None = None
        self._closed = False
        self._error: Exception | None = None
        self.failures = 0
        """How many attempts at writing have failed so far."""
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def put(self, name: str, work: Callable[[], None]) -> None:
        """Have ``work`` done after what waits already; it takes the place of work of the same name
        that has not begun.

        Raises what earlier work has failed with.
        """
        with self._changed:
            self._raise()
            self._waiting[name] = work
            self._changed.notify_all()

    def is_busy(self, name: str) -> bool:
        """Whether work of this name is waiting or being done."""
        with self._changed:
            return name in self._waiting or name == self._running

    def wait(self) -> None:
        """Return when all is done. Raises what any of it has failed with."""
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
                patiently(work, self._failed)
            except Exception as error:  # noqa: BLE001  (it belongs to whoever waits for the work)
                self._error = error
            with self._changed:
                self._running = None
                if self._error:
                    self._waiting.clear()
                self._changed.notify_all()

    def _failed(self) -> None:
        self.failures += 1

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
                self.wait()
        finally:
            with self._changed:
                self._changed.wait_for(self._is_idle, GRACE)
                self._closed = True
                self._waiting.clear()
                self._changed.notify_all()
