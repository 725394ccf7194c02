"""Promotions that are killed, or at once: the alias decides, and the better model stays."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import commands
from pipeline.commands.models.registry import COMMAND
from pipeline.config.sections import RegistryOptions
from pipeline.errors import UserError
from pipeline.registry import champions
from pipeline.registry.champions import PROMOTED
from pipeline.registry.versions import Registry
from pipeline.storage.folder import FolderStorage
from pipeline.training import loop
from tests.pipeline import strokes
from tests.pipeline.models import prepare_run


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions of a model."""
    options = RegistryOptions(
        uri=f"sqlite:///{tmp_path}/registry.db", artifacts=str(tmp_path / "registry")
    )
    registry = Registry(options)
    for seed in range(3):
        registry.register("model", prepare_run(FolderStorage(tmp_path / "store"), seed))
    return registry


def champion(registry: Registry) -> int:
    return registry.resolve("models:/model@champion").number


def test_a_promotion_that_was_killed_is_never_rolled_back_to(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.set_alias("model", 2, "champion")
    with monkeypatch.context() as patch:
        for method in ("set_registered_model_tag", "set_registered_model_alias"):

            def killed(self: MlflowClient, *arguments: object, **options: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(MlflowClient, method, killed)
                with pytest.raises(KeyboardInterrupt):
                    registry.set_alias("model", 3, "champion")
            assert registry.roll_back("model")[0] in (1, 2)
            registry.set_alias("model", 2, "champion")


def test_a_tag_without_its_alias_is_no_champion(registry: Registry) -> None:
    registry.set_alias("model", 2, "champion")
    tag = champions.tag(2**62, PROMOTED, 3)
    registry.client.set_registered_model_tag("model", *tag)
    assert registry.roll_back("model") == (1, 2)
    with pytest.raises(UserError, match="no champion before"):
        registry.roll_back("model")


def test_of_two_promotions_at_once_the_better_model_stays(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    strokes.write(strokes.data_storage(root))
    for name, images in (("little", 8), ("more", 80), ("most", 800)):
        loop.fit(
            strokes.train_config(
                root, f"name={name}", f"train.images={images}", "train.valid_every=8000"
            )
        )
    options = [f"storage.root={root}", f"registry.uri=sqlite:///{tmp_path}/registry.db"]
    options += ["name=model", "bounds.samples=4", "bounds.num_images=60"]

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "registry", *words, *options],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    runs = ",".join(f"{root}/runs/{name}" for name in ("little", "more", "most"))
    COMMAND.run(commands.load("registry", ["action=register", f"runs=[{runs}]", *options]))
    promoting = [start("promote", f"version={number}") for number in (3, 2)]
    ended = [process.communicate(timeout=250) for process in promoting]
    assert promoting[0].returncode == 0, ended[0]
    registry = Registry(RegistryOptions(f"sqlite:///{tmp_path}/registry.db", f"{root}/registry"))
    assert champion(registry) == 3, ended
