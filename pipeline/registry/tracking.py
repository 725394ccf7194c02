"""Training runs in MLflow: the parameters of each, and its metrics while it is training.

The run's own folder is authoritative. Its copy in MLflow has the folder's address as the tag
``run``, so that a resumed run continues in the same MLflow run, and rows that a server missed
while it was down are sent later, from its log. Only the driver of a run writes to MLflow:
by default the registry is a SQLite file, which workers on other machines could not reach.
"""

import importlib.metadata
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from pipeline.config import options, sections
from pipeline.config.options import identity
from pipeline.config.run import TrainConfig
from pipeline.registry.lineage import Data, data_input
from pipeline.runs import MetricReader, Run
from pipeline.storage.base import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

SYNC_SECONDS = 5.0
"""Seconds between two updates of a run's copy."""
STALE_SECONDS = 15 * 60
"""A running run without an update for this long is considered abandoned: its driver was killed."""
FINAL_SYNC_SECONDS = 20.0
"""How long the end of a command waits for a server that does not answer."""
MAX_METRICS, MAX_PARAMETERS = 1000, 100
"""MLflow's limits for one request."""
REPEATABLE = (
    "log_batch",
    "log_inputs",
    "set_registered_model_alias",
    "set_registered_model_tag",
    "set_tag",
)
"""The methods of MLflow's client by which several people write the same.

A second call with the same arguments changes nothing.
"""
FOLLOWED = "followed"
"""The tag with the time, in seconds, of the driver's last update."""

MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings that keep MLflow quiet, unless the user has set them."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrackedRun:
    """A training run or a search, and its copy in MLflow."""

    folder: Storage
    name: str
    experiment: str
    parameters: Mapping[str, Any]
    """They identify the run: with other parameters, the same folder is another MLflow run."""
    parent: "TrackedRun | None" = None
    """The search that the run is a trial of."""
    data: Data | None = None
    """The data set that it is trained on."""
    run_id: str | None = field(default=None, init=False)
    """MLflow's id; none until MLflow was asked whether the run exists."""
    finished: bool = field(default=False, init=False)
    """Whether an earlier command finished it."""
    logged: dict[str, int] = field(default_factory=dict, init=False)
    """The last step of each metric that MLflow has."""
    log: MetricReader = field(init=False)
    """Reads the rows that were logged since the last update."""


def training_run(
    run: Run,
    config: Mapping[str, Any],
    manifest_digest: str,
    parent: TrackedRun | None = None,
) -> TrackedRun:
    """A training run as MLflow tracks it; ``config`` is its configuration as plain values."""
    parameters = {"manifest": manifest_digest} | {
        f"{part}.{key}": value
        for part, values in identity(TrainConfig, config).items()
        for key, value in values.items()
    }
    dataset = config["dataset"]
    data = Data(dataset["name"], dataset["url"], manifest_digest)
    return TrackedRun(run.storage, run.name, dataset["name"], parameters, parent, data)


class Connection:
    """MLflow's client for the copies of runs.

    Every method raises MLflow's exception if the server does not answer.
    """

    def __init__(self, config: sections.RegistryOptions) -> None:
        for setting, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(setting, value)
        from mlflow import MlflowClient  # here, since it takes seconds

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # urllib3 would log every attempt.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        if config.uri.startswith("sqlite:///"):
            create_database(Path(config.uri.removeprefix("sqlite:///")).absolute())
        self.client = MlflowClient(config.uri, config.uri)
        for name in REPEATABLE:
            setattr(self.client, name, partial(past_conflict, self.client, name))
        # A server decides itself where files are kept; its clients need no access to that place.
        self.artifacts = None if config.uri.startswith("http") else config.artifacts

    def sync(self, run: TrackedRun) -> str:
        """Update a run's copy, or create it; returns its id in MLflow.

        After an error, the next call asks MLflow again what the copy contains.
        """
        from mlflow.entities import Metric

        try:
            run_id = run.run_id = run.run_id or self._open(run)
            now = int(time.time() * 1000)
            new = [
                Metric(name, value, now, int(row["step"]))
                for row in run.log.rows()
                for name, value in row.items()
                if name != "step" and row["step"] > run.logged.get(name, -1)
            ]
            for start in range(0, len(new), MAX_METRICS):
                self.client.log_batch(run_id, metrics=new[start : start + MAX_METRICS])
            run.logged |= {metric.key: metric.step for metric in new}
            self.client.set_tag(run_id, FOLLOWED, _now())
        except BaseException:
            run.run_id = None
            raise
        return run_id

    def end(self, run: TrackedRun, status: Status) -> None:
        """Mark an updated run as finished, failed or killed; a finished one stays finished."""
        if not run.finished:
            self.client.set_terminated(run.run_id, status)

    def _open(self, run: TrackedRun) -> str:
        """Find or create the copy of ``run``, mark it as running, and note which metrics it has.

        Returns its id.
        """
        from mlflow.entities import Param

        experiment = self._experiment(run.experiment)
        self._mark_abandoned(experiment)
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
            parent = run.parent.run_id or self.sync(run.parent)
            self.client.set_tag(run_id, "mlflow.parentRunId", parent)
        if run.data and not (kept.inputs and kept.inputs.dataset_inputs):
            self.client.log_inputs(run_id, [data_input(run.data)])
        missing = [
            Param(key, value) for key, value in parameters.items() if key not in kept.data.params
        ]
        for start in range(0, len(missing), MAX_PARAMETERS):
            self.client.log_batch(run_id, params=missing[start : start + MAX_PARAMETERS])
        run.logged = {
            name: max(metric.step for metric in self.client.get_metric_history(run_id, name))
            for name in kept.data.metrics
        }
        run.log = MetricReader(run.folder)
        run.finished = kept.info.status == "FINISHED"
        if kept.info.status in ("FAILED", "KILLED"):
            self.client.update_run(run_id, "RUNNING")
        return run_id

    def _experiment(self, name: str) -> str:
        """The id of an experiment, created if necessary.

        An experiment of this name that keeps its files elsewhere is another one: then the name gets
        a suffix.
        """
        location = f"{self.artifacts}/{name}" if self.artifacts else None
        found = self.client.get_experiment_by_name(name)
        if found and location and found.artifact_location != location:
            name = f"{name}-{options.digest(location)}"
            found = self.client.get_experiment_by_name(name)
        if not found:
            with ignore_existing():
                return str(self.client.create_experiment(name, location))
            found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _mark_abandoned(self, experiment: str) -> None:
        """Mark running runs as killed that have had no update for ``STALE_SECONDS``."""
        for other in self.client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            followed = other.data.tags.get(FOLLOWED)
            if followed and time.time() - int(followed) > STALE_SECONDS:
                ended = int(followed) * 1000
                self.client.set_terminated(other.info.run_id, "KILLED", end_time=ended)


class Tracking:
    """Keeps MLflow's copies of runs up to date in the background while the body of ``with`` runs.

    It never ends or slows down a run: while MLflow does not answer there is a warning, and missing
    rows are sent later. Runs that are still followed at the end are marked as finished, or as
    failed or killed if the body ended by an error or an interruption.
    """

    def __init__(self, config: sections.RegistryOptions) -> None:
        self.config = config
        self._runs: dict[TrackedRun, Status | None] = {}
        """The runs whose end is not in MLflow yet, each with its status once it has ended."""
        self._warned: set[TrackedRun] = set()
        self._connection: Connection | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def follow(self, run: TrackedRun) -> None:
        """Keep a run up to date from now on."""
        with self._lock:
            self._runs[run] = None

    def end(self, run: TrackedRun, status: Status) -> None:
        """Record how a run ended; after one last update it is no longer followed."""
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
        self._thread.join(FINAL_SYNC_SECONDS)
        if self._runs:
            logger.warning(
                "MLflow at %s has not received everything about %s; repeat the command when it"
                " answers again",
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
                self._sync(run, status)
            self._over.wait(SYNC_SECONDS)

    def _sync(self, run: TrackedRun, status: Status | None) -> None:
        try:
            self._connection = self._connection or Connection(self.config)
            self._connection.sync(run)
            if status:
                self._connection.end(run, status)
                with self._lock:
                    del self._runs[run]
            self._warned.discard(run)
        except Exception as error:  # noqa: BLE001  (tracking must not end a run)
            if run not in self._warned:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning(
                    "MLflow at %s does not accept updates of %s at present: %s",
                    self.config.uri,
                    run.name,
                    reason,
                )
            self._warned.add(run)


def create_database(path: Path) -> None:
    """Create MLflow's SQLite database if it does not exist.

    If two processes created its tables at once, one would fail, and a process killed meanwhile
    would leave half of them. So the tables are created in a temporary file, which takes the
    database's name when it is complete, unless another process was faster.
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
    """The commit of this code's checkout, with ``+changes`` if files differ from it.

    Outside a checkout, the version of the installed package.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        # The package may be installed below another project's checkout.
        if git("ls-files", Path(__file__).name):
            return git("rev-parse", "HEAD") + (
                "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
            )
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("vlae-pipeline")
    return "unknown"


def _now() -> str:
    return str(int(time.time()))


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Have MLflow's client give up on a server within seconds; by default it tries for minutes.

    Settings of the user's own take precedence.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def ignore_existing() -> Iterator[None]:
    """Ignore that what the body creates exists: somebody else may have created it meanwhile."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def past_conflict(
    client: "MlflowClient", method: str, *arguments: object, **options: object
) -> None:
    """Write to MLflow; once more if somebody else has written the same at the same time.

    MLflow looks for a row, and inserts it if there is none. Of two clients that do so at once, the
    database refuses the second, which finds the row when it writes again.
    """
    from mlflow.exceptions import MlflowException

    write = partial(getattr(type(client), method), client, *arguments, **options)
    try:
        write()
    except MlflowException as error:
        if "unique" not in str(error).lower():
            raise
        write()
