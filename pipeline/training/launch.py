"""Start a training run on Ray Train: checks, workers, restarts."""

import itertools
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray.train
import ray.util.metrics
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2.api.exceptions import ControllerError

from pipeline.config.compose import build
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.data import DataSet
from pipeline.errors import UserError, last_line
from pipeline.runs import IDENTITY, RESULT, Run, check_pixels
from pipeline.storage.rays import ray_storage
from pipeline.storage.recipe import begin_named
from pipeline.storage.uploads import retry
from pipeline.training import loop
from pipeline.training.restarts import (
    Restarts,
    SaveAtTermination,
    StartWatch,
    asked_to_stop,
    terminated,
)
from pipeline.training.watch import StepWatch
from pipeline.values import JsonObject


def check(config: TrainConfig) -> None:
    """Check the data set and the run's name before anything is started.

    Raises UserError unless the data set exists and fits the model and the batch, and the name is
    new or that of this very run.
    """
    storage, data = Run.of(config).storage, check_data(config)
    identity = config.identity() | {"manifest": data.manifest.digest}
    begin_named(storage, IDENTITY, identity, f"run {config.run_name}")


def check_data(config: TrainConfig) -> DataSet:
    """Check that the data set exists, and fits the model and the batch; returns it.

    Raises UserError if not.
    """
    data = DataSet.open(config.dataset.url, config.storage.endpoint_url)
    check_pixels(data, config.dataset.binarization)
    try:
        config.build(data.manifest.image_shape)
    except ValueError as error:
        raise UserError(
            f"model.window: {error}" if "window" in str(error) else f"model: {error}"
        ) from None
    num_images = data.manifest.num_samples("train")
    if num_images < config.train.global_batch:
        raise UserError(
            f"train.global_batch={config.train.global_batch} is more than the"
            f" {num_images} training images of {config.dataset.url}; use a"
            " smaller batch"
        )
    return data


class Trainer(TorchTrainer):
    """Ray Train's trainer, without the actor that it starts for Ray data sets.

    There are none here, and each start of the workers would load Ray Data in one more process.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        kept = [each for each in every if not isinstance(each, DatasetsCallback)]
        return sorted(kept, key=lambda each: not isinstance(each, StartWatch))


def fit(config: TrainConfig, callbacks: Sequence[UserCallback] = ()) -> None:
    """Run ``worker`` on the cluster until the run is complete or stopped. Ray must be connected.

    Raises UserError for a user's mistake that only the workers could find, or if the run fails
    again and again without progress; otherwise the error of Ray Train.
    """
    workers = config.cluster
    restarts = Restarts(config.run_name, Run.of(config).storage, workers.max_failures)
    is_elastic = workers.min_workers < workers.max_workers
    for attempt in itertools.count(1):
        trainer = Trainer(
            worker,
            train_loop_config=to_dict(config),
            # After the watch of the rank that the collective waits for (see StepWatch), which names
            # that rank. Ray reports a lost host, and sooner.
            torch_config=TorchConfig(timeout_s=int(workers.stuck_seconds) + 60),
            scaling_config=ScalingConfig(
                num_workers=(
                    (workers.min_workers, workers.max_workers)
                    if is_elastic
                    else workers.max_workers
                ),
                use_gpu=workers.use_gpu,
                resources_per_worker={"CPU": workers.cpus_per_worker}
                | ({"GPU": 1} if workers.use_gpu else {}),
                elastic_resize_monitor_interval_s=30.0,
            ),
            run_config=RunConfig(
                name=config.run_name,
                **ray_storage(config.storage.root),
                failure_config=FailureConfig(max_failures=-1),  # Restarts decides instead
                callbacks=[
                    restarts,
                    SaveAtTermination(),
                    StartWatch(restarts, workers.stuck_seconds),
                    *callbacks,
                ],
            ),
        )
        try:
            trainer.fit()
            return
        except (ControllerError, RayActorError, OSError) as error:
            cause = getattr(error, "controller_failure", error)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            # Ray Train's controller reads and writes the storage when it starts, and does not try
            # again if that fails, or if the workers fail to connect to each other. Its process may
            # also be lost with its machine.
            reason = last_line(cause)
            if attempt > workers.max_failures:
                raise UserError(
                    f"Ray Train's controller of run {config.run_name} failed {attempt} times; the"
                    f" last error: {reason}"
                ) from error
            restarts.step = restarts.newest_step()
            restarts.record(f"Ray Train's controller failed: {reason}")
            restarts.wait_until_written()  # the next controller writes the list, too
            time.sleep(Restarts.pause(attempt))


def worker(config: JsonObject) -> None:
    """The training function of each Ray Train worker."""
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
        # If only a worker was terminated, not the run, Ray Train restarts the run without it.
        if not asked_to_stop():
            raise


def complete(config: TrainConfig, *, rank: int = 0, **options: Any) -> None:
    """Train to the end in this process, with the ``options`` of ``loop.fit``.

    Rank 0 writes the result, which marks the run as complete. Ends the process if the run makes no
    step for ``cluster.stuck_seconds``; Ray must be connected.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    with StepWatch(config.run_name, rank, config.cluster.stuck_seconds) as watch:
        validation = loop.fit(config, rank=rank, on_step=watch.begin, **options)
    if rank == 0:
        storage = Run.of(config).storage
        result = {
            "name": config.run_name,
            "url": storage.url,
            "model": to_dict(config)["model"],
            "valid": validation,
        }
        retry(partial(storage.write_json, RESULT, result))


class Gauges:
    """The values of a run's log at Ray's metrics endpoint: ``ray_vlae_train_rate{run="..."}``."""

    def __init__(self, run: str) -> None:
        self.tags, self.gauges = {"run": run}, dict[str, ray.util.metrics.Gauge]()

    def set(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name not in self.gauges:
                self.gauges[name] = ray.util.metrics.Gauge(
                    "vlae_" + re.sub(r"\W", "_", name),
                    f"{name} of a training run",
                    tag_keys=("run",),
                )
            self.gauges[name].set(value, self.tags)
