"""A new user's colour icons: a folder and a name are all that the commands need."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import DataSet
from pipeline.storage import open_storage
from tests.e2e.conftest import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHORT = ["train=brief", "train.images=160", "train.valid_every=80", "train.valid_images=20"]
"""A training of seconds."""
SIZE = 16


def draw_icons(folder: Path) -> None:
    """Discs and squares in bright colours, on transparent ground."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    for number in range(240):
        kind = ("disc", "square")[number % 2]
        radius = random.uniform(3, 7)
        shape = x**2 + y**2 < radius**2 if kind == "disc" else np.maximum(abs(x), abs(y)) < radius
        icon = np.zeros((SIZE, SIZE, 4), np.uint8)
        icon[shape] = [*random.permutation([230, 40, random.integers(256)]), 255]
        path = folder / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(icon).save(path)


def test_icons_become_a_colour_model_without_any_option(
    call: Run, root: str, workplace: Path
) -> None:
    draw_icons(workplace / "icons")
    (workplace / "icons" / "licence.txt").write_text("free")
    place = f"storage.root={root}"
    told = call("shard", place, "dataset=folder", "dataset.name=icons", "dataset.path=icons").stdout
    assert "data set icons written: 3 x 16 x 16, 256 values" in told
    assert "241 files found: 240 used, 1 passed over" in told
    assert "labels: 2 classes (disc, square)" in told
    manifest = DataSet.load(open_storage(f"{root}/datasets/icons")).manifest
    assert manifest.class_names == ["disc", "square"]

    refused = call("train", place, "dataset.name=icons", "dataset.binarization=dynamic", code=2)
    assert "the images of data set icons are in colour" in refused.stderr

    call("train", place, "dataset.name=icons", "name=icons", *SHORT)
    config = json.loads(open_storage(f"{root}/runs/icons").read("config.json"))
    assert config["dataset"]["binarization"] == "none"
    assert config["model"]["encoder_channels"] == 32  # of model=colour

    model = f"model={root}/runs/icons"
    few = ["bounds.samples=2", "bounds.num_images=20", "bounds.pictures=8"]
    few += ["bounds.resolution_images=0"]
    call("evaluate", model, place, *few)
    test = json.loads((workplace / "outputs/evaluate/icons/result.json").read_text())["test"]
    assert 0 < test["elbo_nats"] < 3 * SIZE**2 * math.log(256)
    assert test["probe"]["linear"]["accuracy"] >= 0
    call("sample", model, place)
    sheet = np.asarray(
        Image.open(workplace / "outputs/sample/icons/samples.png").convert("RGB"), float
    )
    assert np.ptp(sheet, axis=2).max() > 50, "the samples are in colour"
