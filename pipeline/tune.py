"""``vlae tune``: a search over the decoder's window, the latent size, the prior's depth and others; each trial is a ``train``.

What is known of a search is kept as JSON in its folder: ``search.json`` says what it is, ``trials/NNNN.json`` what each trial tries and
what became of it. Nothing else is read back: Ray Tune runs the trials, and what it keeps of them is not used again.
"""

import logging
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import ray
import ray.tune
import torch
from ray.tune import Callback, FailureConfig, Stopper, Tuner
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline import evaluate, loop, report, train
from pipeline.cluster import connect, num_places, resources
from pipeline.config import BoundOptions, TrainConfig, TuneConfig, build, digest, to_dict
from pipeline.errors import UserError
from pipeline.goals import ON_THE_WAY, QUANTITIES
from pipeline.metrics import read_rows
from pipeline.search import Point, lags, propose
from pipeline.storage import Storage, open_storage
from pipeline.tracking import Status, TrackedRun, Tracking, training_run
from pipeline.versions import Registry

RECORD = "search.json"

RUNNING, FINISHED, STOPPED, FAILED = "unfinished", "finished", "stopped early", "failed"


def run(config: TuneConfig) -> dict[str, Any]:
    """Search, then register the best models. Returns the table of trials and what was registered.

    A finished search is not run again; with a larger budget it goes on from the trials that it had. One that was killed goes on with the
    same command: finished trials are taken as they are, interrupted ones continue from their checkpoints.
    """
    storage = open_storage(f"{config.storage.root}/searches/{search_name(config)}", config.storage.endpoint_url)
    check(config, storage)
    registry = Registry(config.registry)
    trials = Trials.load(config, storage)
    reused = trials.next() is None
    parameters = {f"search.{key}": value for key, value in identity(config)["search"].items()}
    with Tracking(config.registry) as tracking:
        parent = TrackedRun(storage, search_name(config), config.dataset.name, parameters)
        tracking.follow(parent)
        if not reused:
            connect(config.cluster, config.storage)
            search(config, trials, tracking, parent)
    if not trials.rows:
        raise UserError(f"search.hours={config.search.hours} was over before a trial began; give the search more time")
    failed = [row for row in trials.rows if row["status"] == FAILED]
    if len(failed) == len(trials.rows):
        raise UserError(
            f"all {len(failed)} trials of search {search_name(config)} failed; the first with: {failed[0]['error']}; to try them again, "
            f"delete {storage.url}"
        )
    rows = table(config, trials.rows)
    result = {
        "name": search_name(config),
        "url": storage.url,
        "objectives": config.search.objectives,
        "constraints": config.search.constraints,
        "seconds": round(trials.seconds(), 1),
        "trials": rows,
        "registered": register(config, registry, rows),
        "report": report.write(config, storage, rows, trials.rows),
    }
    storage.write_json(train.RESULT, result)
    return {**result, "reused": reused}


def search_name(config: TuneConfig) -> str:
    """The name given, or one made from the data set and everything that a trial and its judgement depend on."""
    return config.name or f"{config.dataset.name}-search-{digest(identity(config))}"


def identity(config: TuneConfig) -> dict[str, Any]:
    """What makes this search this search. How long it goes on and how much of it runs at once are no part of that."""
    values = to_dict(config)
    budget = ("num_trials", "hours", "core_hours", "max_concurrent")
    judged = {key: values["train"][key] for key in ("valid_images", "valid_every")}
    searched = {key: value for key, value in values["search"].items() if key not in budget}
    return {**config.identity(), "valid": judged, "search": searched}


def check(config: TuneConfig, storage: Storage) -> None:
    """Raise UserError unless the data set is there and fits every model that is tried, and the search's name is not another's."""
    for key, values in config.search.axes.items():
        for value in values:
            contents = train.check_data(trial_config(config, {key: value}))
    if "probe_accuracy" in config.search.goals.quantities and (contents.num_classes or 0) < 2:
        raise UserError(
            f"probe_accuracy is searched for, but the images of {config.dataset.url} have no labels; use other objectives"
        )
    wanted = {**identity(config), "manifest": contents.digest}
    if not storage.exists(RECORD):
        storage.write_json(RECORD, wanted)
        return
    earlier = storage.read_json(RECORD)
    changed = [f"{part}.{name}" for part in wanted if part != "manifest" for name in wanted[part]
               if earlier.get(part, {}).get(name) != wanted[part][name]]  # fmt: skip
    if changed or earlier.get("manifest") != wanted["manifest"]:
        raise UserError(
            f"search {search_name(config)} in {storage.url} was started with another {', '.join(changed) or 'data set of this name'}; "
            "give this one another name=, or delete that folder"
        )


def trial_config(config: TuneConfig, point: Point) -> TrainConfig:
    """The training run that tries ``point``: dotted options on top of the search's own. It is named after them."""
    values = to_dict(config)
    base = {item.name: values[item.name] for item in fields(TrainConfig)}
    tried = re.sub(r"[^\w.-]", "", "-".join(f"{key.partition('.')[2]}{value}" for key, value in point.items()))  # 1e+30
    return build(TrainConfig, base, {**point, "name": f"{search_name(config)}-{tried}"})


@dataclass
class Trials:
    """What is known of a search's trials: a row for each (see ``pipeline.search``), every one kept as an object of its own."""

    config: TuneConfig
    storage: Storage
    rows: list[dict[str, Any]]
    interrupted: list[dict[str, Any]] = field(init=False)
    """Those that an earlier attempt began, which come first."""

    @classmethod
    def load(cls, config: TuneConfig, storage: Storage) -> Self:
        """All that were begun before."""
        return cls(config, storage, [storage.read_json(key) for key in sorted(storage.list("trials/"))])

    def __post_init__(self) -> None:
        self.interrupted = [row for row in self.rows if row["status"] == RUNNING]
        self.spent = max((row["search_seconds"] for row in self.rows), default=0.0)
        self.began = time.monotonic()
        self.clocks: dict[int, float] = {}

    def next(self) -> dict[str, Any] | None:
        """The row of the trial to run next; none if all was tried or the budget is used up. ``begin`` begins it."""
        if self.exhausted():
            return None
        if self.interrupted:
            return self.interrupted[0]
        search = self.config.search
        point = propose(search, self.config.train.seed, self.rows) if len(self.rows) < search.num_trials else None
        if point is None:
            return None
        name = trial_config(self.config, point).run_name
        known = {"images": 0, "curve": [], "seconds": 0.0, "failures": 0}
        number = max((row["number"] for row in self.rows), default=0) + 1
        return {"number": number, "point": point, "run": name, "status": RUNNING, **known}

    def of(self, trial: Trial) -> dict[str, Any]:
        """The row of a trial of Ray Tune's."""
        return next(row for row in self.rows if row["number"] == trial.config["number"])

    def begin(self, row: dict[str, Any]) -> None:
        """Take in a row that ``next`` gave."""
        if self.interrupted:
            self.interrupted.remove(row)
        else:
            self.rows.append(row)
        self.save(row)

    def save(self, row: dict[str, Any]) -> None:
        """Keep what is known of a trial by now."""
        now = time.monotonic()
        row["search_seconds"] = self.seconds()
        row["seconds"] += now - self.clocks.get(row["number"], now)
        self.clocks[row["number"]] = now
        self.storage.write_json(f"trials/{row['number']:04d}.json", row)

    def seconds(self) -> float:
        """How long this search has gone on, its earlier attempts included."""
        return self.spent + time.monotonic() - self.began

    def exhausted(self) -> bool:
        """Whether the hours or core-hours are used up."""
        search, workers = self.config.search, self.config.cluster
        hours = self.seconds() / 3600
        core_hours = sum(row["seconds"] for row in self.rows) * workers.max_workers * workers.cpus_per_worker / 3600
        return (search.hours is not None and hours >= search.hours) or (
            search.core_hours is not None and core_hours >= search.core_hours
        )


def search(config: TuneConfig, trials: Trials, tracking: Tracking, parent: TrackedRun) -> None:
    """Run trials until nothing is left to try, or the budget is used up."""
    # Ray's newer console prints a table for every trial, its loggers write files for each: `Recorder` says and keeps what there is.
    # And a search that is interrupted ends as every command does.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    workers = config.cluster
    # A trial of several workers only waits for them, and Ray Train starts all of them or none: were it to hold a core itself, trials could
    # starve their own workers.
    needed = resources(workers) if workers.max_workers == 1 else {"memory": 1 << 20}
    room = max(1, num_places(workers) // workers.max_workers)
    concurrent = min(config.search.max_concurrent or room, room)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    tuner = Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(trial, config=config), needed),
        tune_config=ray.tune.TuneConfig(
            search_alg=Proposer(trials),
            scheduler=Halting(trials),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,  # to start a process and import PyTorch takes longer than a short trial can spare
        ),
        run_config=ray.tune.RunConfig(
            name=search_name(config),
            storage_path=f"{config.storage.root}/ray",
            failure_config=FailureConfig(max_failures=workers.max_failures),
            stop=Budget(trials),
            verbose=0,
            callbacks=[Recorder(trials, tracking, parent)],
        ),
    )
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # which misses the loggers' files
    tuner.fit()


def trial(row: dict[str, Any], config: TuneConfig) -> None:
    """What Ray Tune runs for each trial: a training run that reports its validations to the search, and is measured at its end.

    A run of one worker trains in this process, which Ray Tune uses again for the next trial; several are started by Ray Train.
    A user's mistake is reported, since no retry would mend it; other errors are raised, so that the trial is tried again.
    """
    typed = trial_config(config, row["point"])
    storage = loop.run_storage(typed)
    try:
        if not storage.exists(train.RESULT):
            train.check(typed)
            if typed.cluster.max_workers == 1:
                device = torch.device("cuda" if typed.cluster.use_gpu else "cpu")
                gauges = train.Gauges(typed.run_name)
                train.complete(typed, device=device, on_validation=ray.tune.report, on_report=gauges.set)
            else:
                train.fit(typed, callbacks=[TuneReportCallback()])
        if typed.cluster.max_workers == 1:
            values = measure(config, row["point"], storage)
        else:
            held = resources(typed.cluster)
            # "DEFAULT" is anywhere: without it, Ray would look for these in what this trial holds, which is no core.
            task = ray.remote(num_cpus=held["CPU"], num_gpus=held.get("GPU", 0), scheduling_strategy="DEFAULT")(measure)
            values = ray.get(task.remote(config, row["point"], storage))
    except UserError as error:
        ray.tune.report({"error": str(error)})
    else:
        ray.tune.report({"images": typed.train.num_steps * typed.train.global_batch, "values": values})


def measure(config: TuneConfig, point: Point, run: Storage) -> dict[str, float | None]:
    """What ``goals.QUANTITIES`` names, of a run's final model on validation images; measured once, and kept with it.

    TensorBoard is told, too, as hyperparameters.
    """
    search = config.search
    bounds = BoundOptions(samples=search.samples, num_images=search.num_images, pictures=10, seed=config.train.seed)
    measured = evaluate.of_run(run, bounds, config.storage, config.registry, search.probe_images)["valid"]
    bound = "iwae_nats" if search.samples > 1 else "elbo_nats"
    values = {"nll": measured[bound], "nll_se": measured[f"{bound}_se"], "code_length_nats": measured["elbo_nats"]}
    values |= {key: measured[key] for key in ("rate_bits", "rate_nats", "distortion_nats", "distortion_nats_se", "num_images")}
    if "probe" in measured:
        probe = measured["probe"]["linear"]
        values |= {"probe_accuracy": probe["accuracy"], "probe_accuracy_se": probe["accuracy_se"]}
    speeds = [row["train/images_per_s"] for row in read_rows(run) if "train/images_per_s" in row]
    values |= {"samples": search.samples, "images_per_s": statistics.median(speeds)}
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            measures = {f"trial/{name}": values[name] for name in QUANTITIES if name in values}
            for summary in hparams(point, measures):
                writer.file_writer.add_summary(summary)
            for name, value in measures.items():
                writer.add_scalar(name, value)
        (events,) = Path(folder).iterdir()
        run.upload("tensorboard/events.out.tfevents.hparams", events)
    return values


class Proposer(Searcher):
    """Gives Ray Tune the trials to run."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        row = self.trials.next()
        if row is None:
            return Searcher.FINISHED
        self.trials.begin(row)
        return {"number": row["number"], "point": row["point"]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "wb").close()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is continued from its own record")


class Halting(FIFOScheduler):
    """Takes in what trials report, and stops those that lag behind."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        row = self.trials.of(trial)
        if "error" in result:
            row |= {"status": FAILED, "error": result["error"]}
        elif "values/nll" in result:  # Ray Tune flattens what is reported
            values = {key.removeprefix("values/"): value for key, value in result.items() if key.startswith("values/")}
            row |= {"status": FINISHED, "images": result["images"], "values": values}
        elif result["images"] > row["images"]:
            entry = {"images": result["images"], "nll": result["elbo_nats"], "seconds": self.trials.seconds()}
            row["curve"].append(entry | {name: result[name] for name in ON_THE_WAY if name in result})
            row["images"] = result["images"]
            config = self.trials.config
            if lags(config.search, config.train.num_steps * config.train.global_batch, row, self.trials.rows):
                row["status"] = STOPPED
        self.trials.save(row)
        return self.CONTINUE if row["status"] in (RUNNING, FINISHED) else self.STOP


class Budget(Stopper):
    """Ends a search whose hours or core-hours are used up."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.trials.exhausted()


class Recorder(Callback):
    """Prints one line for each thing that happens to a trial, keeps how it ended, and has it tracked as a part of the search."""

    def __init__(self, trials: Trials, tracking: Tracking, parent: TrackedRun) -> None:
        self.trials, self.tracking, self.parent = trials, tracking, parent
        self.manifest: str = trials.storage.read_json(RECORD)["manifest"]
        self.tracked: dict[int, TrackedRun] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps a pickle of what it is given, which nobody reads back, and a thread is no part of that."""
        return {}

    def _say(self, row: dict[str, Any], text: str) -> None:
        print(f"trial {row['number']}/{self.trials.config.search.num_trials}  {describe(row['point'])}: {text}", flush=True)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self.trials.of(trial)
        self.trials.clocks[row["number"]] = time.monotonic()
        self._say(row, f"goes on behind {row['images']:,} images" if row["images"] else "started")
        config = trial_config(self.trials.config, row["point"])
        self.tracked[row["number"]] = training_run(loop.run_storage(config), to_dict(config), self.manifest, self.parent)
        self.tracking.follow(self.tracked[row["number"]])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self.trials.of(trial)
        ended: dict[str, Status] = {FAILED: "FAILED", RUNNING: "KILLED"}
        self.tracking.end(self.tracked[row["number"]], ended.get(row["status"], "FINISHED"))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        row = self.trials.of(trial)
        if row["status"] == FINISHED:
            values = row["values"]
            text = f"NLL <= {values['nll']:.2f} nats, rate {values['rate_bits']:.1f} bits"
            if "probe_accuracy" in values:
                text += f", probe {100 * values['probe_accuracy']:.1f} %"
            self._say(row, f"finished, {text}")
        elif row["status"] == FAILED:
            self._say(row, f"failed: {row['error']}")
        else:
            text = f"{result['images']:,} images, {result['elbo_nats']:.2f} nats, rate {result['rate_bits']:.1f} bits"
            self._say(row, text + (": stopped early" if row["status"] == STOPPED else ""))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self.trials.of(trial)
        row["failures"] += 1
        self.trials.save(row)
        self._say(row, f"lost; it is tried again, for the {_ordinal(row['failures'])} time")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self.trials.of(trial)
        cause = trial.get_error()
        row |= {"status": FAILED, "error": (str(cause).strip().splitlines() or [type(cause).__name__])[-1]}
        self.trials.save(row)
        self.tracking.end(self.tracked[row["number"]], "FAILED")
        self._say(row, f"failed: {row['error']}")


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def describe(point: Point) -> str:
    """A point of the space in words: ``window 5x2, latents 16, flow_depth 2``."""
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in point.items())


def table(config: TuneConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each trial, the best first, behind the finished ones those that were stopped early, interrupted or failed.

    What was measured of a finished trial is in its row by the names of ``goals.QUANTITIES``; of another, what its last validation said.
    ``front`` counts from 1, the front of those that nobody beats; ``feasible`` says whether all constraints are kept.
    """
    goals = config.search.goals

    def flat(row: dict[str, Any]) -> dict[str, Any]:
        known = row["values"] if row["status"] == FINISHED else row["curve"][-1] if row["curve"] else {}
        kept = {key: row[key] for key in ("number", "run", "status", "images", "seconds", "failures", "error") if key in row}
        return {**row["point"], **known, **kept}

    by_status = {
        status: [flat(row) for row in rows if row["status"] == status] for status in (FINISHED, STOPPED, RUNNING, FAILED)
    }
    fronts = goals.ranked(by_status[FINISHED])
    best = [
        {**row, "front": number, "feasible": goals.violation(row) == 0}
        for number, front in enumerate(fronts, 1)
        for row in front
    ]
    stopped = [row for front in goals.ranked(by_status[STOPPED]) for row in front]
    stopped += [row for row in by_status[STOPPED] if row not in stopped]
    return [*best, *stopped, *by_status[RUNNING], *by_status[FAILED]]


def register(config: TuneConfig, registry: Registry, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the best finished trials that keep all constraints into the registry.

    ``rows``: as ``table`` orders them. Returns name, version and run of each, the best first.
    """
    candidates = [row for row in rows if row.get("feasible")]
    if not candidates:
        wanted = " and ".join(config.search.constraints)
        print(f"{f'no finished trial keeps {wanted}' if wanted else 'no trial ran to its end'}: nothing is registered")
        return []
    chosen = candidates[: config.register_best]
    # The first version of all becomes the champion, of others the newest becomes the challenger: this is to be the best.
    is_new = config.model_name not in {model["name"] for model in registry.models()}
    made = {}
    for row in chosen if is_new else chosen[::-1]:
        run_folder = open_storage(f"{config.storage.root}/runs/{row['run']}", config.storage.endpoint_url)
        made[row["run"]] = {**registry.register(config.model_name, run_folder), "run": row["run"]}
    return [made[row["run"]] for row in chosen]


COLUMNS = {
    "images": ",.0f",
    "nll": ".2f",
    "rate_bits": ".1f",
    "distortion_nats": ".2f",
    "probe_accuracy": ".1%",
    "images_per_s": ",.0f",
}


def format_table(config: TuneConfig, rows: list[dict[str, Any]]) -> str:
    """The trials as text."""
    lines = [[*(key.partition(".")[2] for key in config.search.axes), *COLUMNS, "front", "status"]]
    for row in rows:
        shown = [format(row[name], form) if name in row else "" for name, form in COLUMNS.items()]
        lines.append([*(str(row[key]) for key in config.search.axes), *shown, str(row.get("front", "")), row["status"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    from pipeline.cli import main

    main("tune")
