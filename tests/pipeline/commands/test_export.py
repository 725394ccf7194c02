"""``vlae export``: a folder that loads anywhere, and names no place of this machine."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import vlae
from pipeline import cli
from pipeline.runs import Run
from pipeline.training import loop
from tests.pipeline import strokes

FEW = ["bounds.samples=2", "bounds.num_images=8", "bounds.pictures=4", "bounds.resolution_images=0"]


def vlae_command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, evaluated as registering does it."""
    root = str(tmp_path_factory.mktemp("secretplace"))
    strokes.write(strokes.data_storage(root))
    loop.fit(strokes.train_config(root, "name=strokes", "train.images=80"))
    run = Run.at(f"{root}/runs/strokes")
    assert vlae_command("evaluate", f"model={run.url}", f"output={run.url}/evaluation", *FEW) == 0
    return run


def test_the_folder_is_a_model_with_its_card_and_no_address(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["export", f"model={run.url}", "registry.license=CC-BY-4.0"]
    assert vlae_command(*words) == 0
    folder = tmp_path / "outputs/export/strokes/model"
    assert str(folder) in capsys.readouterr().out

    model, opened = vlae.load(folder), run.open().network
    x = torch.rand(2, 1, 8, 8).round()
    torch.testing.assert_close(model.encoder(x).code, opened.encoder(x).code, rtol=0, atol=0)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(opened.state_dict())

    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["license"] == "cc-by-4.0"
    assert {"onnx", "safetensors"} <= set(matter["tags"])
    (figures,) = matter["model-index"][0]["results"]
    measured = json.loads((folder / "evaluation.json").read_text())["test"]
    assert {each["type"]: each["value"] for each in figures["metrics"]}["rate_bits"] == (
        measured["rate_bits"]
    )
    for picture in json.loads((folder / "evaluation.json").read_text())["pictures"]:
        assert f"]({picture})" in card
        assert (folder / picture).is_file()

    config = json.loads((folder / "config.json").read_text())
    assert config["image_shape"] == [1, 8, 8]
    assert config["graphs"]["decoder"]["shapes"]["outputs"]["logits"] == ["batch", 8, 8, 1]
    for path in folder.iterdir():
        assert b"secretplace" not in path.read_bytes(), (
            f"{path.name} names a folder of this machine"
        )

    capsys.readouterr()
    exported = tmp_path / "outputs/export/strokes"
    assert vlae_command("sample", f"model={exported}", "num_images=2") == 0
    assert vlae_command("reconstruct", f"model={exported}", "num_images=2") == 2
    assert "does not say where its images are; give dataset_url=" in capsys.readouterr().err


def test_a_wrong_licence_or_model_writes_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path}/new"
    assert vlae_command("export", f"model={run.url}", "registry.license=mine", output) == 2
    assert "is no licence" in capsys.readouterr().err
    assert vlae_command("export", f"model={tmp_path}/none", output) == 2
    assert not (tmp_path / "new").exists()
