"""Models are built from plain arguments for any image size, and load bit for bit as saved."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlae

FRESH_PROCESS = """
import sys

import torch
import vlae
from pathlib import Path
from safetensors.torch import load_file, save_file

def refuse_unpickling(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickled {arguments}")

sys.addaudithook(refuse_unpickling)
torch.set_num_threads(1)
for folder in Path(sys.argv[1]).iterdir():
    model = vlae.load(folder)
    inputs = load_file(folder / "inputs")
    with torch.no_grad():
        bound = model(inputs["x"], inputs["noise"])
    images = vlae.sample(model, 4, torch.Generator().manual_seed(0))
    outputs = {"distortion": bound.distortion, "rate": bound.rate_per_latent, "images": images}
    save_file(outputs, folder / "outputs")
for name in ("ray", "pipeline", "hydra", "mlflow", "boto3"):
    assert name not in sys.modules, name
"""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def binary(*shape: int, seed: int = 0) -> Tensor:
    return torch.bernoulli(torch.full(shape, 0.5), generator=torch.Generator().manual_seed(seed))


def test_saved_models_give_the_same_bits_in_a_fresh_process_that_unpickles_nothing(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]], randomize: Callable[..., None]
) -> None:
    x, noise = binary(8, 1, 14, 15), normal(3, 8, 2)
    models = {}
    for window, depth in (("4x2", 2), ("full", 1), ("0x0", 0)):
        arguments = small_arguments((1, 14, 15), window, flow_depth=depth)
        models[window] = vlae.build(**arguments)
        randomize(models[window])
        vlae.save(models[window], tmp_path / window)
        save_file({"x": x, "noise": noise}, tmp_path / window / "inputs")

    repository = Path(vlae.__file__).parents[1]
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

    for window, model in models.items():
        outputs = load_file(tmp_path / window / "outputs")
        with torch.no_grad():
            bound = model(x, noise)
        assert torch.equal(outputs["distortion"], bound.distortion)
        assert torch.equal(outputs["rate"], bound.rate_per_latent)
        assert torch.equal(
            outputs["images"], vlae.sample(model, 4, torch.Generator().manual_seed(0))
        )


def test_a_loaded_model_has_the_saved_weights_and_is_in_evaluation_mode(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]], randomize: Callable[..., None]
) -> None:
    arguments = small_arguments((3, 9, 8), "3x2")
    model = vlae.build(**arguments)
    randomize(model)
    vlae.save(model, tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        loaded = vlae.load(folder)
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_saving_again_replaces_the_model(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]], randomize: Callable[..., None]
) -> None:
    for window in ("3x2", "full"):
        arguments = small_arguments((1, 5, 6), window)
        model = vlae.build(**arguments)
        randomize(model)
        vlae.save(model, tmp_path)
    assert str(vlae.load(tmp_path).decoder.window) == "full"


def test_a_saved_model_is_json_and_tensors(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]]
) -> None:
    arguments = small_arguments((1, 5, 6), "3x2")
    vlae.save(vlae.build(**arguments), tmp_path)
    by_kind = {file.suffix: file for file in tmp_path.iterdir()}
    assert by_kind.keys() == {".json", ".safetensors"}
    assert json.loads(by_kind[".json"].read_text())
    assert load_file(by_kind[".safetensors"])


def test_loading_an_empty_folder_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        vlae.load(tmp_path)


def test_loading_a_folder_without_weights_is_an_error_that_names_the_missing_file(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]]
) -> None:
    arguments = small_arguments((1, 5, 6), "3x2")
    vlae.save(vlae.build(**arguments), tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=weights.name):
        vlae.load(tmp_path)


def test_weights_of_another_model_are_refused(
    tmp_path: Path, small_arguments: Callable[..., dict[str, Any]]
) -> None:
    for folder, window in (("one", "3x2"), ("other", "full")):
        arguments = small_arguments((1, 5, 6), window)
        vlae.save(vlae.build(**arguments), tmp_path / folder)
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    (tmp_path / "one" / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match="context"):
        vlae.load(tmp_path / "one")


def test_an_unknown_argument_is_an_error_that_names_it(
    small_arguments: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(TypeError, match="windows"):
        vlae.build(**small_arguments((1, 5, 6), "3x2"), windows="3x2")  # type: ignore[call-arg]


@pytest.mark.parametrize("window", ["7x2", "3x6", "28x28"])
def test_a_window_larger_than_the_image_is_an_error_that_names_both(
    small_arguments: Callable[..., dict[str, Any]], window: str
) -> None:
    with pytest.raises(ValueError, match=f"{window}.*6x5"):
        vlae.build(**small_arguments((1, 5, 6), window))


@pytest.mark.parametrize("window", ["", "3", "3*2", "none"])
def test_a_window_that_does_not_parse_is_an_error_that_quotes_it(
    small_arguments: Callable[..., dict[str, Any]], window: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(window))):
        vlae.build(**small_arguments((1, 5, 6), window))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flow_depth", -1),
        ("latents", 0),
        ("image_shape", (1, 0, 5)),
        ("image_shape", (0, 6, 5)),
        ("image_shape", (28, 28)),
    ],
)
def test_an_impossible_size_is_an_error_that_names_the_argument(
    small_arguments: Callable[..., dict[str, Any]], name: str, value: object
) -> None:
    with pytest.raises(ValueError, match=name):
        vlae.build(**{**small_arguments((1, 5, 6), "0x0"), name: value})


def test_a_saved_model_holds_the_default_arguments_too(tmp_path: Path) -> None:
    vlae.save(vlae.build(image_shape=(1, 8, 8)), tmp_path)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text()).keys() == inspect.signature(vlae.build).parameters.keys()


def assert_runs(arguments: dict[str, Any]) -> None:
    model = vlae.build(**arguments)
    image_shape = arguments["image_shape"]
    assert model.image_shape == image_shape
    x = binary(2, *image_shape)
    assert model.decoder(normal(2, 2), x).logits.movedim(-1, 1).shape == x.shape
    bound = model(x, normal(3, 2, 2))
    assert bound.distortion.shape == bound.rate.shape == (3, 2)
    assert bound.rate_per_latent.shape == (3, 2, 2)
    assert torch.isfinite(bound.elbo).all()


@given(st.sampled_from([1, 3]), st.integers(1, 33), st.integers(1, 33), st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_model_is_built_and_runs_for_any_image_size(
    small_arguments: Callable[..., dict[str, Any]],
    channels: int,
    height: int,
    width: int,
    data: st.DataObject,
) -> None:
    window = data.draw(
        st.sampled_from(["0x0", "full", f"{width}x{height}", f"{width}x0", f"1x{height}"])
    )
    assert_runs(small_arguments((channels, height, width), window))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 40),
        (6, 6),
        (7, 7),
        (12, 14),
        (13, 13),
        (27, 14),
        (28, 28),
        (33, 20),
    ],
)
def test_a_model_is_built_and_runs_where_the_number_of_halvings_changes(
    small_arguments: Callable[..., dict[str, Any]], channels: int, height: int, width: int
) -> None:
    for window in ("0x0", "1x1", f"{width}x{height}", "full"):
        assert_runs(small_arguments((channels, height, width), window))


def test_the_global_generator_decides_the_weights(
    small_arguments: Callable[..., dict[str, Any]],
) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = vlae.build(**small_arguments((1, 5, 6), "3x2"))
        return nn.utils.parameters_to_vector(model.parameters())

    with torch.random.fork_rng():
        assert torch.equal(weights(0), weights(0))
        assert not torch.equal(weights(0), weights(1))


def test_the_defaults_build_a_model_for_28_by_28_images() -> None:
    model = vlae.build(image_shape=(1, 28, 28))
    assert torch.isfinite(model(binary(2, 1, 28, 28), normal(2, model.latents)).elbo).all()


def test_a_model_is_described_by_its_window_latents_and_flow_depth() -> None:
    arguments = vlae.build(image_shape=(1, 8, 8), latents=4).arguments
    assert vlae.describe(arguments) == "window 5x2, 4 latents, flow depth 2"
    assert vlae.describe({"window": "full", "latents": "32", "flow_depth": "0"}) == (
        "window full, 32 latents, flow depth 0"
    )
