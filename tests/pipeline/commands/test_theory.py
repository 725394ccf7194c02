"""``vlae theory`` from the outside, on few images: its results are consistent, and reused."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlae
from pipeline import cli, commands
from pipeline.commands.models import theory
from pipeline.training import theory as experiment

DECODERS = ("factorized", "covering", "full")
SMALL = ["images=320", "num_images=60"]


@dataclass(frozen=True)
class Done:
    """A finished run: its folder, its exit code and what it printed."""

    folder: Path
    code: object
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder, out, err = tmp_path_factory.mktemp("theory"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "AVERAGED", 2)  # drawing 200 takes half a minute
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main(["theory", *SMALL, f"output={folder}"])
        yield Done(folder, ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def result(done: Done) -> dict[str, Any]:
    """The finished run's ``result.json``."""
    found: dict[str, Any] = json.loads((done.folder / "result.json").read_text())
    return found


def test_it_prints_its_measurements_and_where_the_result_is(
    done: Done, result: dict[str, Any]
) -> None:
    folder = done.folder
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"result: {folder}/result.json"
    assert lines[-2] == f"figure: {folder}/theory.png"
    assert "960 images" in done.stderr or "960/960" in done.stderr  # the progress of three decoders
    for value in (
        result["entropy"],
        result["global_information"],
        result["covering"]["rate"],
        result["full"]["code_length"],
    ):
        assert f"{value:.3f} +- " in done.stdout
    with Image.open(folder / "theory.png") as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 1000


def test_known_quantities_add_up(result: dict[str, Any]) -> None:
    assert result["entropy"] == pytest.approx(
        result["entropy_given_class"] + result["global_information"], rel=1e-12
    )
    assert 0 < result["global_information"] < torch.tensor(result["classes"]).log()
    assert result["entropy_se"] < 0.01
    # The covering decoder has much to gain from z, and the factorized one more.
    assert result["without_z"]["covering"] > 1.05 * result["entropy"]
    assert result["without_z"]["factorized"] > 1.2 * result["without_z"]["covering"]


def test_a_decoders_figures_add_up_and_none_beats_the_entropy(result: dict[str, Any]) -> None:
    for name in DECODERS:
        row = result[name]
        assert row["code_length"] == pytest.approx(row["rate"] + row["distortion"], rel=1e-12)
        assert row["excess"] == pytest.approx(row["code_length"] - result["entropy"], abs=1e-9)
        assert row["excess"] > 4 * row["excess_se"], (
            "after ten steps no decoder is near the entropy"
        )
        assert all(row[f"{key}_se"] > 0 for key in ("rate", "distortion", "code_length"))
    assert [result[name]["window"] for name in DECODERS] == ["0x0", "3x1", "full"]


def test_the_trained_models_are_kept(done: Done, result: dict[str, Any]) -> None:
    for name in DECODERS:
        model = vlae.load(done.folder / name / "model")
        assert model.arguments["window"] == result[name]["window"]
        assert vlae.sample(model, 2, torch.Generator().manual_seed(0)).shape == (2, 1, 16, 16)


def test_a_second_run_redoes_only_what_is_missing_with_the_same_result(
    done: Done,
    result: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = done.folder
    pictured = (folder / "theory.png").read_bytes()
    shutil.rmtree(folder / "covering")
    written = {
        path: path.stat().st_mtime_ns
        for name in ("known", "full", "factorized")
        for path in (folder / name).rglob("*")
    }
    assert theory.run(commands.load("theory", [*SMALL, f"output={folder}"])) == result
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (folder / "theory.png").read_bytes() == pictured
    drawn_at = (folder / "theory.png").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        cli.main(["theory", *SMALL, f"output={folder}"])
    assert ended.value.code == 0
    assert f"figure (made before): {folder}/theory.png\n" in capsys.readouterr().out
    assert (folder / "theory.png").stat().st_mtime_ns == drawn_at
    again = json.loads((folder / "result.json").read_text())
    assert again.pop("reused")
    assert again == {key: value for key, value in result.items() if key != "reused"}


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("images=31", "at least 32"), ("num_images=1", "at least 2"), ("seed=-1", "0")],
)
def test_a_mistake_ends_in_one_sentence(
    option: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["theory", option])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
