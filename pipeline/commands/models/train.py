"""``vlae train``: train one model, distributed by Ray Train."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

from pipeline import background
from pipeline.commands import Command, follow_manifest
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.errors import Interrupted
from pipeline.progress import progress_bar
from pipeline.values import JsonObject

STOP_SECONDS = 60.0
"""Seconds for which a stopped command waits for its workers to save the run's state."""


def run(config: TrainConfig) -> JsonObject:
    """Train to the end, or resume where the same command was interrupted; returns the result.

    A finished run is not trained again. Raises UserError, before any training, if the data set is
    missing or does not fit the model, or if another command works on the run. Raises Interrupted
    if SIGTERM or Ctrl-C ended the run, after its state was saved.
    """
    from pipeline.cluster import connect
    from pipeline.registry.tracking import Tracking, training_run
    from pipeline.runs import Run
    from pipeline.storage.claims import claimed
    from pipeline.storage.uploads import retry
    from pipeline.training import checkpoint
    from pipeline.training.launch import check

    check(config)
    run = Run.of(config)
    with (
        claimed(run.storage, f"run {config.run_name}"),
        Tracking(config.registry) as tracking,
    ):
        run.keep_options(config)
        tracking.follow(training_run(run, to_dict(config), run.identity()["manifest"]))
        if run.is_finished:
            return {**run.result(), "reused": True}
        connect(config.cluster, config.storage)
        with progress(config):
            stopped_by = fit_until_stopped(config)
        if stopped_by:
            raise Interrupted(
                f"run {config.run_name} is stopped, its state saved after step"
                f" {retry(partial(checkpoint.newest_step, run.storage))} of"
                f" {config.train.num_steps}; the same command resumes it",
                stopped_by,
            )
        return {**retry(run.result), "reused": False}


def fit_until_stopped(config: TrainConfig) -> int | None:
    """Run ``fit``; at SIGTERM or Ctrl-C, make the workers save the state and stop.

    Returns the number of the signal that stopped the run, or None if the run finished. After the
    first signal this waits up to STOP_SECONDS for the workers; a second signal ends the wait.
    """
    from pipeline.runs import Run
    from pipeline.training.launch import fit
    from pipeline.training.restarts import ask_to_stop

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        threading.Thread(target=ask_to_stop, daemon=True).start()

    kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # In the background, since only a main thread that does not block handles signals.
        ended = background.start(partial(fit, config), "fit")
        while not received and not ended.done():
            time.sleep(0.1)
        with contextlib.suppress(TimeoutError):
            ended.result(STOP_SECONDS)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return received[0] if received and not Run.of(config).is_finished else None


@contextlib.contextmanager
def progress(config: TrainConfig) -> Iterator[None]:
    """Show a progress bar for the length of a block, from the metrics in the run's storage."""
    from pipeline.runs import MetricReader, Run
    from pipeline.storage.base import Unavailable
    from pipeline.storage.uploads import retry
    from pipeline.training import checkpoint

    run, done = Run.of(config), threading.Event()
    resumed = retry(partial(checkpoint.newest_step, run.storage)) * config.train.global_batch
    num_shown = len(retry(run.restarts))

    def follow() -> None:
        nonlocal num_shown
        log, train, valid = MetricReader(run.storage), dict[str, float](), dict[str, float]()
        with progress_bar(
            config.train.images,
            config.run_name,
            initial=resumed,
            note="the workers are starting",
        ) as bar:
            while True:
                stop = done.wait(2.0)
                try:
                    # Before the rows, which are read only once.
                    restarts, rows = run.restarts(), log.rows()
                except Unavailable:
                    unavailable = "the storage is unavailable"
                    bar.set_postfix_str(unavailable, refresh=bar.postfix != unavailable)
                    restarts, rows = [], []
                for restart in restarts[num_shown:]:
                    bar.write(
                        f"run {config.run_name} restarts from step {restart['step']}:"
                        f" {restart['reason']}",
                        file=sys.stderr,
                    )
                num_shown = max(num_shown, len(restarts))
                for row in rows:
                    train = row if "train/code_length" in row else train
                    valid = row if "valid/elbo_nats" in row else valid
                if rows and train:
                    shown = (
                        f"code length {train['train/code_length']:.2f} nats, rate"
                        f" {train['train/rate']:.2f} nats"
                    )
                    if valid:
                        shown += f", valid {valid['valid/elbo_nats']:.2f} nats"
                    bar.set_postfix_str(shown, refresh=False)
                    bar.update(train["images"] - bar.n)
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
    from pipeline.values import Measured

    valid = result["valid"]
    how = "was finished already" if result["reused"] else "finished"
    return (
        f"run {result['name']} {how}: {valid['images']:,} images seen; valid code length "
        f"{Measured.from_json(valid, 'elbo_nats')}, rate {valid['rate_bits']:.1f} bits, on "
        f"{valid['num_images']:,} images\nnext: vlae evaluate model={result['url']}"
    )


COMMAND = Command(
    TrainConfig,
    run,
    format_result,
    lambda config: config.folder,
    resumes=True,
    follow=follow_manifest,
)
