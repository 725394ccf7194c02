"""Find workers that are alive but do nothing, so that their run is restarted.

Ray reports a worker whose process ends. A worker may also live and be stuck: its loader never
returns, a device does not answer, a collective waits for a rank that will not come. ``StepWatch``
finds that from inside the process. A process that does not run at all (SIGSTOP, a frozen machine)
can only be found from outside: Ray Train polls its workers, and for the trials of a search, which
Ray Tune does not poll, ``heartbeat`` sends signs of life, which ``Heartbeats`` reads.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from pipeline import background

HEARTBEAT_SECONDS = 2.0
"""Seconds between two signs of life of a trial's process."""
FIRST_HEARTBEAT_SECONDS = 120.0
"""Seconds in which a new process, which imports PyTorch first, must give its first sign."""
SETTLE_SECONDS = 3.0
"""Seconds for which a stuck rank waits before it ends, so that the others notice and report too."""
PROJECT = Path(__file__).parents[2]
"""The folder that holds the packages ``pipeline`` and ``vlae``."""


@dataclass(frozen=True)
class Stuck:
    """A rank that has begun no step for too long, and where its code is."""

    rank: int
    step: int
    """The step that it began last."""
    seconds: float
    where: str
    process: str


class StepWatch:
    """Ends this process if its training begins no step for ``seconds``. A context manager.

    Before that, the stacks of all threads go to stderr, which is the worker's log in Ray, and a
    ``Stuck`` goes to the cluster, where ``take_stuck`` finds it. Time in which this process did not
    run at all is not counted.
    """

    def __init__(self, run: str, rank: int, seconds: float) -> None:
        self.run, self.rank, self.seconds = run, rank, seconds
        self._pause = min(1.0, seconds / 10)
        self._began: tuple[int, int] | None = None
        self._changes = 0
        self._closed = threading.Event()

    def begin(self, step: int | None) -> None:
        """Note that the calling thread begins ``step``; None suspends the watch until the next."""
        self._changes += 1
        self._began = None if step is None else (step, threading.get_ident())

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="step watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()

    def _watch(self) -> None:
        changes, pauses = self._changes, 0
        while not self._closed.wait(self._pause):
            began = self._began
            pauses = pauses + 1 if self._changes == changes and began else 0
            changes = self._changes
            if began and pauses * self._pause >= self.seconds:
                step, thread = began
                frame = sys._current_frames().get(thread)
                process = f"process {os.getpid()} on {socket.gethostname()}"
                self._end(Stuck(self.rank, step, self.seconds, _place(frame), process))

    def _end(self, stuck: Stuck) -> None:
        print(f"run {self.run}: {_sentence([stuck])}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        record = json.dumps(asdict(stuck)).encode()
        with suppress(Exception):  # the cluster may be what does not answer
            background.start(
                lambda: _put(f"{_stuck_prefix(self.run)}{self.rank}", record), "stuck"
            ).result(SETTLE_SECONDS)
        time.sleep(SETTLE_SECONDS)
        os._exit(1)


def _place(frame: FrameType | None) -> str:
    """The innermost line of this project in a stack, such as ``pipeline/runs.py:12 in rows``.

    Lines that wait for a background thread say nothing; the line that needs its result is given.
    """
    while frame:
        path = Path(frame.f_code.co_filename)
        is_ours = any(path.is_relative_to(PROJECT / package) for package in ("pipeline", "vlae"))
        if is_ours and path != Path(background.__file__):
            return f"{path.relative_to(PROJECT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "an unknown line"


def take_stuck(run: str) -> str | None:
    """A sentence about the ranks that this driver's ``run`` was stuck on; None if it was not.

    The record is removed, so that the next restart does not find it again.
    """
    found = []
    for key in _internal_kv_list(_stuck_prefix(run), namespace=b"vlae"):
        record = _internal_kv_get(key, namespace=b"vlae")
        _internal_kv_del(key, namespace=b"vlae")
        if record is not None:
            found.append(Stuck(**json.loads(record)))
    return _sentence(found) if found else None


def _sentence(found: list[Stuck]) -> str:
    """Name the ranks that hold the others up: those that began the fewest steps."""
    first = min(each.step for each in found)
    behind = sorted((each for each in found if each.step == first), key=lambda each: each.rank)
    named = "; ".join(f"rank {each.rank} ({each.process}) at {each.where}" for each in behind[:4])
    more = f"; and {len(behind) - 4} more ranks" if len(behind) > 4 else ""
    return f"no step after step {first} for {behind[0].seconds:g} s: {named}{more}"


@contextmanager
def heartbeat(run: str) -> Iterator[None]:
    """Send a sign of life for ``run`` every HEARTBEAT_SECONDS, for the length of a block."""
    closed = threading.Event()

    def beat() -> None:
        while True:
            sign = f"{os.getpid()} {time.monotonic_ns()}".encode()
            with suppress(Exception):  # the head may be busy; the next beat counts as well
                _put(_heartbeat_key(run), sign)
            if closed.wait(HEARTBEAT_SECONDS):
                return

    background.start(beat, "heartbeat")
    try:
        yield
    finally:
        closed.set()


class Heartbeats:
    """Tells which trials' processes have given no sign of life for ``limit`` seconds.

    Only this process's clock is read, so that clocks of other hosts do not matter.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._seen: dict[str, tuple[bytes | None, float, float]] = {}

    def expect(self, run: str) -> None:
        """Expect the first sign of life of a process that has just been started for ``run``."""
        first = max(self.limit, FIRST_HEARTBEAT_SECONDS)
        self._seen[run] = (self._read(run), time.monotonic(), first)

    def is_lost(self, run: str) -> bool:
        """Whether the process for an expected ``run`` has been silent for too long."""
        before, since, limit = self._seen[run]
        sign = self._read(run)
        if sign != before:
            self._seen[run] = (sign, time.monotonic(), self.limit)
            return False
        return time.monotonic() - since > limit

    def _read(self, run: str) -> bytes | None:
        try:
            return _internal_kv_get(_heartbeat_key(run), namespace=b"vlae")
        except Exception:  # noqa: BLE001  (the head may be busy)
            return self._seen[run][0] if run in self._seen else None


def _put(key: str, value: bytes) -> None:
    _internal_kv_put(key.encode(), value, namespace=b"vlae")


def _stuck_prefix(run: str) -> str:
    return f"stuck-{ray.get_runtime_context().get_job_id()}/{run}/"


def _heartbeat_key(run: str) -> str:
    return f"alive-{ray.get_runtime_context().get_job_id()}/{run}"
