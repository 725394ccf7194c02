"""The registry, on a real MLflow in a SQLite file, with artifacts in a folder and on S3."""

import multiprocessing
from pathlib import Path

import pytest
import torch

import vlae
from pipeline import config, loop
from pipeline.errors import UserError
from pipeline.registry import Registry
from pipeline.storage import Storage

SIZES = {
    "encoder_channels": 4,
    "decoder_channels": 4,
    "decoder_maps": 4,
    "decoder_features": 8,
    "flow_hidden": 16,
    "latents": 3,
}
FIGURES = {"elbo_nats": 90.5, "rate_bits": 12.0, "num_images": 100}


def finished_run(storage: Storage, name: str, seed: int = 0) -> Storage:
    """A run's folder with a final model in it, as training leaves it."""
    torch.manual_seed(seed)
    run = storage.child(f"runs/{name}")
    options = config.to_dict(config.load("train", [f"name={name}", "model=tiny"]))
    training = {"config": options, "manifest": "f" * 64, "valid": FIGURES}
    loop.publish(run, vlae.build(image_shape=(1, 6, 6), window="3x1", **SIZES), training)  # type: ignore[arg-type]
    return run


def open_registry(database: Path, artifacts: str) -> Registry:
    return Registry(config.Registry(uri=f"sqlite:///{database}", artifacts=artifacts))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests here: making its tables takes seconds."""
    return tmp_path_factory.mktemp("registry") / "registry.db"


@pytest.fixture
def registry(database: Path, storage: Storage) -> Registry:
    return open_registry(database, f"{storage.url}/registry")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model's name of this test's own."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


def test_the_first_version_is_champion_and_the_next_challenger(registry: Registry, storage: Storage, name: str) -> None:
    assert registry.register(name, finished_run(storage, "a")) == {"name": name, "version": 1}
    assert registry.register(name, finished_run(storage, "b")) == {"name": name, "version": 2}
    assert registry.resolve(f"models:/{name}@champion")["version"] == 1
    assert registry.resolve(f"models:/{name}@challenger")["version"] == 2
    assert registry.resolve(f"models:/{name}/2")["version"] == 2
    registry.promote(name, 2, "champion")
    assert registry.resolve(f"models:/{name}@champion")["version"] == 2


def test_a_run_is_registered_once(registry: Registry, storage: Storage, name: str) -> None:
    run = finished_run(storage, "a")
    assert registry.register(name, run) == registry.register(name, run)
    assert len(registry.versions(name)) == 1


def test_what_is_downloaded_is_what_was_trained(registry: Registry, storage: Storage, name: str, tmp_path: Path) -> None:
    run = finished_run(storage, "a", seed=7)
    registry.register(name, run)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    folder = registry.download(name, 1, folder)
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors", "training.json"}
    assert (folder / "model.safetensors").read_bytes() == run.read("model/model.safetensors")
    assert vlae.load(folder).image_shape == (1, 6, 6)


def test_figures_are_kept_with_a_version(registry: Registry, storage: Storage, name: str) -> None:
    registry.register(name, finished_run(storage, "a"))
    registry.log_evaluation(name, 1, "test", {"iwae_nats": 83.5, "iwae_samples": 64})
    (version,) = registry.versions(name)
    assert version["metrics"]["valid/elbo_nats"] == 90.5
    assert version["metrics"]["test/iwae_nats"] == 83.5
    assert version["parameters"]["model.window"] == "3x1"


def test_what_is_not_there_is_named(registry: Registry, storage: Storage, name: str) -> None:
    with pytest.raises(UserError, match="no model named absent"):
        registry.versions("absent")
    registry.register(name, finished_run(storage, "a"))
    with pytest.raises(UserError, match="no version 9; it has 1"):
        registry.promote(name, 9, "champion")
    with pytest.raises(UserError, match="@nobody is not in the registry"):
        registry.resolve(f"models:/{name}@nobody")


def register_one(database: Path, artifacts: str, storage: Storage, name: str, number: int) -> None:
    open_registry(database, artifacts).register(name, finished_run(storage, f"run-{number}", seed=number))


def test_two_people_registering_at_once_lose_nothing(registry: Registry, database: Path, storage: Storage, name: str) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = [(database, f"{storage.url}/registry", storage, name, number) for number in range(2)]
    people = [context.Process(target=register_one, args=each) for each in arguments]
    for person in people:
        person.start()
    for person in people:
        person.join()
        assert person.exitcode == 0
    assert sorted(row["version"] for row in registry.versions(name)) == [1, 2]
