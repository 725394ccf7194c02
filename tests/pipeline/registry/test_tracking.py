"""Tracking: each run has one copy in MLflow, whatever is killed or down, and is never delayed."""

import logging
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipeline import commands
from pipeline.config import sections
from pipeline.config.options import to_dict
from pipeline.errors import Interrupted
from pipeline.registry import tracking
from pipeline.registry.tracking import Connection, TrackedRun, Tracking, training_run
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.training.metrics import MetricLog

SETTINGS = to_dict(commands.load("train", ["model=tiny"]))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> sections.RegistryOptions:
    """A registry for all tests of this file, since creating its tables takes seconds."""
    folder = tmp_path_factory.mktemp("registry")
    options = sections.RegistryOptions(
        uri=f"sqlite:///{folder / 'registry.db'}", artifacts=str(folder / "artifacts")
    )
    Connection(options)
    return options


@pytest.fixture
def client(options: sections.RegistryOptions) -> MlflowClient:
    return MlflowClient(options.uri, options.uri)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SYNC_SECONDS", 0.05)


def a_run(folder: Storage, **model: int) -> TrackedRun:
    return training_run(
        Run(folder), {**SETTINGS, "model": {**SETTINGS["model"], **model}}, "d" * 64
    )


def log(folder: Storage, steps: range) -> None:
    """Log rows as training does, after those in the log."""
    with MetricLog(folder, steps.start - 1, writes=True) as metrics:
        for step in steps:
            metrics.add(step, {"images": 8 * step, "train/code_length": 100.0 - step})
            if step % 2 == 0:
                metrics.add(
                    step,
                    {
                        "valid/images": 8 * step,
                        "valid/elbo_nats": 90.0 - step,
                        "valid/elbo_nats_se": None,
                    },
                )
        metrics.flush()


def copies(client: MlflowClient, folder: Storage) -> list[MlflowRun]:
    experiment = client.get_experiment_by_name("mnist")
    return list(client.search_runs([experiment.experiment_id], f"tags.run = '{folder.url}'"))


def history(client: MlflowClient, run: MlflowRun, name: str) -> list[tuple[int, float]]:
    return [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)
    ]


def test_a_run_has_its_parameters_manifest_code_version_and_every_row_of_its_metrics(
    options: sections.RegistryOptions, client: MlflowClient, storage: Storage
) -> None:
    log(storage, range(1, 4))
    with Tracking(options) as tracked:
        tracked.follow(a_run(storage))
        log(storage, range(4, 6))
    (run,) = copies(client, storage)
    assert run.info.status == "FINISHED"
    assert run.data.params["manifest"] == "d" * 64
    assert run.data.params["model.window"] == "3x1"
    assert run.data.params["train.images"] == "1000000"
    assert run.data.tags["code_version"] == tracking.code_version()
    assert history(client, run, "train/code_length") == [
        (step, 100.0 - step) for step in range(1, 6)
    ]
    assert history(client, run, "valid/elbo_nats") == [(2, 88.0), (4, 86.0)]


def test_a_resumed_run_continues_in_its_mlflow_run_without_duplicate_rows(
    options: sections.RegistryOptions, client: MlflowClient, tmp_path: Path
) -> None:
    folder = open_storage(str(tmp_path))
    log(folder, range(1, 7))
    for error, status in (
        (ZeroDivisionError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Interrupted("", 15), "KILLED"),
    ):
        with suppress(type(error)), Tracking(options) as tracked:
            tracked.follow(a_run(folder))
            raise error
        assert [run.info.status for run in copies(client, folder)] == [status]
    log(folder, range(4, 10))  # from the checkpoint of step 3
    with Tracking(options) as tracked:
        tracked.follow(a_run(folder))
    (run,) = copies(client, folder)
    assert run.info.status == "FINISHED"
    assert history(client, run, "images") == [(step, 8.0 * step) for step in range(1, 10)]


def test_another_configuration_in_a_folder_of_the_same_name_is_another_run(
    options: sections.RegistryOptions, client: MlflowClient, tmp_path: Path
) -> None:
    folder = open_storage(str(tmp_path))
    for latents in (4, 8, 4):
        with Tracking(options) as tracked:
            tracked.follow(a_run(folder, latents=latents))
    assert sorted(run.data.params["model.latents"] for run in copies(client, folder)) == ["4", "8"]


def test_trials_are_children_of_their_search(
    options: sections.RegistryOptions, client: MlflowClient, tmp_path: Path
) -> None:
    folder = open_storage(str(tmp_path))
    search = TrackedRun(folder, "search", "mnist", {"searcher": "optuna"})
    with Tracking(options) as tracked:
        tracked.follow(search)
        for number, status in enumerate(("FINISHED", "KILLED", "FAILED")):
            child = folder.child(f"trial-{number}")
            trial = training_run(Run(child), SETTINGS, "d" * 64, search)
            tracked.follow(trial)
            log(child, range(1, 3))
            tracked.end(trial, status)
    (parent,) = copies(client, folder)
    assert parent.info.status == "FINISHED"
    for number, status in enumerate(("FINISHED", "KILLED", "FAILED")):
        (trial_run,) = copies(client, folder.child(f"trial-{number}"))
        assert trial_run.info.status == status
        assert trial_run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert history(client, trial_run, "images") == [(1, 8.0), (2, 16.0)]


KILLED = """
import os, signal, sys, time
from pipeline import commands
from pipeline.config.options import to_dict
from pipeline.config.sections import RegistryOptions
from pipeline.registry.tracking import Tracking, training_run
from pipeline.runs import Run

uri, artifacts, folder = sys.argv[1:]
settings = to_dict(commands.load("train", ["model=tiny"]))
with Tracking(RegistryOptions(uri=uri, artifacts=artifacts)) as tracked:
    run = training_run(Run.at(folder), settings, "d" * 64)
    tracked.follow(run)
    while not run.logged:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_run_of_a_killed_driver_does_not_stay_running(
    options: sections.RegistryOptions,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, other = open_storage(str(tmp_path / "killed")), open_storage(str(tmp_path / "other"))
    log(folder, range(1, 5))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, options.uri, options.artifacts, folder.url],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert [run.info.status for run in copies(client, folder)] == ["RUNNING"]
    monkeypatch.setattr(tracking, "STALE_SECONDS", -2)
    with Tracking(options) as tracked:
        tracked.follow(a_run(other))
    assert [run.info.status for run in copies(client, folder)] == ["KILLED"]
    with Tracking(options) as tracked:
        tracked.follow(a_run(folder))
    (run,) = copies(client, folder)
    assert run.info.status == "FINISHED"
    assert history(client, run, "images") == [(step, 8.0 * step) for step in range(1, 5)]


def test_while_the_registry_is_unavailable_there_is_a_warning_and_rows_are_sent_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, blocked = open_storage(str(tmp_path / "run")), tmp_path / "file"
    log(folder, range(1, 4))
    blocked.write_text("no folder")
    options = sections.RegistryOptions(
        uri=f"sqlite:///{blocked}/registry.db", artifacts=str(tmp_path / "artifacts")
    )
    with caplog.at_level(logging.WARNING), Tracking(options) as tracked:
        tracked.follow(a_run(folder))
        while not caplog.messages:
            time.sleep(0.01)
        blocked.unlink()
    first, *others = caplog.messages
    assert first.startswith(f"MLflow at {options.uri} does not accept updates of run at present: ")
    assert not others
    (run,) = copies(MlflowClient(options.uri, options.uri), folder)
    assert run.info.status == "FINISHED"
    assert history(MlflowClient(options.uri, options.uri), run, "images") == [
        (1, 8.0),
        (2, 16.0),
        (3, 24.0),
    ]
    assert Run(folder).rows()


CREATE = """
import sys
from pipeline.config.sections import RegistryOptions
from pipeline.registry.tracking import Connection

print("ready", flush=True)
sys.stdin.readline()
connection = Connection(RegistryOptions(uri=sys.argv[1], artifacts="."))
connection.client.create_experiment(sys.argv[2])
"""


def test_two_processes_can_create_the_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'fresh.db'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, uri, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    printed = [process.communicate(b"go\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    names = {experiment.name for experiment in MlflowClient(uri, uri).search_experiments()}
    assert names == {"Default", "one", "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["fresh.db"]
