"""``vlae evaluate``: its output and its result."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlae
from pipeline import cli, commands
from pipeline.commands.models import evaluate
from pipeline.config import sections
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation.probe import Codes, Probes, code_noise, encode
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline import strokes

ROOT = Path(__file__).parents[3]
MODELS = {
    "flow": [],  # one step
    "normal": ["model.flow_depth=0"],
    "deep": ["model.flow_depth=2"],
    "iaf": ["model.flow_depth=0", "model.posterior_depth=2", "train.with_valid=true"],
    "nested": ["train.nested=true"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with three data sets.

    ``strokes``, ``unlabelled``, the same without classes, and ``single`` with one test image.
    """
    root = str(tmp_path_factory.mktemp("root"))
    contents = strokes.write(strokes.data_storage(root)).manifest
    for name in ("unlabelled", "single"):
        storage = open_storage(f"{root}/datasets/{name}")
        strokes.write(storage)
        splits = contents.splits
        if name == "single":
            shard = strokes.write_shard(
                storage, strokes.Strokes(), "test", "test/00000.tar", 0, 1, 16
            )
            splits = {**splits, "test": (shard,)}
        storage.delete(["manifest.json"])
        changed = dataclasses.replace(
            contents, name=name, num_classes=2 if name == "single" else None, splits=splits
        )
        changed.publish(storage)
    return root


@pytest.fixture(scope="module")
def runs(root: str) -> str:
    """The folder of runs: one for each of ``MODELS``."""
    for name, overrides in MODELS.items():
        loop.fit(strokes.train_config(root, f"name={name}", *overrides))
    return f"{root}/runs"


def strict(text: str) -> dict[str, Any]:
    """Parse JSON by the standard, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return dict(json.loads(text, parse_constant=refuse))


def evaluated(
    capsys: pytest.CaptureFixture[str], output: Path, *arguments: str, code: int = 0
) -> tuple[str, dict[str, Any]]:
    """Run the command; returns its output, or its error, and its result."""
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["evaluate", f"output={output}", "bounds.samples=4", "bounds.pictures=5", *arguments]
        )
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    if code:
        return printed.err.splitlines()[-1], {}
    return printed.out, strict((output / "result.json").read_text())


def encoded(runs: Path, name: str, split: str) -> Codes:
    """The codes of a split's images under a trained model."""
    data = DataSet.load(strokes.data_storage(str(runs.parent)))
    return encode(
        vlae.load(runs / name / "model"),
        EvalLoader(data, split=split, batch_size=5),
        binarization=sections.Binarization.dynamic,
        seed=0,
        device=torch.device("cpu"),
        threads=1,
        progress=lambda count: None,
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_accounting_of_a_trained_model_adds_up(
    name: str, runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = evaluated(capsys, tmp_path, f"model={runs}/{name}")
    test = result["test"]
    assert test["num_images"] == 13
    assert test["slack_nats"] == pytest.approx(test["elbo_nats"] - test["iwae_nats"])
    assert 0 < test["slack_nats_se"] < test["elbo_nats_se"]
    latents = test["latents"]
    assert 0 <= test["active_units"] <= 4 == len(latents["code_variance"])
    assert f"\n{test['active_units']} of 4 latents are active" in printed
    assert ("rate_nats" in latents) == (name in ("flow", "normal", "nested"))
    if "rate_nats" in latents:
        assert sum(latents["rate_nats"]) == pytest.approx(test["rate_nats"], rel=1e-5)
        assert len(latents["rate_nats_se"]) == 4
    assert ("mutual_information_nats" in test) == ("I(x; z)" in printed) == (name != "iaf")
    files = ["reconstructions", "samples"]
    if name != "iaf":
        files.append("latents")
        assert test["mutual_information_images"] == 13
        assert test["mutual_information_nats"] + test["marginal_kl_nats"] == pytest.approx(
            test["rate_nats"]
        )
        assert test["mutual_information_nats"] <= math.log(13)
        assert (
            test["mutual_information_nats"]
            < test["capacity_nats"] + 4 * test["mutual_information_nats_se"]
        )
        assert test["capacity_bits"] == pytest.approx(sum(latents["capacity_bits"]))
        assert f"{math.log2(13):.2f} that tell 13 images apart" in printed
    if name == "nested":
        files += ["nested", "decodings"]
    files.append("resolution")
    assert result["pictures"] == [f"{tmp_path}/{file}.png" for file in files]
    curve = test["resolution"]
    assert (curve["num_images"], curve["coarsest_px"], curve["finest_px"]) == (13, 8, 2.0)
    assert len(curve["correlation"]) == len(curve["correlation_se"]) == 5
    kept = [value >= 0.5 for value in curve["correlation"][1:]]
    assert (test["resolution_px"] is not None) == any(kept)
    assert ("\nresolution: none" in printed) == (not any(kept))
    for picture in result["pictures"]:
        Image.open(picture).load()

    probe = test["probe"]
    assert probe.keys() == {"linear", "two_layer", "linear_of_sample", "majority"}
    for figures in probe.values():
        assert (13 * figures["accuracy"]) == pytest.approx(round(13 * figures["accuracy"]))
        share = figures["accuracy"]
        assert figures["accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / 12))
    codes = {split: encoded(Path(runs), name, split) for split in ("train", "valid", "test")}
    right = Probes(codes["train"], codes["valid"]).correct(codes["test"])
    assert {name: figures["accuracy"] for name, figures in probe.items()} == pytest.approx(
        {name: each.double().mean().item() for name, each in right.items()}
    )
    for name, label in evaluate.PROBES.items():
        share = f"{100 * probe[name]['accuracy']:.2f}"
        assert [line for line in printed.splitlines() if label in line and share in line]


def test_the_curve_of_a_nested_model_goes_from_no_code_to_the_whole(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = evaluated(capsys, tmp_path, f"model={runs}/nested")
    test, model = result["test"], vlae.load(Path(runs) / "nested/model")
    data = DataSet.load(strokes.data_storage(str(Path(runs).parent)))
    (batch,) = EvalLoader(data, split="test", batch_size=13)
    x = binarize(batch, sections.Binarization.dynamic, 0)
    noise = code_noise(model, batch, 0)
    assert [row["latents"] for row in test["nested"]] == [0, 1, 2, 3, 4]
    for row in test["nested"]:
        with torch.no_grad():
            bound = model(x, noise, row["latents"])
        assert row["rate_nats"] == pytest.approx(bound.rate.mean().item(), abs=1e-5)
        assert row["distortion_nats"] == pytest.approx(bound.distortion.mean().item(), abs=1e-4)
        assert row["elbo_nats"] == pytest.approx(row["rate_nats"] + row["distortion_nats"])
        assert row["rate_bits"] == pytest.approx(row["rate_nats"] / math.log(2))
        assert ("linear_accuracy" in row) == (row["latents"] > 0)
        assert f"\n  {row['latents']}         {row['rate_bits']:.2f}  " in printed
    none, whole = test["nested"][0], test["nested"][-1]
    assert none["rate_nats"] == 0
    assert whole["linear_accuracy"] == test["probe"]["linear"]["accuracy"]
    assert none["resolution_px"] is None
    assert whole["resolution_px"] == test["resolution_px"]
    printed, result = evaluated(capsys, tmp_path, f"model={runs}/nested", "probe_images=0")
    assert not any("linear_accuracy" in row for row in result["test"]["nested"])


def test_the_rates_of_groups_with_free_bits_are_reported(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_storage(f"{runs}/normal")
    copy = open_storage(f"{tmp_path}/copy")
    for key in run.list("model/"):
        copy.write(key, run.read(key))
    training = run.read_json("model/training.json")
    training["config"]["train"]["free_groups"] = 2
    copy.write_json("model/training.json", training)
    printed, result = evaluated(capsys, tmp_path / "out", f"model={copy.url}")
    latents = result["test"]["latents"]
    rates = latents["rate_bits"]
    assert latents["group_rate_bits"] == pytest.approx([rates[0] + rates[1], rates[2] + rates[3]])
    assert (
        f"rate of each group of latents, in bits:\n  {latents['group_rate_bits'][0]:.2f} "
        in printed
    )


def test_without_labels_there_are_no_probes(
    root: str, runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([f"dataset_url={root}/datasets/unlabelled"], ["probe_images=0"]):
        printed, result = evaluated(capsys, tmp_path, f"model={runs}/flow", *arguments)
        assert "probe" not in result["test"]
        assert "class" not in printed
        assert "mutual_information_nats" in result["test"]


def test_resolution_is_measured_on_as_many_images_as_asked_for(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, count in (
        (["bounds.resolution_images=5"], 5),
        (["bounds.num_images=4"], 4),
        (["bounds.resolution_images=0"], 0),
    ):
        printed, result = evaluated(
            capsys, tmp_path, f"model={runs}/flow", "probe_images=0", *options
        )
        measured = result["test"]
        assert ("\nresolution: " in printed) == bool(count)
        assert measured.get("resolution", {}).get("num_images", 0) == count


@pytest.mark.parametrize(
    ("px", "error", "lost", "sentence"),
    [
        (5.21, 0.05, [], "5.21 +- 0.05 px; the code keeps coarser structure, and finer is redrawn"),
        (2.0, 0.0, [], "2.00 px, the finest structure that pixels show"),
        (None, None, [], "none; the code decides less than half of the variance of every size"),
        (6.5, None, [16.0, 8.0], "6.50 px; .* redrawn (structure of 16.0, 8.0 px is redrawn, too)"),
    ],
)
def test_the_resolution_is_told_in_a_sentence(
    px: float | None, error: float | None, lost: list[float], sentence: str
) -> None:
    measured = {"resolution_px": px, "resolution_px_se": error}
    measured["resolution"] = {"finest_px": 2.0, "lost_px": lost}  # type: ignore[assignment]
    told = evaluate.format_resolution(measured)
    first, *rest = sentence.split(" .* ")
    assert told.startswith(first)
    assert told.endswith(rest[0] if rest else first)


def test_a_single_image_has_figures_but_no_errors(
    root: str, runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = evaluated(
        capsys, tmp_path, f"model={runs}/flow", f"dataset_url={root}/datasets/single"
    )
    test = result["test"]
    assert test["num_images"] == 1
    assert {
        test[f"{name}_nats_se"] for name in ("rate", "distortion", "elbo", "iwae", "slack")
    } == {None}
    assert {figures["accuracy_se"] for figures in test["probe"].values()} == {None}
    assert test["latents"]["rate_nats_se"] == [None] * 4
    assert "+-" not in printed
    assert f"  rate                      {test['rate_nats']:.3f}  " in printed


def test_the_report_says_if_the_probes_have_seen_the_split(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = evaluated(capsys, tmp_path, f"model={runs}/flow", "split=valid")
    assert "on the images that chose the probes:" in printed
    for name in ("linear", "two_layer", "linear_of_sample"):
        probe = result["valid"]["probe"][name]
        assert probe["accuracy"] == probe["valid_accuracy"]
    printed, _ = evaluated(
        capsys, tmp_path, f"model={runs}/flow", "split=train", "bounds.num_images=20"
    )
    assert "on the images that the probes were fitted on:" in printed


def test_the_report_says_if_the_model_was_trained_on_the_images(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "images that the model was trained on, nats per image:"
    for split, name, held_out in (
        ("train", "flow", False),
        ("valid", "flow", True),
        ("valid", "iaf", False),
        ("test", "iaf", True),
    ):
        options = (f"split={split}", "probe_images=0", "bounds.num_images=5")
        printed, result = evaluated(capsys, tmp_path, f"model={runs}/{name}", *options)
        assert result["held_out"] is held_out
        assert (said in printed) is not held_out


def test_too_few_images_for_a_probe_skip_it_and_name_the_option_to_change(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = evaluated(capsys, tmp_path, f"model={runs}/flow", "probe_images=1")
    assert "no probe: probes need training images of two classes" in printed
    assert "raise probe_images" in printed
    assert "probe" not in result["test"]


def test_a_run_that_is_validated_on_one_image_ends_well(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = loop.fit(strokes.train_config(root, "name=single", "train.valid_images=1"))
    assert result["elbo_nats_se"] is None
    storage = open_storage(f"{root}/runs/single")
    strict(storage.read("model/training.json").decode())
    for line in storage.read("metrics/00000.jsonl").decode().splitlines():
        strict(line)


def test_figures_are_kept_when_a_picture_cannot_be_drawn(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("pipeline.evaluation.pictures.samples", fail)
    options = commands.load(
        "evaluate",
        [f"model={runs}/flow", f"output={tmp_path}", "bounds.samples=4", "bounds.pictures=5"],
    )
    with pytest.raises(MemoryError):
        evaluate.run(options)
    kept = strict((tmp_path / "result.json").read_text())
    assert kept["test"]["num_images"] == 13
    assert kept["pictures"] == []


def test_a_killed_evaluation_measures_only_what_it_has_not_kept(
    runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A block of four images and one of a single one.
    options = [f"model={runs}/flow", "bounds.samples=16384", "bounds.num_images=5"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "pipeline", "evaluate", *options, f"output={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (kept := sorted(killed.glob("estimates/*/*.safetensors"))):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "result.json").exists(), "it ended before it could be killed"
    written = [path.stat().st_mtime_ns for path in kept]
    _, resumed = evaluated(capsys, killed, *options)
    assert [path.stat().st_mtime_ns for path in kept] == written
    _, undisturbed = evaluated(capsys, whole, *options)
    assert resumed["test"] == undisturbed["test"]
    assert len(resumed["pictures"]) == len(undisturbed["pictures"])

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*")}

    assert files(killed) == files(whole), "the kill left something behind"
