"""Graphs of the encoder and the decoder give what the model gives, and draw what it draws."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import vlae
from pipeline.errors import UserError
from pipeline.export import graphs
from pipeline.export.folder import describe
from pipeline.runs import OpenedModel
from pipeline.storage.base import to_json
from vlae.sampling import draw_pixels

DOCUMENT = Path(__file__).parents[3] / "docs/export.md"
SMALL = {
    "latents": 4,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "decoder_features": 8,
    "decoder_maps": 4,
    "flow_depth": 1,
    "flow_hidden": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "independent": {"image_shape": (1, 9, 8), "window": "0x0", "posterior_depth": 2},
    "full": {"image_shape": (3, 8, 7), "window": "full-grey", "likelihood": "logistic"},
    "maps": {
        "image_shape": (3, 14, 15),
        "window": "4x2-down2-grey",
        "likelihood": "logistic",
        "code": "maps",
        "posterior_depth": 1,
    },
    "stacked": {
        "image_shape": (1, 9, 8),
        "window": "5x2",
        "context_layers": 2,
        "likelihood": "logistic",
        "activation": "elu",
    },
}
"""Between them every kind of window, likelihood, code and posterior."""


@pytest.fixture(scope="module", params=list(MODELS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[vlae.VLAE, Path]:
    """A model with random weights, none of them zero, and the folder of its graphs."""
    torch.manual_seed(0)
    model = vlae.build(**{**SMALL, **MODELS[request.param]}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    folder.mkdir()
    written = graphs.write_graphs(model, folder)
    assert all(each.difference <= graphs.TOLERANCE for each in written.values())
    training = {"config": {"train": {}}}
    (folder / "config.json").write_bytes(to_json(describe(OpenedModel("", model, training, ""))))
    return model, folder


def images_for(model: vlae.VLAE, batch: int) -> torch.Tensor:
    levels = 2**model.decoder.likelihood.levels - 1
    return torch.round(torch.rand(batch, *model.image_shape) * levels) / levels


def expected_of(model: vlae.VLAE, z: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        posterior = model.encoder(x)
        found = {"code": posterior.code, **vars(model.decoder(z, x))}
        if hasattr(posterior, "mean"):
            found |= {"mean": posterior.mean, "log_scale": posterior.log_scale}
    return found


@pytest.mark.parametrize("batch", [1, 4])
def test_onnx_runtime_gives_the_codes_and_parameters_of_the_model(
    exported: tuple[vlae.VLAE, Path], batch: int
) -> None:
    model, folder = exported
    x, z = images_for(model, batch), torch.randn(batch, model.latents)
    given = {"images": x.numpy(), "z": z.numpy()}
    found = {}
    for name in ("encoder", "decoder"):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        assert all(each.shape[0] == "batch" for each in session.get_inputs())
        values = session.run(None, {each.name: given[each.name] for each in session.get_inputs()})
        found |= {
            each.name: value for each, value in zip(session.get_outputs(), values, strict=True)
        }
    expected = expected_of(model, z, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        allowed = 1e-5 * max(1.0, value.abs().max().item())
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)


def test_programs_give_the_codes_and_parameters_of_the_model(
    exported: tuple[vlae.VLAE, Path],
) -> None:
    model, folder = exported
    x, z = images_for(model, 2), torch.randn(2, model.latents)
    expected = expected_of(model, z, x)
    with torch.no_grad():
        code = torch.export.load(folder / "encoder.pt2").module()(x)[0]
        step = torch.export.load(folder / "decoder.pt2").module()(z, x)
    torch.testing.assert_close(code, expected["code"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step[0], expected["logits"], rtol=1e-4, atol=1e-5)


def test_the_documented_lines_draw_what_the_model_draws(
    exported: tuple[vlae.VLAE, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = exported
    monkeypatch.chdir(folder.parent)
    code: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S):
        exec(block, code)  # our own document
    x = images_for(model, 3)
    _, height, width = model.image_shape
    uniform = torch.rand(3, height, width, model.decoder.likelihood.num_uniforms)
    draw = code["black_or_white" if model.decoder.likelihood.levels == 1 else "of_256_values"]
    drawn = code["redraw"](x.numpy(), uniform.numpy(), draw)
    with torch.no_grad():
        z = model.encoder(x).code
    expected = draw_pixels(model.decoder, z, uniform.permute(0, 3, 1, 2))
    # A number that lies between two nearly equal probabilities may decide a pixel, and it others.
    assert np.mean(np.abs(drawn - expected.numpy()) > 1e-3) < 0.01


def test_a_graph_that_differs_from_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vlae.build(**SMALL, image_shape=(1, 8, 8), window="5x2").eval()
    nn.init.normal_(model.encoder.head.weight)
    monkeypatch.setattr(graphs, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"encoder\.(pt2|onnx) differs from the model by .*nothing"):
        graphs.write_graphs(model, tmp_path)


def test_the_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "NEEDED", ("numpy", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package: pip install 'vlae-pipeline\[exp"):
        graphs.check_installed()
