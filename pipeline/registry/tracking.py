"""Training runs in MLflow: what each was started with, and its metrics as it goes on.

A run's own folder is what counts; its copy in MLflow is found again by the tag ``run``, the
folder's address. So a run that is resumed goes on in the same MLflow run, and what a server that
was away has missed is made up for later, from ``metrics.jsonl``. Only the driver of a run writes to
MLflow: by default the registry is a SQLite file, which workers on other machines could not reach.
"""

import importlib.metadata
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pipeline.config import options, sections
from pipeline.config.options import identity
from pipeline.config.run import TrainConfig
from pipeline.runs import read_rows
from pipeline.storage.base import Storage

Status = Literal["FINISHED", "FAILED", "KILLED"]

SYNC_SECONDS = 5.0
"""How often a run's copy is brought up to date."""
STALE_SECONDS = 15 * 60
"""A run that nobody has followed for so long has lost its driver."""
FAREWELL_SECONDS = 20.0
"""How long the end of a command waits for a server that does not answer."""
MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""MLflow takes no more in one request."""
FOLLOWED = "followed"
"""The tag with the time, in seconds, at which a run's driver was last heard of."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrackedRun:
    """A run's folder, and what MLflow is told of it.

    ``parameters`` are what makes it this run: with others, a folder of the same address is another
    run. ``parent`` is the search that it is a trial of.
    """

    folder: Storage
    name: str
    experiment: str
    parameters: Mapping[str, Any]
    parent: "TrackedRun | None" = None
    run_id: str | None = field(
        default=None, init=False
    )  # MLflow's; none while it is not known whether there is one
    finished: bool = field(default=False, init=False)  # by an earlier command
    logged: dict[str, int] = field(
        default_factory=dict, init=False
    )  # the last step that MLflow has of each metric


def training_run(
    folder: Storage,
    config: Mapping[str, Any],
    manifest_digest: str,
    parent: TrackedRun | None = None,
) -> TrackedRun:
    """What MLflow is told of a training run, from its configuration as plain values."""
    parameters = {"manifest": manifest_digest} | {
        f"{part}.{key}": value
        for part, values in identity(TrainConfig, config).items()
        for key, value in values.items()
    }
    return TrackedRun(
        folder, folder.url.rpartition("/")[2], config["dataset"]["name"], parameters, parent
    )


class Connection:
    """MLflow's client, and what it keeps of runs. Every method raises what MLflow does if there is
    no answer.
    """

    def __init__(self, config: sections.RegistryOptions) -> None:
        for setting, value in QUIET.items():
            os.environ.setdefault(setting, value)
        from mlflow import (
            MlflowClient,  # it takes seconds, which only those who connect have to spend
        )

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(
            logging.ERROR
        )  # it would tell of every attempt
        if config.uri.startswith("sqlite:///"):
            create_database(Path(config.uri.removeprefix("sqlite:///")).absolute())
        self.client = MlflowClient(config.uri, config.uri)
        # A server keeps files where it was started to, and its clients need no access to that
        # place.
        self.artifacts = None if config.uri.startswith("http") else config.artifacts

    def sync(self, run: TrackedRun) -> str:
        """Bring a run's copy up to date, and make it if there is none; returns MLflow's id of it.

        After an error, nothing is taken for known: the next call asks MLflow again what it has.
        """
        from mlflow.entities import Metric

        try:
            run_id = run.run_id = run.run_id or self._open(run)
            now = int(time.time() * 1000)
            new = [
                Metric(name, value, now, int(row["step"]))
                for row in read_rows(run.folder)
                for name, value in row.items()
                if name != "step" and row["step"] > run.logged.get(name, -1)
            ]
            for start in range(0, len(new), MOST_METRICS):
                self.client.log_batch(run_id, metrics=new[start : start + MOST_METRICS])
            run.logged |= {metric.key: metric.step for metric in new}
            self.client.set_tag(run_id, FOLLOWED, _now())
        except BaseException:
            run.run_id = None
            raise
        return run_id

    def end(self, run: TrackedRun, status: Status) -> None:
        """Mark a run that is up to date as finished, failed or killed; it stays finished if it was
        before.
        """
        if not run.finished:
            self.client.set_terminated(run.run_id, status)

    def _open(self, run: TrackedRun) -> str:
        """The id of the MLflow run that is the copy of ``run``, which is running from now on; what
        it has of metrics is noted.
        """
        from mlflow.entities import Param

        experiment = self._experiment(run.experiment)
        self._mark_the_abandoned(experiment)
        tags = {"run": run.folder.url, "code_version": code_version(), FOLLOWED: _now()}
        parameters = {key: str(value) for key, value in run.parameters.items()}
        quote = "'" if '"' in run.folder.url else '"'
        of_this_folder = f"tags.run = {quote}{run.folder.url}{quote}"
        for kept in self.client.search_runs(
            [experiment], of_this_folder, order_by=["attributes.start_time DESC"]
        ):
            if all(kept.data.params.get(key, value) == value for key, value in parameters.items()):
                break
        else:
            kept = self.client.create_run(experiment, run_name=run.name, tags=tags)
        run_id = str(kept.info.run_id)
        if run.parent:
            self.client.set_tag(
                run_id, "mlflow.parentRunId", run.parent.run_id or self.sync(run.parent)
            )
        missing = [
            Param(key, value) for key, value in parameters.items() if key not in kept.data.params
        ]
        for start in range(0, len(missing), MOST_PARAMETERS):
            self.client.log_batch(run_id, params=missing[start : start + MOST_PARAMETERS])
        run.logged = {
            name: max(metric.step for metric in self.client.get_metric_history(run_id, name))
            for name in kept.data.metrics
        }
        run.finished = kept.info.status == "FINISHED"
        if kept.info.status in ("FAILED", "KILLED"):
            self.client.update_run(run_id, "RUNNING")
        return run_id

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is made if there is none. One that keeps its files
        elsewhere is another.
        """
        from mlflow.exceptions import MlflowException

        location = f"{self.artifacts}/{name}" if self.artifacts else None
        found = self.client.get_experiment_by_name(name)
        if found and location and found.artifact_location != location:
            name = f"{name}-{options.digest(location)}"
            found = self.client.get_experiment_by_name(name)
        if not found:
            try:
                return str(self.client.create_experiment(name, location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was as quick
                    raise
                found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _mark_the_abandoned(self, experiment: str) -> None:
        """Have no run said to be running whose driver was killed, and which nobody has started
        again.
        """
        for other in self.client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            heard = other.data.tags.get(FOLLOWED)
            if heard and time.time() - int(heard) > STALE_SECONDS:
                self.client.set_terminated(other.info.run_id, "KILLED", end_time=int(heard) * 1000)


class Tracking:
    """Keeps MLflow's copies of runs up to date, in the background, while the body of ``with`` runs.

    It never ends a run or slows it: while MLflow does not answer there is a warning, and what was
    missed is caught up with. Runs that are still followed at the end are finished, or failed or
    killed if the body ended by an error or an interruption.
    """

    def __init__(self, config: sections.RegistryOptions) -> None:
        self.config = config
        self._runs: dict[
            TrackedRun, Status | None
        ] = {}  # those that are not over in MLflow, and how they ended
        self._silent: set[TrackedRun] = set()  # those that have had their warning
        self._connection: Connection | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def follow(self, run: TrackedRun) -> None:
        """Begin to keep a run up to date."""
        with self._lock:
            self._runs[run] = None

    def end(self, run: TrackedRun, status: Status) -> None:
        """Say how a run ended, and follow it no longer."""
        with self._lock:
            self._runs[run] = status

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status: Status = (
            "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        )
        with self._lock:
            self._runs = {run: ended or status for run, ended in self._runs.items()}
        self._over.set()
        self._thread.join(FAREWELL_SECONDS)
        if self._runs:
            logger.warning(
                "MLflow at %s is not up to date with %s; the same command brings it up to date when"
                " it answers again",
                self.config.uri,
                ", ".join(run.name for run in self._runs),
            )

    def _work(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()
            with self._lock:
                runs = dict(self._runs)
            for run, status in runs.items():
                self._bring_up_to_date(run, status)
            self._over.wait(SYNC_SECONDS)

    def _bring_up_to_date(self, run: TrackedRun, status: Status | None) -> None:
        try:
            self._connection = self._connection or Connection(self.config)
            self._connection.sync(run)
            if status:
                self._connection.end(run, status)
                with self._lock:
                    del self._runs[run]
            self._silent.discard(run)
        except Exception as error:  # noqa: BLE001  (whatever it is, the run goes on)
            if run not in self._silent:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning(
                    "MLflow at %s is not told of %s for now: %s", self.config.uri, run.name, reason
                )
            self._silent.add(run)


def create_database(path: Path) -> None:
    """Make MLflow's SQLite database, if there is none.

    Of two processes that make its tables at once one would fail, and one that is killed meanwhile
    would leave half of them. So they are made in a file of another name, which becomes the database
    when it is complete, unless another was faster.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
        with suppress(FileExistsError):
            os.link(made, path)


def code_version() -> str:
    """The commit of the checkout that this code is in, with ``+changes`` if it differs from that;
    else the installed package's version.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if git(
            "ls-files", Path(__file__).name
        ):  # and not merely somewhere below another project's checkout
            return git("rev-parse", "HEAD") + (
                "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
            )
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("vlae-pipeline")
    return "unknown"


def _now() -> str:
    return str(int(time.time()))
