"""Pretrained models: added by one command, in the wheel, held to their checksums and bounds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vlae
from pipeline import cli
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline import strokes
from vlae import pretrained

ROOT = Path(__file__).parents[1]
PACKAGE = ("vlae", "pipeline", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run on a small data set."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    loop.fit(strokes.train_config(root, "name=run"))
    return f"{root}/runs/run"


@pytest.fixture(scope="module")
def checkout(run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, to which the run's model was added as ``strokes``."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in PACKAGE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    done = add(copy, "strokes", run, "bounds.samples=8", "bounds.pictures=2", "probe_images=20")
    assert done.returncode == 0, done.stderr
    assert "users load it by vlae.load('strokes')" in done.stdout
    return copy


def add(checkout: Path, name: str, run: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run ``infra/pretrained.py`` with the packages of a checkout."""
    texts = ["--licence", "drawn by a test, free for all", "--cost", "2 core-seconds"]
    return subprocess.run(
        [sys.executable, ROOT / "infra/pretrained.py", name, run, *texts, *options],
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def models(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout's pretrained models, which this process uses; gives its folder."""
    shutil.copytree(checkout / "vlae/pretrained", tmp_path / "pretrained")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_an_installed_wheel_has_every_model_with_the_bound_that_was_measured(
    checkout: Path, tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 25_000_000
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "tests/check_pretrained.py", tmp_path / "site"],
        # On two cores that other tests use, two threads take twice the processor time of one.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert checked == sorted({*pretrained.names(), "strokes"})


def test_a_model_has_a_card_its_figures_and_no_private_address(checkout: Path, run: str) -> None:
    folder = checkout / "vlae/pretrained/strokes"
    card = (folder / "card.md").read_text()
    for said in ("# strokes", "drawn by a test", "2 core-seconds", "on 13 images of `test`",
                 "`vlae evaluate model=pretrained/strokes bounds.samples=8"):  # fmt: skip
        assert said in card
    figures = json.loads((folder / "evaluation.json").read_text())
    assert figures["test"]["iwae_samples"] == 8
    for picture in figures["pictures"]:
        assert f"]({picture})" in card
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    root = Path(run).parents[1]
    for path in folder.iterdir():
        assert str(root).encode() not in path.read_bytes(), path.name


def test_it_is_loaded_by_its_name(models: Path, run: str) -> None:
    model = vlae.load("strokes")
    for one, other in zip(model.parameters(), vlae.load(f"{run}/model").parameters(), strict=True):
        assert torch.equal(one, other)
    images = pretrained.examples("strokes")
    assert images.shape == (13, 1, 8, 8)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert model.encoder(images).code.shape == (13, 4)


def test_a_folder_of_the_same_name_is_meant_by_a_path(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = vlae.build(image_shape=(1, 9, 9), window="1x1", latents=1)
    vlae.save(other, tmp_path / "strokes")
    monkeypatch.chdir(tmp_path)
    assert vlae.load("strokes").image_shape == (1, 8, 8)
    for address in ("./strokes", Path("strokes"), tmp_path / "strokes"):
        assert vlae.load(address).image_shape == (1, 9, 9)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "training.json", "card.md"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_model_is_refused_by_the_name_of_its_file(
    file: str, how: str, models: Path
) -> None:
    path = models / "strokes" / file
    if how == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        vlae.load("strokes")


@pytest.mark.parametrize("name", ["mnst", "strokes2"])
def test_an_unknown_name_is_an_error_that_lists_the_names(
    name: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = ", ".join(pretrained.names())
    assert "strokes" in known
    with pytest.raises(FileNotFoundError, match=f"a name: the pretrained models are: {known}"):
        vlae.load(name)
    error = run_command(capsys, 2, "sample", f"model=pretrained/{name}")
    assert f"there is no pretrained model '{name}'; the pretrained models are: {known}" in error


def run_command(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed.out if code == 0 else printed.err.splitlines()[-1]


def test_commands_take_it_with_the_data_set_of_its_name(
    models: Path, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(capsys, 0, "sample", "model=pretrained/strokes", f"output={tmp_path}/drawn")
    assert open_storage(f"{tmp_path}/drawn").list()
    words = ["evaluate", "model=pretrained/strokes", f"output={tmp_path}/out", "probe_images=0"]
    root = Path(run).parents[1]
    run_command(capsys, 0, *words, f"storage.root={root}", "bounds.samples=8")
    found: dict[str, Any] = json.loads((tmp_path / "out/result.json").read_text())
    kept = json.loads((models / "strokes/evaluation.json").read_text())
    assert found["test"]["iwae_nats"] == kept["test"]["iwae_nats"]  # to the last bit
    error = run_command(capsys, 2, *words, f"storage.root={tmp_path}/elsewhere")
    assert f"there is no data set at {tmp_path}/elsewhere/datasets/strokes" in error


def test_a_model_that_is_too_large_is_not_added(checkout: Path, tmp_path: Path) -> None:
    root = str(tmp_path)
    strokes.write(strokes.data_storage(root))
    loop.fit(strokes.train_config(root, "name=wide", "train.images=8", "model.flow_hidden=1500"))
    before = (checkout / "vlae/pretrained/index.json").read_bytes()
    done = add(checkout, "wide", f"{root}/runs/wide", "bounds.samples=2", "bounds.pictures=2")
    assert done.returncode == 1
    assert "at most 8,000,000 are allowed" in done.stderr
    assert "Traceback" not in done.stderr
    assert (checkout / "vlae/pretrained/index.json").read_bytes() == before
    assert {path.name for path in (checkout / "vlae/pretrained").iterdir()} >= {"strokes"}
    assert not (checkout / "vlae/pretrained/wide").exists()
