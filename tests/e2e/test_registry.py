"""A team's registry: MLflow's server on PostgreSQL, files in S3, and users without an S3 key."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric, Param

from pipeline.config.sections import StorageOptions
from pipeline.registry import lineage, tracking
from pipeline.registry.models import open_model
from pipeline.registry.tracking import Tracking, training_run
from pipeline.registry.versions import Registry
from pipeline.runs import Run
from pipeline.storage import open_storage
from tests.faults import registry as registry_faults
from tests.pipeline.models import prepare_run
from tests.pipeline.registry.test_tracking import SETTINGS, log


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registry_faults.Team]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        with registry_faults.stage(tmp_path_factory.mktemp("team")) as team:
            yield team


def test_a_run_that_two_people_register_at_once_is_one_version(
    team: registry_faults.Team, tmp_path: Path
) -> None:
    registry_faults.check(registry_faults.at_once(0, 0), team, "at-once", tmp_path)


def test_two_clients_that_write_the_same_at_once_both_succeed(
    team: registry_faults.Team, tmp_path: Path
) -> None:
    registry = Registry(team.options)
    name, run = "same", prepare_run(open_storage(str(tmp_path)), 0)
    registry.register(name, run)
    version = registry.client.get_model_version(name, "1")
    data = lineage.Data("other", "s3://elsewhere", "e" * 64)
    writes: list[tuple[str, *tuple[Any, ...]]] = [
        ("log_batch", version.run_id, [Metric("new", 1.0, 1, 1)]),
        ("log_batch", version.run_id, [], [Param("new", "1")]),
        ("log_inputs", version.run_id, [lineage.data_input(data)]),
        ("set_registered_model_alias", name, "new", "1"),
        ("set_registered_model_tag", name, "new", "1"),
        ("set_tag", version.run_id, "new", "1"),
    ]
    for method, *arguments in writes:
        team.write_at_once(method, *arguments)
    assert {method for method, *_ in writes} == set(tracking.REPEATABLE)
    found = registry.client.get_run(version.run_id)
    assert found.data.tags["new"] == found.data.params["new"] == "1"
    assert found.data.metrics["new"] == 1.0
    assert len(found.inputs.dataset_inputs) == 2
    model = registry.client.get_registered_model(name)
    assert model.tags["new"] == model.aliases["new"] == "1"


def test_only_the_server_reads_and_writes_files_in_s3(
    team: registry_faults.Team, tmp_path: Path
) -> None:
    registry = Registry(team.options)
    registry.register("keyless", prepare_run(open_storage(str(tmp_path)), 0))
    version = registry.client.get_model_version("keyless", "1")
    assert version.source.startswith("mlflow-artifacts:/")
    folder = version.source.removeprefix("mlflow-artifacts:/").strip("/")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in team.server.environment().items():
            patch.setenv(name, value)
        kept = {Path(key).name for key in team.objects.list(folder)}
    assert {"model.safetensors", "model.json", "README.md", "samples.png"} <= kept
    assert (
        open_model("models:/keyless@champion", team.options, StorageOptions()).network.latents == 4
    )


def test_rows_of_a_run_that_trained_while_the_server_was_down_are_sent_later(
    team: registry_faults.Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINAL_SYNC_SECONDS", 300.0)  # a busy machine may take long
    folder = open_storage(str(tmp_path))
    with Tracking(team.options) as tracked:
        run = training_run(Run(folder), SETTINGS, "d" * 64)
        tracked.follow(run)
        log(folder, range(1, 4))
        team.kill()
        log(folder, range(4, 8))
        team.start()
    client = Registry(team.options).client
    history = client.get_metric_history(run.run_id, "images")
    assert [metric.step for metric in history] == list(range(1, 8))
    assert client.get_run(run.run_id).info.status == "FINISHED"
