"""``vlae train``: one model, distributed by Ray Train."""

import contextlib
import itertools
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray.train
import ray.util.metrics
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import ControllerError
from tqdm import tqdm

from pipeline import checkpoint, loop, manifest
from pipeline.cluster import connect
from pipeline.config import TrainConfig, build, to_dict
from pipeline.errors import Interrupted, UserError
from pipeline.metrics import read_rows
from pipeline.restarts import Restarts, SaveAtTermination, ask_to_stop, asked_to_stop, terminated
from pipeline.storage import Unavailable, open_storage
from pipeline.tracking import Tracking, training_run
from pipeline.uploads import PATIENCE, patiently

RESULT = "result.json"
STOP_SECONDS = 60.0
"""How long a command that was told to stop waits for its workers to save the run's state."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the end, or go on where the same command was interrupted. Returns the run's result.

    A finished run is not trained again. Raises UserError before any compute if the data set is missing or does not fit the model,
    and Interrupted if a signal, SIGTERM or Ctrl-C, ended it, after its state was saved.
    """
    check(config)
    storage = loop.run_storage(config)
    with Tracking(config.registry) as tracking:
        tracking.follow(training_run(storage, to_dict(config), storage.read_json("identity.json")["manifest"]))
        if storage.exists(RESULT):
            return {**storage.read_json(RESULT), "reused": True}
        connect(config.cluster, config.storage)
        with progress(config):
            stopped_by = fit_until_told_to_stop(config)
        if stopped_by:
            raise Interrupted(
                f"run {config.run_name} is stopped, its state saved after step {patiently(partial(checkpoint.newest_step, storage))} "
                f"of {config.train.num_steps}; the same command goes on from there",
                stopped_by,
            )
        return {**patiently(partial(storage.read_json, RESULT)), "reused": False}


def check(config: TrainConfig) -> None:
    """Raise UserError unless the data set exists, fits the model and the batch, and the run's name is not another run's."""
    contents = check_data(config)
    storage, identity = loop.run_storage(config), config.identity() | {"manifest": contents.digest}
    if storage.exists("identity.json"):
        earlier = storage.read_json("identity.json")
        changed = [f"{key}.{name}" for key in ("dataset", "model", "optim", "train") for name in identity[key]
                   if earlier.get(key, {}).get(name) != identity[key][name]]  # fmt: skip
        if changed or earlier.get("manifest") != identity["manifest"]:
            raise UserError(
                f"run {config.run_name} in {storage.url} was started with another {', '.join(changed) or 'data set of this name'}; "
                "give this one another name=, or delete that folder"
            )
    else:
        storage.write_json("identity.json", identity)
    storage.write_json("config.json", to_dict(config))


def check_data(config: TrainConfig) -> manifest.Manifest:
    """Raise UserError unless the data set exists, and fits the model and the batch; returns what is in it."""
    contents = manifest.load(open_storage(config.dataset.url, config.storage.endpoint_url))
    try:
        config.build(contents.image_shape)
    except ValueError as error:
        raise UserError(f"model.window: {error}" if "window" in str(error) else f"model: {error}") from None
    if contents.num_samples("train") < config.train.global_batch:
        raise UserError(
            f"train.global_batch={config.train.global_batch} is more than the {contents.num_samples('train')} training images of "
            f"{config.dataset.url}; use a smaller batch"
        )
    return contents


def fit_until_told_to_stop(config: TrainConfig) -> int | None:
    """``fit``, and at SIGTERM or Ctrl-C have the workers save the state and stop. Returns the signal's number if they did.

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
    return received[0] if received and not loop.run_storage(config).exists(RESULT) else None


def fit(config: TrainConfig, callbacks: Sequence[UserCallback] = ()) -> None:
    """Run ``worker`` on the workers of the cluster until the run is complete, or stopped. Ray must be connected.

    Raises UserError for a user's mistake that only the workers could see, or if the run fails again and again without getting any
    further; else what Ray Train raises.
    """
    workers = config.cluster
    restarts = Restarts(config.run_name, loop.run_storage(config), workers.max_failures)
    is_elastic = workers.min_workers < workers.max_workers
    for attempt in itertools.count(1):
        trainer = TorchTrainer(
            worker,
            train_loop_config=to_dict(config),
            # A rank may wait for another's storage for as long as that is waited for. That a host is gone is told by Ray, and sooner.
            torch_config=TorchConfig(timeout_s=int(PATIENCE) + 60),
            scaling_config=ScalingConfig(
                num_workers=(workers.min_workers, workers.max_workers) if is_elastic else workers.max_workers,
                use_gpu=workers.use_gpu,
                resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {}),
                elastic_resize_monitor_interval_s=30.0,
            ),
            run_config=RunConfig(
                name=config.run_name,
                storage_path=f"{config.storage.root}/ray",
                failure_config=FailureConfig(max_failures=-1),  # Restarts has the say
                callbacks=[restarts, SaveAtTermination(), *callbacks],
            ),
        )
        try:
            trainer.fit()
            return
        except ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise UserError(str(error.controller_failure)) from None
            # Ray Train takes it for an error of its own, and gives up, if the workers do not get hold of each other.
            if attempt > workers.max_failures:
                raise
            time.sleep(Restarts.pause(attempt))


def worker(config: dict[str, Any]) -> None:
    """What each worker of Ray Train does."""
    typed, context = build(TrainConfig, config, {}), ray.train.get_context()
    rank = context.get_world_rank()
    try:
        complete(
            typed,
            rank=rank,
            world_size=context.get_world_size(),
            device=get_device(),
            on_validation=ray.train.report,
            on_report=Gauges(typed.run_name).set,
            should_stop=lambda: terminated.is_set() or (rank == 0 and asked_to_stop()),
        )
    except loop.Stopped:
        if not asked_to_stop():  # a worker was told to end, not the run: Ray Train starts it again on those that are left
            raise


def complete(config: TrainConfig, *, rank: int = 0, **options: Any) -> None:
    """Train to the end in this process, with the ``options`` of ``loop.fit``; rank 0 writes the result, which marks the run as complete."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    validation = loop.fit(config, rank=rank, **options)
    if rank == 0:
        storage = loop.run_storage(config)
        result = {"name": config.run_name, "url": storage.url, "model": to_dict(config)["model"], "valid": validation}
        patiently(partial(storage.write_json, RESULT, result))


class Gauges:
    """What a run says at Ray's metrics endpoint: the values of its log, as ``ray_vlae_train_rate{run="..."}``."""

    def __init__(self, run: str) -> None:
        self.tags, self.gauges = {"run": run}, dict[str, ray.util.metrics.Gauge]()

    def set(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name not in self.gauges:
                self.gauges[name] = ray.util.metrics.Gauge(
                    "vlae_" + re.sub(r"\W", "_", name), f"{name} of a training run", tag_keys=("run",)
                )
            self.gauges[name].set(value, self.tags)


@contextlib.contextmanager
def progress(config: TrainConfig) -> Iterator[None]:
    """Show a progress bar, fed from the metrics that the run logs to its storage, while the body runs."""
    storage, done = loop.run_storage(config), threading.Event()

    def follow() -> None:
        with tqdm(total=config.train.images, unit=" images", unit_scale=True, desc=config.run_name, dynamic_ncols=True) as bar:
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
                    shown = f"code length {row['train/code_length']:.2f} nats, rate {row['train/rate']:.2f} nats"
                    bar.set_postfix_str(shown + (f", valid {valid[-1]:.2f} nats" if valid else ""), refresh=False)
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


if __name__ == "__main__":
    from pipeline.cli import main

    main("train")
