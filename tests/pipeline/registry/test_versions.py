"""The registry on a real MLflow.

It returns what it was given, rejects mistakes in one sentence, recovers from interrupted
registrations, and unpickles nothing.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModelAlias
from sqlalchemy import event
from sqlalchemy.orm import Session

import vlae
from pipeline.config import sections
from pipeline.errors import UserError
from pipeline.registry import tracking
from pipeline.registry.tracking import TrackedRun, Tracking, training_run
from pipeline.registry.versions import Registry
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.pipeline.models import FIGURES, MODEL, prepare_run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database for all tests of this file, since creating its tables takes seconds.

    Each test uses models of its own.
    """
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'registry.db'}"


@pytest.fixture
def models(database: str, storage: Storage) -> Registry:
    return Registry(sections.RegistryOptions(uri=database, artifacts=f"{storage.url}/registry"))


@pytest.fixture
def local(database: str, tmp_path: Path) -> Registry:
    """A registry with artifacts in a folder."""
    return Registry(sections.RegistryOptions(uri=database, artifacts=str(tmp_path / "registry")))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of a model that only this test uses."""
    return request.node.name.replace("[", "-").replace("]", "")


def sentence_of(raised: pytest.ExceptionInfo[UserError]) -> str:
    return check_sentence(str(raised.value))


def check_sentence(sentence: str) -> str:
    assert sentence
    assert "\n" not in sentence
    return sentence


# --- what a version is ----------------------------------------------------------------------------


def test_a_version_holds_weights_records_pictures_and_a_card_none_of_them_a_pickle(
    models: Registry, storage: Storage, name: str, tmp_path: Path
) -> None:
    run = prepare_run(storage, 0)
    models.register(name, run)
    kept = {Path(key).name: storage.read(key) for key in storage.list("registry/")}
    records = {"model.json", "training.json", "evaluation.json", "bom.json"}
    assert kept.keys() == records | {
        "model.safetensors",
        "README.md",
        "reconstructions.png",
        "samples.png",
    }
    for file in ("model.safetensors", "model.json", "training.json"):
        assert kept[file] == run.storage.read(f"model/{file}")
    assert all(json.loads(kept[file]) for file in records)
    assert json.loads(
        kept["model.safetensors"][8 : 8 + int.from_bytes(kept["model.safetensors"][:8], "little")]
    )
    folder = models.download(name, 1, tmp_path / "there")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    loaded = vlae.load(folder)
    torch.manual_seed(0)
    expected = vlae.build(image_shape=(1, 8, 8), **MODEL).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_a_version_has_the_options_of_its_training_and_its_figures(
    models: Registry, storage: Storage, name: str, tmp_path: Path
) -> None:
    run = prepare_run(storage, 0)
    models.register(name, run)
    (row,) = models.versions(name)
    assert (row.name, row.number, row.aliases, row.run) == (name, 1, ["champion"], run.url)
    for key, value in MODEL.items():
        assert row.parameters[f"model.{key}"] == str(value)
    assert row.parameters["manifest"] == row.tags["manifest"] == "0" * 64
    assert row.parameters["train.seed"] == "0"
    assert row.tags["code_version"] == tracking.code_version()
    assert row.metrics == {f"valid/{key}": value for key, value in FIGURES.items()}
    card = (models.download(name, 1, tmp_path) / "README.md").read_text()
    for said in (
        name,
        "0" * 64,
        run.url,
        tracking.code_version(),
        "90.50 +- 0.50",
        "12.25 bits",
        "88.00 +- 0.40",
        "k = 8",
        "5.20 +- 0.05 px",
        "vlae.load",
    ):
        assert said in card
    models.log_evaluation(name, 1, "test", {"iwae_nats": 84.5})
    assert models.versions(name)[0].metrics == row.metrics | {"test/iwae_nats": 84.5}


def test_a_tracked_trial_is_registered_with_its_mlflow_run_and_its_search(
    local: Registry, tmp_path: Path, name: str
) -> None:
    folder = open_storage(str(tmp_path))
    run = prepare_run(folder, 0)
    search = TrackedRun(folder.child("search"), "a search", "mnist", {})
    with Tracking(local.config) as tracked:
        tracked.follow(
            training_run(
                run, run.storage.read_json("model/training.json")["config"], "0" * 64, search
            )
        )
    local.register(name, run)
    (row,) = local.versions(name)
    experiments = [experiment.experiment_id for experiment in local.client.search_experiments()]
    (kept,) = local.client.search_runs(experiments, f"tags.run = '{run.url}'")
    assert row.tags["run_id"] == kept.info.run_id
    assert row.tags["search_name"] == "a search"
    assert row.tags["search"] == kept.data.tags["mlflow.parentRunId"]
    assert "a search" in (local.download(name, 1, tmp_path / "there") / "README.md").read_text()


def test_a_version_is_a_logged_model_with_its_figures_its_options_and_its_data_set(
    models: Registry, storage: Storage, name: str
) -> None:
    """MLflow's tables of runs and of models show them as columns."""
    run = prepare_run(storage, 0)
    number = models.register(name, run)
    version = models.client.get_model_version(name, str(number))
    model = models.client.get_logged_model(version.tags["model_id"])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]
    assert (model.status.value, model.source_run_id) == ("READY", version.run_id)
    assert model.params["model.window"] == str(MODEL["window"])
    models.log_evaluation(name, number, "test", {"iwae_nats": 84.5})
    model = models.client.get_logged_model(model.model_id)
    shown = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in shown.items()} == {
        f"evaluation/valid/{key}": value for key, value in FIGURES.items()
    } | {"evaluation/test/iwae_nats": 84.5}
    nll = shown["evaluation/valid/iwae_nats"]
    assert (nll.dataset_name, nll.dataset_digest) == ("mnist", "0" * 36)

    tracked = models.client.get_run(version.run_id)
    assert [each.model_id for each in tracked.outputs.model_outputs] == [model.model_id]
    (used,) = tracked.inputs.dataset_inputs
    settings = run.storage.read_json("model/training.json")["config"]["dataset"]
    assert (used.dataset.name, used.dataset.digest) == ("mnist", "0" * 36)
    assert json.loads(used.dataset.source) == {"uri": settings["url"]}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]


def test_all_numbers_of_an_evaluation_are_recorded(
    local: Registry, tmp_path: Path, name: str
) -> None:
    local.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    probe = {"linear": {"accuracy": 0.9, "accuracy_se": None}}
    local.log_evaluation(
        name,
        1,
        "test",
        {
            "num_images": 1,
            "rate_nats_se": None,
            "probe": probe,
            "latents": {"rate_nats": [1.0, 2.0]},
        },
    )
    metrics = local.versions(name)[0].metrics
    assert {key: metrics[key] for key in metrics if key.startswith("test/")} == {
        "test/num_images": 1.0,
        "test/probe/linear/accuracy": 0.9,
    }


def test_the_latest_evaluation_is_shown(local: Registry, tmp_path: Path, name: str) -> None:
    local.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    local.log_evaluation(name, 1, "test", {"iwae_nats": 85.0, "iwae_samples": 16})
    local.log_evaluation(name, 1, "test", {"iwae_nats": 84.5, "iwae_samples": 64})
    metrics = local.versions(name)[0].metrics
    assert (metrics["test/iwae_nats"], metrics["test/iwae_samples"]) == (84.5, 64)


def test_aliases_move_and_the_newest_version_comes_first(
    local: Registry, tmp_path: Path, name: str
) -> None:
    storage = open_storage(str(tmp_path))
    for seed in range(3):
        assert local.register(name, prepare_run(storage, seed)) == seed + 1
    assert [(row.number, row.aliases) for row in local.versions(name)] == [
        (3, ["challenger"]),
        (2, []),
        (1, ["champion"]),
    ]
    local.set_alias(name, 3, "champion")
    assert [row.aliases for row in local.versions(name)] == [["champion"], [], []]
    local.set_alias(name, 1, "blessed")
    assert local.resolve(f"models:/{name}@blessed").number == 1
    assert local.register(name, prepare_run(storage, 1)) == 2
    assert len(local.versions(name)) == 3


# --- what is rejected ---------------------------------------------------------------------------


def test_an_error_about_a_missing_version_lists_what_exists(
    local: Registry, tmp_path: Path, name: str
) -> None:
    local.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    with pytest.raises(UserError, match=r"holds no model named absent; it holds .*") as raised:
        local.versions("absent")
    assert name in sentence_of(raised)
    for uri in (
        f"models:/{name}@nobody",
        f"models:/{name}/2",
        f"models:/{name}/champion",
        f"models:/{name}",
        f"models:/{name}/",
    ):
        with pytest.raises(
            UserError,
            match=f"^{uri} is not in the registry at .*; see `vlae registry show name={name}`$",
        ) as raised:
            local.resolve(uri)
        sentence_of(raised)
    with pytest.raises(UserError, match=f"^{name} has no version 2; it has 1$"):
        local.set_alias(name, 2, "champion")
    assert local.versions(name)[0].aliases == ["champion"]


def test_a_run_without_a_model_or_an_evaluation_is_rejected_and_leaves_no_version(
    local: Registry, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=r"there is no .*/nothing/model/model\.json") as raised:
        local.register(name, Run.at(str(tmp_path / "nothing")))
    sentence_of(raised)
    run, other = (prepare_run(open_storage(str(tmp_path)), seed) for seed in range(2))
    evaluation = run.storage.read_json("evaluation/result.json")
    for changes in (
        {"weights": other.storage.read_json("evaluation/result.json")["weights"]},
        {"pictures": []},
    ):
        run.storage.write_json("evaluation/result.json", evaluation | changes)
        with pytest.raises(
            UserError, match=rf"{run.url} has not been evaluated; `vlae registry register "
        ) as raised:
            local.register(name, run)
        sentence_of(raised)
    run.storage.delete(["evaluation/result.json"])
    with pytest.raises(UserError, match="has not been evaluated"):
        local.register(name, run)
    with pytest.raises(UserError, match="holds no model named"):
        local.versions(name)


@pytest.mark.usefixtures("storage_server")
def test_files_that_cannot_be_stored_end_in_a_sentence_and_leave_no_version(
    database: str, tmp_path: Path, name: str
) -> None:
    nowhere = Registry(
        sections.RegistryOptions(uri=database, artifacts="s3://there-is-no-such-bucket/registry")
    )
    with pytest.raises(UserError, match=r"reported an error: .*there-is-no-such-bucket") as raised:
        nowhere.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    sentence_of(raised)
    with pytest.raises(UserError, match="holds no model named"):
        nowhere.versions(name)


@pytest.mark.parametrize("odd", ["it's", "a/b", "a:b", "", 'a "good" one', "ü z%"])
def test_a_name_with_odd_characters_is_accepted_or_rejected_in_one_sentence(
    odd: str, local: Registry, tmp_path: Path
) -> None:
    run = prepare_run(open_storage(str(tmp_path)), 0)
    try:
        made = local.register(odd, run)
    except UserError as error:
        made = 0
        check_sentence(str(error))
    if made:
        assert made == 1
        assert local.resolve(f"models:/{odd}@champion").number == 1
        assert vlae.load(local.download(odd, 1, tmp_path / "there")).latents == 4


@pytest.mark.parametrize("alias", ["v1", "latest", "two words", ""])
def test_an_impossible_alias_is_rejected_in_one_sentence(
    alias: str, local: Registry, tmp_path: Path, name: str
) -> None:
    local.register(name, prepare_run(open_storage(str(tmp_path)), 0))
    with pytest.raises(UserError) as raised:
        local.set_alias(name, 1, alias)
    sentence_of(raised)


def test_an_address_that_is_no_registry_is_rejected_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the registry at ftp://x does not answer: .*; check registry\.uri"
    ) as raised:
        Registry(sections.RegistryOptions(uri="ftp://x", artifacts=str(tmp_path)))
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(60)  # MLflow's client by itself would try for minutes
@pytest.mark.parametrize("listening", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_server_that_does_not_answer_ends_in_an_error_within_seconds(
    listening: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"^the registry at {uri} does not answer: .*; check registry\.uri$"
        ) as raised:
            Registry(sections.RegistryOptions(uri=uri, artifacts=str(tmp_path)))
    sentence_of(raised)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


@pytest.mark.parametrize("path", ["file/registry.db", "file"])
def test_a_database_that_cannot_be_opened_is_rejected_in_one_sentence(
    path: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no database" * 100)
    with pytest.raises(UserError) as raised:
        Registry(
            sections.RegistryOptions(uri=f"sqlite:///{tmp_path / path}", artifacts=str(tmp_path))
        )
    sentence_of(raised)


# --- interruptions and concurrency --------------------------------------------------------------


def test_a_registration_that_was_interrupted_before_its_version_can_be_repeated(
    local: Registry, tmp_path: Path, name: str
) -> None:
    local.client.create_registered_model(name)
    assert local.register(name, prepare_run(open_storage(str(tmp_path)), 0)) == 1


def test_every_model_is_listed(local: Registry) -> None:
    names = [f"one-of-many-{number:03d}" for number in range(101)]
    for each in names:
        local.client.create_registered_model(each)
    listed = {model.name for model in local.models()}
    for each in names:
        local.client.delete_registered_model(each)
    assert set(names) <= listed


REGISTER = """
import json, sys
from pipeline.config.sections import RegistryOptions
from pipeline.registry.versions import Registry
from pipeline.runs import Run

uri, artifacts, name, *runs = sys.argv[1:]
registry = Registry(RegistryOptions(uri=uri, artifacts=artifacts))
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([registry.register(name, Run.at(run)) for run in runs]))
"""


def test_two_processes_that_register_a_new_model_at_once_lose_nothing(
    database: str, local: Registry, tmp_path: Path, name: str
) -> None:
    storage = open_storage(str(tmp_path))
    runs = [prepare_run(storage, seed).url for seed in range(6)]
    command = [sys.executable, "-c", REGISTER, database, str(tmp_path / "registry"), name]
    processes = [
        subprocess.Popen(
            [*command, *part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (runs[:3], runs[3:])
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    versions = [version for out, _ in printed for version in json.loads(out)]
    assert sorted(versions) == list(range(1, 7))
    rows = {row.number: row.run for row in local.versions(name)}
    assert [rows[version] for version in versions] == runs
    aliases = [alias for row in local.versions(name) for alias in row.aliases]
    assert sorted(aliases) == ["challenger", "champion"]


@pytest.mark.parametrize("alias", ["champion", "challenger"])
def test_an_alias_that_somebody_makes_at_the_same_time_is_no_error(
    local: Registry, tmp_path: Path, name: str, alias: str
) -> None:
    for seed in range(3):
        local.register(name, prepare_run(open_storage(str(tmp_path)), seed))
    for given in ("champion", "challenger"):
        local.client.delete_registered_model_alias(name, given)
    somebody = Registry(local.config).client
    made = []

    def meanwhile(session: Session, context: object, instances: object) -> None:
        """MLflow has looked whether there is such an alias, and is about to insert it."""
        if not made and any(isinstance(row, SqlRegisteredModelAlias) for row in session.new):
            made.append(alias)
            somebody.set_registered_model_alias(name, alias, "1")

    event.listen(Session, "before_flush", meanwhile)
    try:
        local.set_alias(name, 2, alias)
    finally:
        event.remove(Session, "before_flush", meanwhile)
    assert made == [alias]
    assert {row.number: row.aliases for row in local.versions(name)} == {1: [], 2: [alias], 3: []}
