"""Run a search on Ray Tune: the function of a trial, and adapters to Tune's interfaces."""

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from ray.tune import Callback, FailureConfig, Stopper, Tuner
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline.cluster import HEALTH_CHECK_TIMEOUT, num_places, resources
from pipeline.config.evaluation import BoundOptions
from pipeline.config.goals import ON_THE_WAY, QUANTITIES, Measurements
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.config.search import Stopping, TuneConfig
from pipeline.errors import UserError, last_line
from pipeline.registry import tracking
from pipeline.registry.tracking import TrackedRun, Tracking, training_run
from pipeline.runs import TENSORBOARD, Run
from pipeline.search.proposals import is_outperformed
from pipeline.search.trial import Point, Status, Trial
from pipeline.search.trials import (
    RECORD,
    Trials,
    describe,
    trial_config,
)
from pipeline.storage.rays import ray_storage
from pipeline.training import launch
from pipeline.training.watch import HEARTBEAT_SECONDS, Heartbeats, heartbeat, take_stuck


def search(config: TuneConfig, trials: Trials, tracking: Tracking, parent: TrackedRun) -> None:
    """Run trials until every point has been tried or the budget is used up."""
    # Ray's newer console prints a table for every trial, and its loggers write files for each;
    # `Recorder` prints and stores the results instead. Ray's SIGINT handler is off so that Ctrl-C
    # ends a search as it ends every other command.
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    workers = config.cluster
    # A trial with several workers only waits for them, and Ray Train starts all of them or none. If
    # the trial held a core itself, trials could starve their own workers.
    needed = resources(workers) if workers.max_workers == 1 else {"memory": 1 << 20}
    room = max(1, num_places(workers) // workers.max_workers)
    concurrent = min(config.search.max_concurrent or room, room)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    halting = Halting(trials)
    if config.search.stopping is not Stopping.none and halting.grace >= halting.budget:
        print(
            "no trial is stopped early: train.free_fraction, train.rate_warmup_fraction or"
            " search.grace_fraction forbid it until the end of a run",
            flush=True,
        )
    logging.getLogger("ray.tune.analysis").setLevel(
        logging.ERROR
    )  # which misses the loggers' files
    try:
        tuner = Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(trial, config=config), needed),
            tune_config=ray.tune.TuneConfig(
                search_alg=Proposer(trials),
                scheduler=halting,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                # Starting a process and importing PyTorch can take longer than a short trial.
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name=config.search_name,
                **ray_storage(config.storage.root),
                failure_config=FailureConfig(max_failures=workers.max_failures),
                stop=Budget(trials),
                verbose=0,
                callbacks=[Recorder(trials, tracking, parent)],
            ),
        )
        tuner.fit()
    except OSError as error:
        raise UserError(
            f"Ray cannot keep its records in {config.storage.root}/ray ({error}); once the storage"
            " answers, the same command continues the search"
        ) from error


def trial(row: dict[str, Any], config: TuneConfig) -> None:
    """Train and measure one trial; Ray Tune calls this, and gets the validations as reports.

    A single worker trains in this process, which Ray Tune reuses for the next trial; several
    workers are started by Ray Train. A UserError is reported, since a retry would fail again; other
    errors are raised, so that Ray Tune retries the trial.
    """
    typed = trial_config(config, row["point"])
    with heartbeat(typed.run_name):
        _train_and_measure(typed, row["point"], config)


def _train_and_measure(typed: TrainConfig, point: Point, config: TuneConfig) -> None:
    run = Run.of(typed)
    try:
        if not run.is_finished:
            launch.check(typed)
            run.keep_options(typed)
            if typed.cluster.max_workers == 1:
                device = torch.device("cuda" if typed.cluster.use_gpu else "cpu")
                gauges = launch.Gauges(typed.run_name)
                launch.complete(
                    typed, device=device, on_validation=ray.tune.report, on_report=gauges.set
                )
            else:
                launch.fit(typed, callbacks=[TuneReportCallback()])
        if typed.cluster.max_workers == 1:
            values = measure(config, point, run)
        else:
            held = resources(typed.cluster)
            # "DEFAULT" allows any node. Without it, Ray would place the task in this trial's own
            # placement group, which has no core.
            task = ray.remote(
                num_cpus=held["CPU"], num_gpus=held.get("GPU", 0), scheduling_strategy="DEFAULT"
            )(measure)
            values = ray.get(task.remote(config, point, run))
    except UserError as error:
        ray.tune.report({"error": str(error)})
    else:
        ray.tune.report(
            {"images": typed.train.num_steps * typed.train.global_batch, "values": values}
        )


def measure(config: TuneConfig, point: Point, run: Run) -> dict[str, float | None]:
    """Measure ``goals.QUANTITIES`` of a run's final model on validation images.

    The evaluation is stored with the run, and so are the figures as TensorBoard hyperparameters.
    """
    # It loads matplotlib: a trial is measured after its training, if at all.
    from pipeline.evaluation import evaluation

    search = config.search
    bounds = BoundOptions(
        samples=search.samples, num_images=search.num_images, pictures=10, seed=config.train.seed
    )
    measured = evaluation.evaluate_run(run, bounds, config.storage, search.probe_images)["valid"]
    speeds = [row["train/images_per_s"] for row in run.rows() if "train/images_per_s" in row]
    found = Measurements(measured, search.samples, speeds)
    values: dict[str, float | None] = {}
    for quantity in QUANTITIES.values():
        values |= quantity.measure(found)
    if missing := search.goals.quantities - values.keys():
        raise UserError(
            f"{', '.join(sorted(missing))} cannot be measured: "
            + measured.get("probe_skipped", "the images have no labels")
        )
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            measures = {f"trial/{name}": values[name] for name in QUANTITIES if name in values}
            for summary in hparams(point, measures):
                writer.file_writer.add_summary(summary)
            for name, value in measures.items():
                writer.add_scalar(name, value)
        (events,) = Path(folder).iterdir()
        run.storage.upload(f"{TENSORBOARD}/events.out.tfevents.hparams", events)
    return values


class Proposer(Searcher):
    """Tells Ray Tune which trial to run next."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        row = self.trials.next()
        if row is None:
            return None if self.trials.may_give_again() else Searcher.FINISHED
        self.trials.begin(row)
        return {"number": row.number, "point": row.point}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "wb").close()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search resumes from its own records")


class Halting(FIFOScheduler):
    """Records what trials report, and stops those that perform worse than the others."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials
        train = trials.config.train
        self.budget = train.num_steps * train.global_batch
        self.grace = trials.config.grace_images

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        row = self.trials.numbered(trial.config["number"])
        if "error" in result:
            row.status, row.error = Status.failed, result["error"]
        elif "values/nll" in result:  # Ray Tune flattens what is reported
            values = {
                key.removeprefix("values/"): value
                for key, value in result.items()
                if key.startswith("values/")
            }
            row.status, row.images, row.values = Status.finished, result["images"], values
        elif result["images"] > row.images:
            entry = {
                "images": result["images"],
                "nll": result["elbo_nats"],
                "seconds": self.trials.seconds(),
            }
            row.curve.append(entry | {name: result[name] for name in ON_THE_WAY if name in result})
            row.images = result["images"]
            search = self.trials.config.search
            if is_outperformed(search, self.budget, self.grace, row, self.trials.rows):
                row.status = Status.stopped
        self.trials.save(row)
        return self.CONTINUE if row.status in (Status.running, Status.finished) else self.STOP


class Budget(Stopper):
    """Ends a search when its hours or core-hours are used up."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.trials.exhausted()


class Recorder(Callback):
    """Prints a line for every event of a trial, records how it ended, and tracks it in MLflow."""

    def __init__(self, trials: Trials, tracking: Tracking, parent: TrackedRun) -> None:
        self.trials, self.tracking, self.parent = trials, tracking, parent
        self.manifest: str = trials.storage.read_json(RECORD)["manifest"]
        self.tracked: dict[int, TrackedRun] = {}
        self.heartbeats = Heartbeats(float(os.environ[HEALTH_CHECK_TIMEOUT]))
        self.checked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """An empty state: Ray Tune pickles its callbacks, but a tracking thread has no pickle.

        The pickle is never read back.
        """
        return {}

    def _say(self, row: Trial, text: str) -> None:
        print(
            f"trial {row.number}/{self.trials.config.search.num_trials} "
            f" {describe(row.point)}: {text}",
            flush=True,
        )

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        row = self.trials.numbered(trial.config["number"])
        self.heartbeats.expect(row.run)
        self.trials.clocks[row.number] = time.monotonic()
        self._say(row, f"resumed after {row.images:,} images" if row.images else "started")
        config = trial_config(self.trials.config, row.point)
        self.tracked[row.number] = training_run(
            Run.of(config), to_dict(config), self.manifest, self.parent
        )
        self.tracking.follow(self.tracked[row.number])

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Kill processes of trials that give no sign of life; Ray Tune then retries the trials."""
        if time.monotonic() - self.checked < HEARTBEAT_SECONDS:
            return
        self.checked = time.monotonic()
        for trial in trials:
            actor = trial.temporary_state.ray_actor
            if trial.status != TuneTrial.RUNNING or actor is None:
                continue
            row = self.trials.numbered(trial.config["number"])
            if self.heartbeats.is_lost(row.run):
                self._say(row, f"no sign of life for {self.heartbeats.limit:g} s")
                ray.kill(actor)
                self.heartbeats.expect(row.run)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        row = self.trials.numbered(trial.config["number"])
        ended: dict[Status, tracking.Status] = {
            Status.failed: "FAILED",
            Status.running: "KILLED",
        }
        self.tracking.end(self.tracked[row.number], ended.get(row.status, "FINISHED"))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        row = self.trials.numbered(trial.config["number"])
        if row.status is Status.finished:
            values = row.values or {}
            text = f"NLL <= {values['nll']:.2f} nats, rate {values['rate_bits']:.1f} bits"
            if "probe_accuracy" in values:
                text += f", probe {100 * values['probe_accuracy']:.1f} %"
            self._say(row, f"finished, {text}")
        elif row.status is Status.failed:
            self._say(row, f"failed: {row.error}")
        else:
            text = (
                f"{result['images']:,} images, {result['elbo_nats']:.2f} nats, rate"
                f" {result['rate_bits']:.1f} bits"
            )
            self._say(row, text + (": stopped early" if row.status is Status.stopped else ""))

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        row = self.trials.numbered(trial.config["number"])
        row.failures += 1
        self.trials.save(row)
        reason = take_stuck(row.run) or "its process was lost"
        self._say(row, f"{reason}; retry {row.failures}")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        row = self.trials.numbered(trial.config["number"])
        reason = last_line(trial.get_error())
        # Ray Tune gives a trial up, whatever retries it has left, if two calls of one process fail
        # together.
        if self.trials.give_again(row):
            self.tracking.end(self.tracked[row.number], "KILLED")
            self._say(row, f"{reason}; retry {row.failures}")
            return
        row.status, row.error = Status.failed, reason
        self.trials.save(row)
        self.tracking.end(self.tracked[row.number], "FAILED")
        self._say(row, f"failed: {row.error}")
