"""A search's ``study.db`` is a study that Optuna and its dashboard open."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipeline.search import study
from pipeline.search.proposals import known
from tests.pipeline.search.test_search import rows_of_every_kind, tune_config

ONE = {"search.constraints": ["rate_bits >= 8"], "search.space.model.latents": [*range(1, 9)]}
SEVERAL = {**ONE, "search.objectives": ["max rate_bits", "min distortion_nats"]}


@contextmanager
def dashboard(database: Path) -> Iterator[str]:
    """The dashboard's address, while it shows a database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    process = subprocess.Popen(
        [program, f"sqlite:///{database}", "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str) -> Any:
    """The dashboard's answer, once it has started."""
    while True:
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return json.load(answer)
        except ConnectionRefusedError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)


def test_the_dashboard_opens_a_search_with_its_trials_directions_and_constraints(
    tmp_path: Path,
) -> None:
    config = tune_config(**SEVERAL, name="mine")
    database = tmp_path / "study.db"
    database.write_bytes(study.archive(config, rows_of_every_kind()))
    with dashboard(database) as address:
        (summary,) = ask(f"{address}/api/studies")["study_summaries"]
        assert summary["study_name"] == "mine"
        assert summary["directions"] == ["maximize", "minimize"]
        found = ask(f"{address}/api/studies/{summary['study_id']}")
    assert found["objective_names"] == ["rate_bits", "distortion_nats"]
    trials = found["trials"]
    assert [trial["state"] for trial in trials] == [
        {"finished": "Complete", "stopped early": "Pruned", "failed": "Fail"}.get(
            row.status.value, "Running"
        )
        for row in rows_of_every_kind()
    ]
    third, fourth = trials[2:4]
    assert third["values"] == [30, 70]
    assert {param["name"]: param["param_external_value"] for param in third["params"]} == {
        "model.window": "3x1",
        "model.latents": "3",
        "model.flow_depth": "2",
    }
    assert [trial["constraints"] for trial in (third, fourth)] == [[-22 / 8], [1 / 8]]
    told = {each["key"]: each["value"] for each in third["user_attrs"]}
    assert (told["trial"], told["run"]) == ("3", "run-3")


def test_optuna_reads_the_study_with_its_feasible_best_and_its_curves(tmp_path: Path) -> None:
    config = tune_config(**ONE, name="mine")
    (tmp_path / "study.db").write_bytes(study.archive(config, rows_of_every_kind()))
    found = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert found.best_trial.user_attrs["trial"] == 3
    assert found.trials[0].intermediate_values == {10_000: 101.0}
    assert found.trials[1].user_attrs["error"] == "OutOfMemoryError"
    durations = [trial.duration.total_seconds() for trial in found.trials if trial.duration]
    assert durations == pytest.approx([1.0] * 6 + [1.0])


def test_a_stopped_trial_that_broke_a_constraint_is_known_to_have_broken_it() -> None:
    search = tune_config(**ONE).search
    stopped = rows_of_every_kind()[0]
    stopped.curve[-1]["rate_bits"] = 6.0
    (seen,) = known(search, search.goals, [stopped]).trials
    assert list(seen.constraints.values()) == [0.25]
