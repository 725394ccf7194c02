"""A saved model may come from anybody: an invalid one is refused before anything is built."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import vlae


@pytest.fixture
def folder(tmp_path: Path, small_arguments: Callable[..., dict[str, Any]]) -> Path:
    """A saved model."""
    vlae.save(vlae.build(**small_arguments((1, 8, 8), "3x1")), tmp_path)
    vlae.load(tmp_path)
    return tmp_path


class Exploit:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_unpickled(file: str, how: str, folder: Path) -> None:
    mark = folder / "executed"
    if how == "pickle":
        (folder / file).write_bytes(pickle.dumps(Exploit(mark)))
    else:
        torch.save({"weights": Exploit(mark)}, folder / file)
    with pytest.raises(ValueError, match=re.escape(str(folder / file))):
        vlae.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, (1 << 62).to_bytes(8, "little") + b"{}", save({})]
)
def test_a_file_without_valid_weights_is_refused(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.(safetensors|json)"):
        vlae.load(folder)


def test_weights_of_another_shape_are_an_error_that_names_the_first(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    for changed in (
        {**weights, name: torch.zeros(3, 7)},
        {key: value for key, value in weights.items() if key != name},
        {**weights, "aaa": torch.zeros(1)},
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(
            ValueError,
            match=rf"does not belong to model\.json: (aaa|{re.escape(name)}) has the shape",
        ):
            vlae.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "../../etc/passwd"},
        {"_target_": "os.system"},
        {"window": "../../etc/passwd"},
        {"window": ["3x1"]},
        {"window": "9999x9999"},
        {"window": "9999x9999-down999"},
        {"likelihood": "/etc/passwd"},
        {"activation": "__import__('os')"},
        {"code": "s3://bucket/code"},
        {"latents": "4"},
        {"latents": True},
        {"latents": 4.0},
        {"latents": -1},
        {"flow_mean_only": 1},
        {"image_shape": [1, 8]},
        {"image_shape": "1x8x8"},
        {"image_shape": [1, 8, 8.0]},
        {"image_shape": [1, 1 << 40, 1 << 40]},
        {"image_shape": [1, -8, 8]},
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(changes: dict[str, Any], folder: Path) -> None:
    arguments = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(arguments | changes))
    with pytest.raises(ValueError, match=re.escape(str(folder / "model.json"))):
        vlae.load(folder)


@pytest.mark.parametrize("size", [1 << 14, 1 << 20, 1 << 62])
def test_sizes_beyond_the_weights_are_refused_before_anything_is_built(
    size: int, folder: Path
) -> None:
    arguments = json.loads((folder / "model.json").read_text())
    sizes = [name for name, value in arguments.items() if type(value) is int]
    assert {"latents", "flow_hidden", "blocks", "decoder_features"} <= set(sizes)
    for name in sizes:
        if name == "mixtures":  # only the other likelihood uses it
            continue
        (folder / "model.json").write_text(json.dumps(arguments | {name: size}))
        with pytest.raises(
            ValueError, match=rf"model\.(json|safetensors)\b.*({name}|does not belong to)"
        ):
            vlae.load(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "{", '"model"', '{"latents": 4}'])
def test_a_file_that_does_not_hold_arguments_is_refused(content: str, folder: Path) -> None:
    (folder / "model.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.json is no saved model"):
        vlae.load(folder)
