"""The code of docs/python.md runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vlae
from pipeline.storage import open_storage
from tests.pipeline import strokes

PAGE = Path(__file__).parents[2] / "docs/python.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_the_page_loads_encodes_decodes_samples_and_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strokes.write(open_storage(str(tmp_path / "vlae-store/datasets/birds")))
    built = vlae.build(image_shape=(1, 8, 8), latents=3, window="3x1", flow_hidden=16)
    vlae.save(built, tmp_path / "vlae-store/runs/birds/model")
    code: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(block, code)  # our own document
    x = code["x"]
    assert x.shape == code["redrawn"].shape == code["again"].shape == (8, 1, 8, 8)
    assert code["drawn"].shape == (16, 1, 8, 8)
    assert torch.equal(
        code["same"], vlae.sample(code["model"], 16, torch.Generator().manual_seed(7))
    )
    bound = code["bound"]
    torch.testing.assert_close(bound.elbo, -(bound.rate + bound.distortion))
    assert vlae.load(tmp_path / "fresh").latents == 8
