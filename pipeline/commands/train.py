"""``vlae train``: one model, distributed by Ray Train."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from tqdm import tqdm

from pipeline import runs
from pipeline.cluster import connect
from pipeline.commands import Command
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.errors import Interrupted
from pipeline.registry.tracking import Tracking, training_run
from pipeline.runs import RESULT, read_rows
from pipeline.storage.base import Unavailable
from pipeline.storage.uploads import patiently
from pipeline.training import checkpoint
from pipeline.training.launch import check, fit
from pipeline.training.restarts import (
    ask_to_stop,
)
from pipeline.values import JsonObject

STOP_SECONDS = 60.0
"""How long a command that was told to stop waits for its workers to save the run's state."""


def run(config: TrainConfig) -> JsonObject:
    """Train to the end, or go on where the same command was interrupted. Returns the run's result.

    A finished run is not trained again. Raises UserError before any compute if the data set is
    missing or does not fit the model, and Interrupted if a signal, SIGTERM or Ctrl-C, ended it,
    after its state was saved.
    """
    check(config)
    storage = runs.run_storage(config)
    with Tracking(config.registry) as tracking:
        tracking.follow(
            training_run(storage, to_dict(config), storage.read_json("identity.json")["manifest"])
        )
        if storage.exists(RESULT):
            return {**storage.read_json(RESULT), "reused": True}
        connect(config.cluster, config.storage)
        with progress(config):
            stopped_by = fit_until_told_to_stop(config)
        if stopped_by:
            raise Interrupted(
                f"run {config.run_name} is stopped, its state saved after step"
                f" {patiently(partial(checkpoint.newest_step, storage))} of"
                f" {config.train.num_steps}; the same command goes on from there",
                stopped_by,
            )
        return {**patiently(partial(storage.read_json, RESULT)), "reused": False}


def fit_until_told_to_stop(config: TrainConfig) -> int | None:
    """``fit``, and at SIGTERM or Ctrl-C have the workers save the state and stop. Returns the
    signal's number if they did.

    The first signal waits for them for STOP_SECONDS, a second one no longer.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        threading.Thread(target=ask_to_stop, daemon=True).start()

    ended: Future[None] = Future()

    def train() -> None:
        try:
            fit(config)
            ended.set_result(None)
        except BaseException as error:  # noqa: BLE001  (it belongs to the main thread, which does no more than wait: signals go there)
            ended.set_exception(error)

    kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=train, name="fit", daemon=True).start()
        while not received and not ended.done():
            time.sleep(0.1)
        with contextlib.suppress(TimeoutError):
            ended.result(STOP_SECONDS)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return received[0] if received and not runs.run_storage(config).exists(RESULT) else None


@contextlib.contextmanager
def progress(config: TrainConfig) -> Iterator[None]:
    """Show a progress bar, fed from the metrics that the run logs to its storage, while the body
    runs.
    """
    storage, done = runs.run_storage(config), threading.Event()

    def follow() -> None:
        with tqdm(
            total=config.train.images,
            unit=" images",
            unit_scale=True,
            desc=config.run_name,
            dynamic_ncols=True,
        ) as bar:
            while True:
                stop = done.wait(2.0)
                try:
                    rows = read_rows(storage)
                except Unavailable:
                    bar.set_postfix_str("the storage does not answer")
                    rows = []
                train = [row for row in rows if "train/code_length" in row]
                valid = [row["valid/elbo_nats"] for row in rows if "valid/elbo_nats" in row]
                if train:
                    row = train[-1]
                    shown = (
                        f"code length {row['train/code_length']:.2f} nats, rate"
                        f" {row['train/rate']:.2f} nats"
                    )
                    bar.set_postfix_str(
                        shown + (f", valid {valid[-1]:.2f} nats" if valid else ""), refresh=False
                    )
                    bar.update(row["images"] - bar.n)
                if stop:
                    return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def format_result(config: TrainConfig, result: JsonObject) -> str:
    """The last validation, and the command that evaluates the run."""
    from pipeline.evaluation.measure import with_error

    valid = result["valid"]
    how = "was finished already" if result["reused"] else "finished"
    return (
        f"run {result['name']} {how}: {valid['images']:,} images seen; valid code length "
        f"{with_error(valid, 'elbo_nats')} nats, rate {valid['rate_bits']:.1f} bits, on "
        f"{valid['num_images']:,} images\nnext: vlae evaluate model={result['url']}"
    )


def _folder(config: TrainConfig) -> str:
    return f"{config.storage.root}/runs/{config.run_name}"


COMMAND = Command(TrainConfig, run, format_result, _folder)
