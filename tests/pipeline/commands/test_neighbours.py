"""``vlae neighbours``: its table, its sheet, its scores, and duplicates that cross splits."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vlae
from pipeline import cli
from pipeline.config import sections
from pipeline.config.sections import Encoding
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_images
from pipeline.evaluation import encoding
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline import strokes

NAMED = {"train": 40, "valid": 12, "test": 14}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two trained models on ``strokes``, and ``named``, whose images have names.

    Among its images, train 5 is test 0, valid 1 is valid 2, and test 3 is nearly train 7.
    """
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    for window in ("3x1", "0x0"):
        loop.fit(
            strokes.train_config(
                root, f"name=w{window}", f"model.window={window}", "train.images=80"
            )
        )
    images = {}
    for number, (split, count) in enumerate(NAMED.items()):
        images[split] = strokes.Strokes().read("train", 100 * number, 100 * number + count)[0]
    images["test"][0], images["valid"][2] = images["train"][5], images["valid"][1]
    images["test"][3] = images["train"][7] ^ 1
    storage, splits = open_storage(f"{root}/datasets/named"), {}
    for split, pictures in images.items():
        keys = [f"{split}/{number}.png" for number in range(len(pictures))]
        keys[4] = os.fsdecode(b"b\xe9b\xe9.png")
        labels = np.arange(len(pictures)) % 3 - 1
        splits[split] = (
            write_images(storage, f"{split}/0.tar", 0, pictures, labels, 16, Encoding.npy, keys),
        )
    Manifest("named", strokes.Strokes.image_shape, 2, 16, splits, binarization="dynamic").publish(
        storage
    )
    return root


def run(
    capsys: pytest.CaptureFixture[str], root: str, output: Path, *words: str, code: int = 0
) -> tuple[str, dict[str, Any]]:
    """Run the command; returns what it printed, or its error, and its result."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["neighbours", f"model={root}/runs/w3x1", f"output={output}", *words])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    if code:
        return printed.err.splitlines()[-1], {}
    return printed.out, json.loads((output / "result.json").read_text())


def codes(root: str, name: str, split: str) -> np.ndarray:
    """The codes of a split's images, as ``vlae encode`` writes them."""
    data = DataSet.open(f"{root}/datasets/{name}")
    (batch,) = EvalLoader(data, split=split, batch_size=96)
    with torch.no_grad():
        posterior = vlae.load(f"{root}/runs/w3x1/model").encoder(
            binarize(batch, sections.Binarization.dynamic, 0)
        )
    return posterior.code.double().numpy()


def test_the_table_holds_the_nearest_of_each_image_but_itself(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, result = run(capsys, root, tmp_path, "split=train", "neighbours=3", "num_images=50")
    table = pq.read_table(tmp_path / "neighbours.parquet")
    assert table.column_names == ["sample", "rank", "neighbour", "distance"]
    vectors = codes(root, "strokes", "train")
    distances = np.sqrt(((vectors[:50, None] - vectors) ** 2).sum(-1))
    distances[np.arange(50), np.arange(50)] = np.inf
    expected = distances.argsort(1)[:, :3]
    assert table["sample"].to_pylist() == np.arange(50).repeat(3).tolist()
    assert table["rank"].to_pylist() == [1, 2, 3] * 50
    np.testing.assert_allclose(
        np.array(table["distance"]).reshape(50, 3), np.sort(distances)[:, :3], rtol=1e-3, atol=1e-4
    )
    assert (np.array(table["neighbour"]).reshape(50, 3) == expected).mean() > 0.98
    assert result["images"] == 50
    assert "for 50 train images" in printed
    assert result["scores"].keys() == {f"{root}/runs/w3x1", "pixels"}
    with Image.open(tmp_path / "neighbours.png") as sheet:
        sheet.load()


def test_models_beside_and_another_split_are_compared_with_names(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"dataset_url={root}/datasets/named", f"beside=[{root}/runs/w0x0]", "among=train"]
    printed, result = run(capsys, root, tmp_path, *words, "images=[test/2.png,0]", "neighbours=2")
    assert result["shown"] == ["test/2.png", "test/0.png"]
    table = pq.read_table(tmp_path / "neighbours.parquet").to_pylist()
    assert len(table) == 2 * NAMED["test"]
    assert table[8]["key"] == r"b\xe9b\xe9.png"
    assert {row["neighbour_key"].split("/")[0] for row in table} <= {"train", r"b\xe9b\xe9.png"}
    assert result["beside"].keys() == {f"{root}/runs/w0x0"}
    assert result["scores"].keys() == {f"{root}/runs/w3x1", f"{root}/runs/w0x0", "pixels"}
    for figures in result["scores"].values():
        assert 0 <= figures["recall_at_1"] <= figures["recall_at_10"] <= 1
    # Test 0 is train 5: by pixels, each is the nearest of the other.
    for name in ("w3x1", "w0x0", "pixels"):
        assert [line for line in printed.splitlines() if line.startswith(f"  {name} ")]


def test_copies_across_splits_are_reported_with_their_pictures(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"dataset_url={root}/datasets/named", "duplicates=true", "shown=2"]
    printed, result = run(capsys, root, tmp_path, *words)
    found = result["duplicates"]
    assert found["equal"] == 2
    assert found["across_splits"]["equal"] == {"train and test": 1}
    assert found["examples"][0]["images"] == ["train/5.png", "test/0.png"]
    assert "2 pairs of equal images: 1 across train and test" in printed
    rows = pq.read_table(tmp_path / "duplicates.parquet").to_pylist()
    assert len(rows) == found["equal"] + found["near"]
    pairs = {(row["key"], row["key_2"]): row["difference"] for row in rows}
    assert pairs["train/5.png", "test/0.png"] == pairs["valid/1.png", "valid/2.png"] == 0
    assert pairs.get(("train/7.png", "test/3.png")) == pytest.approx(1.0)
    with Image.open(tmp_path / "duplicates.png") as sheet:
        sheet.load()


def test_codes_that_encode_has_written_are_used_and_others_are_refused(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataSet.open(f"{root}/datasets/strokes")
    stored = open_storage(str(tmp_path / "codes"))
    message, _ = run(capsys, root, tmp_path, f"codes=[{stored.url}]", code=2)
    assert "holds no complete codes" in message
    network, dynamic = vlae.load(f"{root}/runs/w3x1/model"), sections.Binarization.dynamic
    for part in range(2):
        encoding.encode_part(network, data, stored, "test", dynamic, 0, part, 2)
    key = stored.list("codes")[0]
    _, fresh = run(capsys, root, tmp_path / "fresh", "neighbours=2")
    record = {"weights": fresh["weights"], "manifest": data.manifest.digest, "split": "test"}
    stored.write_json("result.json", record)
    run(capsys, root, tmp_path / "out", f"codes=[{stored.url}]", "neighbours=2")
    first, second = (
        pq.read_table(tmp_path / name / "neighbours.parquet")["distance"].to_pylist()
        for name in ("fresh", "out")
    )
    assert second == pytest.approx(first, rel=1e-3, abs=1e-4)
    content = stored.read(key)
    table = pq.read_table(io.BytesIO(content))
    doubled = pa.array(
        [[2 * value for value in code] for code in table["code"].to_pylist()], table["code"].type
    )
    file = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("code"), "code", doubled), file)
    stored.write(key, file.getvalue())
    run(capsys, root, tmp_path / "other", f"codes=[{stored.url}]", "neighbours=2")
    third = pq.read_table(tmp_path / "other/neighbours.parquet")["distance"].to_pylist()
    assert third != pytest.approx(first, rel=1e-3, abs=1e-4)
    for name, words in (("weights", "another model"), ("manifest", "another data set")):
        stored.write_json("result.json", {**record, name: "0" * 64})
        message, _ = run(capsys, root, tmp_path, f"codes=[{stored.url}]", code=2)
        assert f"holds codes of {words}" in message
    stored.write_json("result.json", record)
    stored.delete([key])
    message, _ = run(capsys, root, tmp_path, f"codes=[{stored.url}]", code=2)
    assert "lacks some of its codes" in message


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["images=[99]"], "has no image 99; its images are numbered 0 to 12"),
        (["images=[cat.png]"], "has no image 'cat.png'"),
        (["images=[-1]"], "has no image -1"),
        (["among=other"], "has no split 'other'"),
        (["neighbours=0"], "neighbours is 0; it must be in 1..1000"),
        (["beside=[nowhere]"], "nowhere"),
    ],
)
def test_a_mistake_ends_in_a_sentence(
    words: list[str],
    sentence: str,
    root: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message, _ = run(capsys, root, tmp_path / "out", *words, code=2)
    assert sentence in message
    assert not (tmp_path / "out").exists()
