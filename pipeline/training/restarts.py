"""Restart a run on Ray after failures, and stop one on request."""

import signal
import threading
import time
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback

from pipeline.errors import UserError
from pipeline.storage.base import Storage, Unavailable
from pipeline.training import checkpoint


class Restarts(UserCallback):
    """Decides whether a run is restarted after a failure.

    A user's mistake ends the run at once, since a restart would not correct it. So does a failure
    after ``cluster.max_failures`` restarts in a row that led to no new checkpoint. To end the run,
    ``after_exception`` raises: it runs in Ray Train's controller, whose own errors are not retried.
    """

    def __init__(self, run: str, storage: Storage, most: int) -> None:
        self.run, self.storage, self.most = run, storage, most
        self.failures, self.step = 0, -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # Ray Train's wrapper keeps a worker's own exception in this attribute.
        causes = [
            getattr(exception, "_base_exc", exception) for exception in worker_exceptions.values()
        ]
        for cause in causes:
            if isinstance(cause, UserError) and not isinstance(cause, Unavailable):
                raise cause
        step = self.newest_step()
        self.failures = 1 if step > self.step else self.failures + 1
        self.step = max(step, self.step)
        if self.failures > self.most:
            last = (str(causes[0]).strip().splitlines() or [type(causes[0]).__name__])[-1]
            raise UserError(
                f"run {self.run} failed {self.failures} times in a row without getting beyond step"
                f" {self.step}; the last error: {last}"
            )
        time.sleep(self.pause(self.failures))

    def newest_step(self) -> int:
        try:
            return checkpoint.newest_step(self.storage)
        except Unavailable:
            return self.step

    @staticmethod
    def pause(failures: int) -> float:
        """Seconds to wait before the next attempt, after ``failures`` in a row."""
        return 0.0 if failures == 1 else min(60.0, 5.0 * 2 ** (failures - 2))


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
