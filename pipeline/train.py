"""``vlae train``: one model, distributed by Ray Train."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import ControllerError
from tqdm import tqdm

from pipeline import loop, manifest
from pipeline.cluster import connect
from pipeline.config import TrainConfig, build, to_dict
from pipeline.errors import UserError
from pipeline.metrics import read_rows
from pipeline.storage import open_storage
from pipeline.tracking import Tracking, training_run

RESULT = "result.json"


def run(config: TrainConfig) -> dict[str, Any]:
    """Train to the end, or go on where the same command was interrupted. Returns the run's result.

    A finished run is not trained again. Raises UserError before any compute if the data set is missing or does not fit the model.
    """
    check(config)
    storage = loop.run_storage(config)
    with Tracking(config.registry) as tracking:
        tracking.follow(training_run(storage, to_dict(config), storage.read_json("identity.json")["manifest"]))
        if storage.exists(RESULT):
            return {**storage.read_json(RESULT), "reused": True}
        connect(config.cluster, config.storage)
        with progress(config):
            fit(config)
    return {**storage.read_json(RESULT), "reused": False}


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


def fit(config: TrainConfig, callbacks: Sequence[UserCallback] = ()) -> None:
    """Run ``worker`` on every worker of the cluster until the run is complete. Ray must be connected.

    Raises UserError for a user's mistake that only the workers could see; else what Ray Train raises.
    """
    workers = config.cluster
    trainer = TorchTrainer(
        worker,
        train_loop_config=to_dict(config),
        scaling_config=ScalingConfig(
            num_workers=workers.max_workers if workers.min_workers == workers.max_workers else tuple(workers.num_workers),
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=f"{config.storage.root}/ray",
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[EndOnMistake(), *callbacks],
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise UserError(str(error.controller_failure)) from None
        raise


class EndOnMistake(UserCallback):
    """Ends a run at once if a worker reports a user's mistake: no restart would mend it.

    What a callback raises is an error of the controller's, in which this runs, and those are not retried.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for exception in worker_exceptions.values():
            cause = getattr(exception, "_base_exc", exception)  # Ray Train's wrapper keeps the worker's own exception there
            if isinstance(cause, UserError):
                raise cause


def worker(config: dict[str, Any]) -> None:
    """What each worker of Ray Train does."""
    context = ray.train.get_context()
    complete(
        build(TrainConfig, config, {}),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        on_validation=lambda metrics: ray.train.report(metrics),
    )


def complete(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    on_validation: Callable[[dict[str, Any]], None],
) -> None:
    """Train to the end in this process, and on rank 0 write the result, which marks the run as complete."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    validation = loop.fit(config, rank=rank, world_size=world_size, device=device, on_validation=on_validation)
    if rank == 0:
        storage = loop.run_storage(config)
        result = {"name": config.run_name, "url": storage.url, "model": to_dict(config)["model"], "valid": validation}
        storage.write_json(RESULT, result)


@contextlib.contextmanager
def progress(config: TrainConfig) -> Iterator[None]:
    """Show a progress bar, fed from the metrics that the run logs to its storage, while the body runs."""
    storage, done = loop.run_storage(config), threading.Event()

    def follow() -> None:
        with tqdm(total=config.train.images, unit=" images", unit_scale=True, desc=config.run_name, dynamic_ncols=True) as bar:
            while True:
                stop = done.wait(2.0)
                rows = read_rows(storage)
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
