"""Restart a run on Ray after failures, and stop one on request."""

import logging
import os
import re
import signal
import threading
import time
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from functools import partial
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    WorkerCallback,
    WorkerGroupCallback,
)

from pipeline import background
from pipeline.cluster import HEALTH_CHECK_TIMEOUT
from pipeline.errors import UserError, last_line
from pipeline.runs import RESTARTS, Run
from pipeline.storage.base import Storage, Unavailable
from pipeline.storage.uploads import GRACE, retry
from pipeline.training import checkpoint
from pipeline.training.watch import take_stuck
from pipeline.values import JsonObject

logger = logging.getLogger(__name__)

_writing = threading.Lock()
"""Held while a run's list of restarts is written."""


class Restarts(UserCallback):
    """Decides whether a run is restarted after a failure.

    A user's mistake ends the run at once, since a restart would not correct it. So does a failure
    after ``cluster.max_failures`` restarts in a row that led to no new checkpoint. To end the run,
    ``after_exception`` raises: it runs in Ray Train's controller, whose own errors are not retried.
    """

    def __init__(self, run: str, storage: Storage, most: int) -> None:
        self.run, self.storage, self.most = run, storage, most
        self.failures, self.step = 0, -1
        self.unwritten = list[JsonObject]()
        self.writing: Future[None] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # Ray Train's wrapper keeps a worker's own exception in this attribute.
        causes = {
            rank: getattr(exception, "_base_exc", exception)
            for rank, exception in worker_exceptions.items()
        }
        for cause in causes.values():
            if isinstance(cause, UserError) and not isinstance(cause, Unavailable):
                raise cause
        stuck = take_stuck(self.run) if ray.is_initialized() else None
        reason = stuck or explain(*next(iter(causes.items())))
        step = self.newest_step()
        self.failures = 1 if step > self.step else self.failures + 1
        self.step = max(step, self.step)
        if self.failures > self.most:
            raise UserError(
                f"run {self.run} failed {self.failures} times in a row without getting beyond step"
                f" {self.step}; the last error: {reason}"
            )
        self.record(reason)
        time.sleep(self.pause(self.failures))

    def record(self, reason: str) -> None:
        """Add a restart to the run's list, for the command and its user.

        The list is written in the background, since a restart must not wait for the storage.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.unwritten.append({"time": now, "step": max(0, self.step), "reason": reason})
        self.writing = background.start(partial(retry, self._write), "restart record")

    def _write(self) -> None:
        with _writing:
            new = list(self.unwritten)
            if not new:
                return  # the thread of an earlier restart has written it
            known = Run(self.storage).restarts()
            # Some may be there, written by an attempt that was not answered.
            self.storage.write_json(
                RESTARTS, known + [restart for restart in new if restart not in known]
            )
            del self.unwritten[: len(new)]

    def wait_until_written(self) -> None:
        """Wait until the list is written, or the storage has been away for GRACE seconds."""
        if self.writing:
            for done in wait([self.writing], GRACE).done:
                if error := done.exception():
                    logger.warning("restarts of run %s are not recorded: %s", self.run, error)
            self.writing = None

    def newest_step(self) -> int:
        try:
            return checkpoint.newest_step(self.storage)
        except Unavailable:
            return self.step

    @staticmethod
    def pause(failures: int) -> float:
        """Seconds to wait before the next attempt, after ``failures`` in a row."""
        return 0.0 if failures == 1 else min(60.0, 5.0 * 2 ** (failures - 2))


class StartWatch(WorkerGroupCallback, ControllerCallback):
    """Kills the workers of a group that is not ready after ``seconds``; Ray Train starts another.

    A worker that stops running while the group starts would be waited for without limit: Ray Train
    polls workers only once they train. And it forgets a group that fails between the start of its
    workers and that of their training. That group's resources are freed here, before another one
    waits for them, of this controller or, if this one fails, of the next. This must be the first
    callback, to know a group at which others fail.
    """

    def __init__(self, restarts: Restarts, seconds: float) -> None:
        self.restarts, self.seconds = restarts, seconds
        self.ready: threading.Event | None = None
        self.group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._free():
            self.restarts.record("its workers were lost at their start")

    def after_controller_finish(self, result: Any) -> None:
        self._free()
        self.restarts.wait_until_written()

    def _free(self) -> bool:
        """Free what a forgotten group holds. Returns whether there was one."""
        forgotten = self.group is not None and self.group.has_started()
        if forgotten:
            self.group.abort()
        self.group = None
        return forgotten

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.group = worker_group

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self.ready = threading.Event()
        background.start(partial(self._watch, workers, self.ready), "start watch")
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        assert self.ready is not None
        self.ready.set()

    def _watch(self, workers: list[Any], ready: threading.Event) -> None:
        if not ready.wait(self.seconds):
            self.restarts.record(f"its workers were not ready to train after {self.seconds:g} s")
            for worker in workers:
                ray.kill(worker.actor)


def explain(rank: int, error: Exception) -> str:
    """Why a worker failed, in one line that names its rank."""
    found = dict(re.findall(r"(hostname|pid)=\W?([\w.-]+)", str(error)))
    worker = f"rank {rank} (process {found.get('pid', '?')} on {found.get('hostname', '?')})"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"{worker} has not answered for {os.environ[HEALTH_CHECK_TIMEOUT]} s"
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"{worker} died"
    return f"rank {rank}: {last_line(error)}"


terminated = threading.Event()
"""Set in a worker that received SIGTERM."""


class SaveAtTermination(WorkerCallback):
    """Makes a run save its state when one of its workers receives SIGTERM.

    A machine that is reclaimed sends it, for example. Signal handlers can only be set in the main
    thread, where this callback runs; the training function runs in another thread.
    """

    def after_init_train_context(self) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())


def ask_to_stop() -> None:
    """Ask all workers of this driver to save their run's state and stop."""
    _internal_kv_put(_stop_key(), b"", namespace=b"vlae")


def asked_to_stop() -> bool:
    """Whether this worker's driver has called ``ask_to_stop``."""
    return bool(_internal_kv_exists(_stop_key(), namespace=b"vlae"))


def _stop_key() -> bytes:
    return f"stop-{ray.get_runtime_context().get_job_id()}".encode()
