"""The main job over the real S3 server, Ray and MLflow: from MNIST to a registered model.

What is the same for every data set is shown on the strokes, which cost less.
"""

import json
import math
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from pipeline.cluster import connect
from pipeline.config import sections
from pipeline.data import DataSet
from pipeline.storage import open_storage
from pipeline.storage.server import ObjectStorageServer
from tests.e2e.conftest import TINY, Run
from tests.pipeline import strokes

REPOSITORY = Path(__file__).parents[2]

SEARCH = [
    "search.space.model.window=[3x1,5x2]",
    "search.space.model.latents=[2,4]",
    "search.space.model.flow_depth=[0,1]",
    "search.objectives=[min rate_bits,min distortion_nats]",
    "search.constraints=[]",
    "search.samples=2",
    "search.num_images=100",
    "search.probe_images=200",
    "register_best=2",
]
"""A search of seconds for the least rate and distortion."""
TWO = ["name=two", *strokes.TINY, "cluster.num_workers=2"]
"""A run of two workers."""
FEW = ["bounds.samples=4", "bounds.num_images=100", "bounds.resolution_images=0"]
"""An evaluation of seconds."""

pytestmark = pytest.mark.usefixtures("ray_cluster")


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What the file named in a command's last line holds."""
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("result: ")
    folder, _, name = last.removeprefix("result: ").rpartition("/")
    return open_storage(folder).read_json(name)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def data(run: Run, root: str) -> str:
    """The shards of MNIST below ``root``."""
    done = run("shard", f"storage.root={root}")
    assert "data set mnist written: 1 x 28 x 28, 256 values" in done.stdout
    return f"{root}/datasets/mnist"


@pytest.fixture(scope="module")
def searched(run: Run, root: str, data: str) -> dict[str, object]:
    done = run("tune", f"storage.root={root}", *TINY, *SEARCH, "search.num_trials=2")
    return result_of(done)


def test_sharding_again_does_nothing_and_says_so(call: Run, root: str, data: str) -> None:
    before = open_storage(data).sizes()
    done = call("shard", f"storage.root={root}")
    assert (
        "exists already: 1 x 28 x 28, 256 values, binarized (dynamic); 50,000 train," in done.stdout
    )
    assert result_of(done)["reused"] is True
    assert open_storage(data).sizes().keys() == before.keys()


@pytest.fixture(scope="module")
def two(run: Run, root: str, small_data: DataSet) -> subprocess.CompletedProcess[str]:
    """A finished run of two workers."""
    return run("train", f"storage.root={root}", *TWO)


def test_two_workers_train_a_model_and_a_finished_run_is_not_trained_again(
    two: subprocess.CompletedProcess[str], call: Run, root: str
) -> None:
    result = result_of(two)
    assert result["valid"]["images"] == 240  # type: ignore[index]
    storage = open_storage(f"{root}/runs/two")
    keys = storage.list()
    assert any(key.startswith("tensorboard/events.out.tfevents") for key in keys)
    assert len([key for key in keys if key.startswith("checkpoints/")]) <= 2
    assert {
        "model/model.safetensors",
        "model/model.json",
        "model/training.json",
        "metrics/00000.jsonl",
    } <= set(keys)
    again = call("train", f"storage.root={root}", *TWO)
    assert "was finished already" in again.stdout
    assert result_of(again)["valid"] == result["valid"]


@pytest.mark.usefixtures("two")
def test_another_configuration_under_a_used_name_is_refused(call: Run, root: str) -> None:
    done = call("train", f"storage.root={root}", *TWO, "model.latents=3", code=2)
    assert "model.latents" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_damaged_data_ends_a_run_with_the_name_of_the_shard(
    call: Run, root: str, small_data: DataSet
) -> None:
    whole, damaged = small_data.storage, open_storage(f"{root}/datasets/damaged")
    for key in whole.list():
        content = bytearray(whole.read(key))
        if key.startswith("train/") and key.endswith(".tar"):
            content[len(content) // 2] ^= 1
        damaged.write(key, bytes(content))
    # Were it tried again, it would not end before its time is up.
    done = call(
        "train",
        f"storage.root={root}",
        *strokes.TINY,
        "dataset.name=damaged",
        "name=damaged",
        "cluster.max_failures=1000",
        code=2,
    )
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "datasets/damaged/train/" in error
    assert "checksum" in error


def test_a_search_registers_its_best_models_and_more_trials_go_on_from_it(
    searched: dict[str, object], call: Run, root: str
) -> None:
    before = searched["trials"]
    assert isinstance(before, list)
    assert (
        len(
            {(row["model.window"], row["model.latents"], row["model.flow_depth"]) for row in before}
        )
        == 2
    )
    finished = [row for row in before if row["status"] == "finished"]
    assert {"nll", "rate_bits", "distortion_nats", "probe_accuracy", "images_per_s"} <= finished[
        0
    ].keys()
    assert all(row["front"] == 1 and row["feasible"] for row in finished[:1])
    registered = searched["registered"]
    assert isinstance(registered, list)
    assert registered[0]["run"] == finished[0]["run"]
    assert registered[0]["version"] == 1, "in a new registry the best is the champion"

    again = call("tune", f"storage.root={root}", *TINY, *SEARCH, "search.num_trials=2")
    assert "was finished already" in again.stdout
    assert result_of(again)["trials"] == before

    done = call("tune", f"storage.root={root}", *TINY, *SEARCH, "search.num_trials=3")
    assert "trial 3/3" in done.stdout
    assert "trial 2/3" not in done.stdout
    trials = result_of(done)["trials"]
    assert isinstance(trials, list)
    assert len({row["run"] for row in trials}) == 3
    # A new trial can beat those that were there, but changes nothing else of them.
    known = [{key: value for key, value in row.items() if key != "front"} for row in trials]
    assert all(
        {key: value for key, value in row.items() if key != "front"} in known for row in before
    )


@pytest.mark.usefixtures("small_data")
def test_trials_of_several_workers_do_not_block_each_other(call: Run, root: str) -> None:
    """Each wants both cores of the cluster, and two are let run at once."""
    done = call(
        "tune",
        f"storage.root={root}",
        *strokes.TINY,
        *SEARCH,
        "name=wide",
        "cluster.num_workers=2",
        "search.num_trials=2",
        "search.max_concurrent=2",
        "search.stopping=none",
        "register_best=1",
        "model_name=several",  # the other tests count the versions of theirs
    )
    trials = result_of(done)["trials"]
    assert isinstance(trials, list)
    assert [(row["status"], row["images"]) for row in trials] == [("finished", 240)] * 2
    assert all("probe_accuracy" in row for row in trials)


def test_a_registered_model_is_listed_shown_and_promoted(
    searched: dict[str, object], call: Run
) -> None:
    assert "vlae-mnist" in call("registry", "list").stdout
    version = searched["registered"][0]["version"]  # type: ignore[index]
    done = call("registry", "promote", "name=vlae-mnist", f"version={version}", *FEW, "--yes")
    assert f"vlae-mnist version {version} is now champion" in done.stdout
    assert f"version {version} @champion" in call("registry", "show", "name=vlae-mnist").stdout


def test_a_registered_model_is_evaluated_in_a_fresh_process_without_ray_and_without_pickle(
    searched: dict[str, object], call: Run, root: str, workplace: Path
) -> None:
    version = searched["registered"][0]["version"]  # type: ignore[index]
    call("registry", "promote", "name=vlae-mnist", f"version={version}", *FEW, "--yes")
    script = """
import sys
sys.modules["ray"] = None  # importing it fails
import pickle, torch
def refuse(*arguments, **options): raise AssertionError("something is unpickled")
from pipeline.cli import main
import pipeline.evaluation.evaluation, pipeline.registry.models, mlflow
sys.addaudithook(lambda event, arguments: refuse() if event == "pickle.find_class" else None)
main(["evaluate", *sys.argv[1:]])
"""
    arguments = [
        "model=models:/vlae-mnist@champion",
        f"storage.root={root}",
        "bounds.samples=8",
        "bounds.num_images=100",
        "bounds.resolution_images=0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    test = result["test"]
    assert isinstance(test, dict)
    assert test["num_images"] == 100
    assert test["iwae_samples"] == 8
    assert test["iwae_nats"] < test["elbo_nats"]
    assert test["elbo_nats"] == pytest.approx(test["rate_nats"] + test["distortion_nats"])
    for picture in ("reconstructions.png", "samples.png"):
        assert (
            (workplace / "outputs/evaluate/vlae-mnist-champion" / picture)
            .read_bytes()
            .startswith(b"\x89PNG")
        )
    shown = call("registry", "show", "name=vlae-mnist", f"version={version}").stdout
    assert "test: code length" in shown


def entrypoint(root: str, name: str, *options: str) -> list[str]:
    """The command of a job that trains a run of this name."""
    command = [sys.executable, "-m", "pipeline", "train", f"storage.root={root}", f"name={name}"]
    return [*command, *strokes.TINY, *options]


@pytest.mark.usefixtures("small_data")
def test_a_job_is_submitted_to_a_running_cluster(
    root: str, storage_server: ObjectStorageServer, ray_cluster: str
) -> None:
    environment = json.dumps({"env_vars": storage_server.environment()})
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    command += ["--address", ray_cluster, "--working-dir", str(REPOSITORY)]
    command += ["--runtime-env-json", environment, "--", *entrypoint(root, "job")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"result: {root}/runs/job/result.json" in done.stdout
    assert "succeeded" in done.stdout
    assert open_storage(f"{root}/runs/job").exists("result.json")


@pytest.mark.usefixtures("small_data")
def test_a_running_job_is_seen_at_rays_metrics_endpoint(
    root: str, workplace: Path, storage_server: ObjectStorageServer, ray_cluster: str
) -> None:
    jobs = JobSubmissionClient(ray_cluster)
    endless = ["train.images=40_000_000", "train.report_seconds=0.5"]
    endless += [f"registry.uri=sqlite:///{workplace}/jobs.db"]  # a job runs where the cluster does
    jobs.submit_job(
        entrypoint=shlex.join(entrypoint(root, "watched", *endless)),
        submission_id="watched",
        runtime_env={"env_vars": storage_server.environment()},
    )
    connect(sections.ClusterOptions(), sections.StorageOptions())
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    shown = dict[str, float]()
    guessed = strokes.SIZE**2 * math.log(2)
    try:
        # Until the model is better than to guess each pixel; pytest's time limit ends it.
        while (
            not {"images_per_s", "code_length", "rate"} <= shown.keys()
            or shown["code_length"] >= guessed
        ):
            assert (status := jobs.get_job_status("watched")) in ("PENDING", "RUNNING"), status
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            lines = re.findall(
                r'^ray_vlae_train_(\w+)\{[^}]*run="watched"[^}]*\} (\S+)$', text, re.MULTILINE
            )
            shown = {name: float(value) for name, value in lines}
            time.sleep(1)
    finally:  # it would take the cores that the other tests wait for
        jobs.stop_job("watched")
    while jobs.get_job_status("watched") == "RUNNING":
        time.sleep(0.2)
    assert jobs.get_job_status("watched") == "STOPPED"
    assert shown["images_per_s"] > 0
    assert 0 < shown["rate"] < shown["code_length"] < guessed
