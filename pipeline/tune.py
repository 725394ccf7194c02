"""``vlae tune``: a search over the decoder's window, the latent size and the prior's depth; each trial is a ``train``."""

import dataclasses
import math
import os
from typing import Any

import ray
import ray.tune
from ray.tune import Callback, Tuner
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from pipeline import loop, train
from pipeline.cluster import connect
from pipeline.config import TrainConfig, TuneConfig, build, digest, to_dict
from pipeline.errors import UserError
from pipeline.registry import Registry
from pipeline.search import SEARCHED, OptunaSearcher
from pipeline.storage import open_storage

LETTERS = {"model.window": "w", "model.latents": "z", "model.flow_depth": "f"}
OBJECTIVE = "elbo_nats"
"""What is minimised: the code length on validation images. All trials are compared by it; the IWAE bound costs k times more."""


def run(config: TuneConfig) -> dict[str, Any]:
    """Search, then register the best models. Returns the table of trials and what was registered.

    A finished search is not run again; with more trials it goes on from those that it had. One that was killed goes on with the same
    command: a trial's run is named after what is tried in it, so finished trials are taken as they are, and interrupted ones
    continue from their checkpoints.
    """
    name = search_name(config)
    storage = open_storage(f"{config.storage.root}/searches/{name}", config.storage.endpoint_url)
    earlier: dict[str, Any] = {"num_trials": 0, "trials": []}
    if storage.exists(train.RESULT):
        earlier = storage.read_json(train.RESULT)
    if earlier["num_trials"] >= config.search.num_trials:
        return {**earlier, "reused": True}
    for window in config.search.windows:
        train.check(trial_config(config, {"model.window": window}))
    registry = Registry(config.registry)
    connect(config.cluster, config.storage)
    trials = search(config, name, [row for row in earlier["trials"] if row["status"] != "failed"])
    result = {
        "name": name,
        "url": storage.url,
        "num_trials": config.search.num_trials,
        "trials": trials,
        "registered": register(config, registry, trials),
    }
    storage.write_json(train.RESULT, result)
    return {**result, "reused": False}


def search_name(config: TuneConfig) -> str:
    """The name given, or one made from the data set and everything that a trial and its judgement depend on.

    How many trials there are is no part of it: with more of them, the search goes on.
    """
    values = to_dict(config)
    searched = {
        key: value for key, value in values["search"].items() if key not in ("num_trials", "max_concurrent", "min_rate_bits")
    }
    judged = {key: values["train"][key] for key in ("valid_images", "valid_every")}
    return config.name or f"{config.dataset.name}-search-{digest([config.identity(), searched, judged])}"


def trial_config(config: TuneConfig, point: dict[str, Any]) -> TrainConfig:
    """The training run that tries ``point``: dotted options on top of the search's own."""
    values = to_dict(config)
    base = {item.name: values[item.name] for item in dataclasses.fields(TrainConfig)}
    tried = "-".join(f"{letter}{point[key]}" for key, letter in LETTERS.items() if key in point)
    return build(TrainConfig, base, {**point, "name": f"{search_name(config)}-{tried}"})


def search(config: TuneConfig, name: str, earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the trials that ``earlier`` lacks; returns one row for each, the best first, those that were stopped early behind the rest."""
    # Ray's newer console prints a table for every trial; `Announcer` says it in a line.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    images = config.train.num_steps * config.train.global_batch
    workers = config.cluster
    cores = ray.cluster_resources().get("CPU", 1)
    concurrent = config.search.max_concurrent or max(1, int(cores // (workers.max_workers * workers.cpus_per_worker)))
    searcher = OptunaSearcher(config.search, OBJECTIVE, images, config.train.seed, earlier)
    num_trials = min(config.search.num_trials - len(earlier), len(searcher.untried))
    tuner = Tuner(
        # The trial itself only waits for its workers: were it to hold a core, trials could starve their own workers.
        ray.tune.with_resources(ray.tune.with_parameters(trial, config=config), {"memory": 1 << 20}),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=ASHAScheduler(
                time_attr="images",
                metric=OBJECTIVE,
                mode="min",
                # One more than there are: a trial that ASHA ends at its last report would be cut off before it saves its model.
                max_t=images + 1,
                grace_period=max(1, round(config.search.grace_fraction * images)),
                reduction_factor=config.search.reduction,
            ),
            num_samples=num_trials,
            max_concurrent_trials=concurrent,
        ),
        run_config=ray.tune.RunConfig(
            name=name,
            storage_path=f"{config.storage.root}/ray",
            verbose=0,
            callbacks=[Announcer(len(earlier), len(earlier) + num_trials, images)],
        ),
    )
    rows = list(earlier)
    for outcome in tuner.fit() if num_trials else ():
        metrics = outcome.metrics or {}
        row = {key: (outcome.config or {}).get(key) for key in SEARCHED}
        row |= {key: metrics.get(key) for key in ("images", OBJECTIVE, "elbo_nats_se", "rate_nats", "rate_bits", "num_images")}
        row["status"] = "failed" if outcome.error else "finished" if metrics.get("images") == images else "stopped early"
        if outcome.error:
            row["error"] = str(outcome.error).strip().splitlines()[-1]
        row["run"] = trial_config(config, {key: row[key] for key in SEARCHED}).run_name
        rows.append(row)
    if all(row["status"] == "failed" for row in rows):
        raise UserError(f"all {len(rows)} trials of search {name} failed; the first with: {rows[0]['error']}")
    return sorted(rows, key=lambda row: (row["status"] != "finished", row[OBJECTIVE] or math.inf))


def trial(point: dict[str, Any], config: TuneConfig) -> None:
    """What Ray Tune runs for each trial: a training run that reports its validations to the search."""
    typed = trial_config(config, point)
    storage = loop.run_storage(typed)
    if storage.exists(train.RESULT):
        ray.tune.report(storage.read_json(train.RESULT)["valid"])
        return
    train.check(typed)
    train.fit(typed, callbacks=[TuneReportCallback()])


def register(config: TuneConfig, registry: Registry, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the best finished trials whose code carries enough into the registry, the best as the newest version.

    Returns name, version and run of each, the best first.
    """
    candidates = [row for row in trials if row["status"] == "finished" and row["rate_bits"] >= config.search.min_rate_bits]
    if not candidates:
        print(
            f"no finished trial has a rate of at least search.min_rate_bits={config.search.min_rate_bits}: nothing is registered"
        )
    chosen = candidates[: config.register_best]
    registered = []
    for row in reversed(chosen):  # the newest version is the best
        run_folder = loop.run_storage(trial_config(config, {key: row[key] for key in SEARCHED}))
        registered.append({**registry.register(config.model_name, run_folder), "run": row["run"]})
    return registered[::-1]


def format_table(trials: list[dict[str, Any]]) -> str:
    """The trials as text."""
    lines = [f"{'window':>8}{'latents':>9}{'depth':>7}{'images':>10}{'code length':>17}{'rate':>12}  status"]
    for row in trials:
        shown = [f"{row['model.window']:>8}{row['model.latents']:>9}{row['model.flow_depth']:>7}"]
        if row[OBJECTIVE] is not None:
            shown.append(f"{row['images']:>10,}{row[OBJECTIVE]:>12.2f} nats{row['rate_bits']:>7.1f} bits")
        else:
            shown.append(" " * 39)
        lines.append("".join(shown) + "  " + row["status"])
    return "\n".join(lines)


class Announcer(Callback):
    """Prints one line for each thing that happens to a trial; they are numbered from behind the ``earlier`` ones."""

    def __init__(self, earlier: int, num_trials: int, images: int) -> None:
        self.earlier, self.num_trials, self.images = earlier, num_trials, images
        self.numbers: dict[str, int] = {}

    def _say(self, trial: Trial, text: str) -> None:
        number = self.numbers.setdefault(trial.trial_id, self.earlier + len(self.numbers) + 1)
        point = trial.config
        print(
            f"trial {number}/{self.num_trials}  window {point['model.window']}, {point['model.latents']} latents, "
            f"flow depth {point['model.flow_depth']}: {text}",
            flush=True,
        )

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(trial, "started")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        if OBJECTIVE in result:
            self._say(trial, f"{result['images']:,} images, {result[OBJECTIVE]:.2f} nats, rate {result['rate_bits']:.1f} bits")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(trial, "finished" if trial.last_result.get("images", 0) >= self.images else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(trial, "failed")


if __name__ == "__main__":
    from pipeline.cli import main

    main("tune")
