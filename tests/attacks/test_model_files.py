"""The files of a model: none is half written, and none gives other weights than it says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlae

SMALL: dict[str, Any] = {"image_shape": (1, 8, 8), "latents": 3, "flow_depth": 1, "flow_hidden": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    vlae.save(vlae.build(**SMALL), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].flatten()[-1] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors is damaged: {name} has values"):
        vlae.load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_is_loaded_in_the_precision_in_which_it_was_saved(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = vlae.build(**SMALL).to(dtype)
    vlae.save(model, tmp_path)
    loaded = vlae.load(tmp_path)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_of_mixed_or_foreign_types_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    for dtype, message in ((torch.float64, "mixed"), (torch.int64, "I64"), (torch.bool, "BOOL")):
        save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
            vlae.load(folder)


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    vlae.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_nested_deeper_than_the_parser_goes_are_refused(folder: Path) -> None:
    (folder / "model.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"model\.json is no saved model"):
        vlae.load(folder)


def test_a_model_that_could_not_be_loaded_is_not_saved(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    poisoned, cut, mixed, foreign = (vlae.build(**SMALL) for _ in range(4))
    with torch.no_grad():
        poisoned.decoder.head.bias[0] = math.nan
    cut.decoder.head.bias = torch.nn.Parameter(torch.zeros(2))
    mixed.decoder.head.double()
    foreign.arguments = {}
    for model, message in (
        (poisoned, r"decoder\.head\.bias has values that are not finite"),
        (cut, r"decoder\.head\.bias has the shape \(2,\)"),
        (mixed, "one floating-point type"),
        (foreign, r"not made by vlae\.build"),
    ):
        with pytest.raises(ValueError, match=message):
            vlae.save(model, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


KILLED = """
import json, os, sys
from pathlib import Path
from typing import Any
import torch, vlae

folder, uses = Path(sys.argv[1]), 0
originals = {path: path.read_bytes() for path in folder.iterdir()}
torch.manual_seed(1)
model = vlae.build(image_shape=(1, 8, 8), latents=3, flow_depth=1, flow_hidden=8, activation="elu")

def found():
    try:
        model = vlae.load(folder)
    except FileNotFoundError:
        return None
    return [model.arguments["activation"], model.decoder.head.weight.sum().item()]

def save_until(limit):
    def count(event, arguments):
        global uses
        if event in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
            uses += 1
            if uses > limit:
                os._exit(9)
    sys.addaudithook(count)
    vlae.save(model, folder)
    os._exit(0)

seen, status = [found()], 9
while status:
    for path, content in originals.items():
        path.write_bytes(content)
    child = os.fork()
    if not child:
        save_until(len(seen) - 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    seen.append(found())
print(json.dumps(seen))
"""
"""Saves another model over one, again and again, killed at the n-th use of a file of the folder.

Prints which model the folder holds before, after each kill, and at the end.
"""


def test_a_killed_save_leaves_a_whole_model_or_none(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    old, *killed, new = json.loads(done.stdout)
    assert (old[0], new[0]) == ("relu", "elu")
    assert len(killed) > 3
    assert all(each in (old, new, None) for each in killed)


def test_a_whole_save_leaves_nothing_else_behind(folder: Path) -> None:
    vlae.save(vlae.load(folder), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads((folder / "model.json").read_text())["latents"] == 3
