"""``vlae encode`` with real Ray tasks.

Every image is encoded once, and neither the number of tasks nor a kill changes the files.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vlae
from pipeline import commands
from pipeline.commands.codes import encode
from pipeline.commands.images import shard
from pipeline.config import sections
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.sources.base import SPLITS
from pipeline.errors import UserError
from pipeline.evaluation import encoding
from pipeline.evaluation.probe import code_noise
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.training import loop
from tests.pipeline import strokes
from tests.pipeline.images import write_images

MODELS = {"flow": [], "iaf": ["model.flow_depth=0", "model.posterior_depth=2"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with a data set of 96, 20 and 13 images, and trained models."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    for name, overrides in MODELS.items():
        loop.fit(strokes.train_config(root, f"name={name}", "train.images=80", *overrides))
    return root


def options(root: str, output: str, *overrides: str, model: str = "flow") -> encode.EncodeConfig:
    loaded: encode.EncodeConfig = commands.load(
        "encode", [f"model={root}/runs/{model}", f"output={output}", *overrides]
    )
    return loaded


def rows(output: Storage) -> pa.Table:
    return pa.concat_tables(
        pq.read_table(io.BytesIO(output.read(key))) for key in output.list("codes")
    )


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("model", MODELS)
def test_every_image_is_encoded_once_in_order_with_its_label_scale_and_rate(
    model: str, root: str, storage: Storage
) -> None:
    result = encode.run(
        options(root, storage.url, "split=train", "images_per_part=30", model=model)
    )
    assert (result["images"], len(result["parts"]), result["reused"]) == (96, 4, False)
    table = rows(storage)
    assert table["sample"].to_pylist() == list(range(96))
    assert "key" not in table.column_names
    network = vlae.load(f"{root}/runs/{model}/model")
    data = DataSet.load(strokes.data_storage(root))
    (batch,) = EvalLoader(data, split="train", batch_size=96)
    x = binarize(batch, sections.Binarization.dynamic, 0)
    noise = code_noise(network, batch, 0)
    with torch.no_grad():
        posterior, bound = network.encoder(x), network(x, noise)
        code, scale = posterior.code, posterior.log_scale.exp() if model == "flow" else None
    assert table["label"].to_pylist() == batch.labels.tolist()
    np.testing.assert_allclose(np.array(table["code"].to_pylist()), code.numpy(), atol=1e-5)
    np.testing.assert_allclose(
        np.array(table["rate_bits"]),
        bound.rate.double().numpy() / math.log(2),
        rtol=1e-4,
        atol=1e-4,
    )
    assert ("scale" in table.column_names) == (model == "flow")
    if scale is not None:
        np.testing.assert_allclose(np.array(table["scale"].to_pylist()), scale.numpy(), rtol=1e-4)
    again = encode.run(options(root, storage.url, "split=train", "images_per_part=30", model=model))
    assert again == {**result, "reused": True}


@pytest.mark.usefixtures("ray_cluster")
def test_the_files_are_the_same_without_ray(root: str, tmp_path: Path) -> None:
    by_tasks, alone = open_storage(str(tmp_path / "tasks")), open_storage(str(tmp_path / "alone"))
    encode.run(options(root, by_tasks.url, "split=test", "images_per_part=4"))
    data = DataSet.load(strokes.data_storage(root))
    network = vlae.load(f"{root}/runs/flow/model")
    for part in (3, 1, 0, 2):
        encoding.encode_part(
            network,
            data,
            alone,
            "test",
            sections.Binarization.dynamic,
            0,
            part,
            4,
        )
    assert {key: by_tasks.read(key) for key in by_tasks.list("codes")} == {
        key: alone.read(key) for key in alone.list("codes")
    }


@pytest.mark.usefixtures("ray_cluster")
def test_after_a_kill_the_command_encodes_the_missing_parts(root: str, tmp_path: Path) -> None:
    output = open_storage(str(tmp_path / "codes"))
    words = [f"model={root}/runs/flow", f"output={output.url}", "split=train", "images_per_part=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "encode", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while len(output.list("codes")) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists("result.json"), "it ended before it could be killed"
    time.sleep(2)  # tasks of the killed driver end
    kept = {key: os.stat(tmp_path / "codes" / key).st_mtime_ns for key in output.list("codes")}
    assert 3 <= len(kept) < 48
    result = encode.run(options(root, output.url, "split=train", "images_per_part=2"))
    assert not result["reused"]
    assert rows(output)["sample"].to_pylist() == list(range(96))
    assert {key: os.stat(tmp_path / "codes" / key).st_mtime_ns for key in kept} == kept
    assert sorted(output.list()) == sorted(
        ["recipe.json", "result.json", *(f"codes/part-{part:05d}.parquet" for part in range(48))]
    )


@pytest.mark.usefixtures("ray_cluster")
def test_codes_have_the_names_of_their_images(root: str, tmp_path: Path) -> None:
    names = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(40)] + [
        os.fsdecode(b"dog/b\xe9b\xe9.png")
    ]
    write_images(tmp_path / "images", names, (strokes.SIZE, strokes.SIZE), mode="L")
    folder = [
        "dataset.name=pets",
        "dataset.source=folder",
        f"dataset.path={tmp_path}/images",
        f"storage.root={tmp_path}",
    ]
    shard.run(
        commands.load("shard", [*folder, "shard.test_fraction=0.3", "shard.valid_fraction=0.3"])
    )
    found = {}
    for split in SPLITS:
        output = open_storage(str(tmp_path / split))
        encode.run(
            options(root, output.url, f"split={split}", f"dataset_url={tmp_path}/datasets/pets")
        )
        table = rows(output)
        found |= dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == {name.replace("\udce9", r"\xe9"): int(name.startswith("dog")) for name in names}


def test_codes_of_another_model_or_setting_are_not_mixed(root: str, tmp_path: Path) -> None:
    output = open_storage(str(tmp_path))
    recipe = {"weights": "0" * 64}
    output.write_json("recipe.json", recipe)
    with pytest.raises(
        UserError, match=rf"{tmp_path} holds the codes of another model, data set or setting"
    ):
        encode.run(options(root, str(tmp_path)))
    assert json.loads(output.read("recipe.json")) == recipe
