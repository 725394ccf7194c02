"""``vlae compress`` and ``vlae decompress`` from the outside, with real Ray tasks."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import commands
from pipeline.coding import compression, lossy
from pipeline.coding.container import Reader
from pipeline.commands.codes import compress, decompress
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_images
from pipeline.errors import DamagedData, UserError
from pipeline.noise import Purpose, normal
from pipeline.runs import OpenedModel, Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.training import loop
from pipeline.values import JsonObject
from tests.pipeline import strokes
from vlae.sampling import walk

RUNS = {
    "binary": [],
    "grey": ["dataset.binarization=none"],
    "iaf": ["model.flow_depth=0", "model.posterior_depth=2"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with a data set of 96, 20 and 13 images, and trained models."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    for name, overrides in RUNS.items():
        loop.fit(strokes.train_config(root, f"name={name}", "train.images=80", *overrides))
    return root


def squeeze(root: str, output: str, *words: str, run: str = "binary") -> JsonObject:
    options = [f"model={root}/runs/{run}", f"output={output}", *words]
    return compress.run(commands.load("compress", options))


def unfold(root: str, output: str, target: str, *words: str, run: str = "binary") -> JsonObject:
    options = [f"model={root}/runs/{run}", f"file={output}/images.vlae", f"output={target}"]
    return decompress.run(commands.load("decompress", [*options, *words]))


def images_of(url: str, split: str = "test") -> torch.Tensor:
    return torch.cat(
        [
            batch.images
            for batch in EvalLoader(DataSet.load(open_storage(url)), split=split, batch_size=50)
        ]
    )


def original(root: str, binarization: Binarization, split: str = "test") -> torch.Tensor:
    data = DataSet.load(strokes.data_storage(root))
    (batch,) = EvalLoader(data, split=split, batch_size=96)
    return (255 * binarize(batch, binarization, 0)).to(torch.uint8)


@pytest.mark.parametrize("run", RUNS)
def test_a_data_set_comes_back_bit_for_bit(root: str, tmp_path: Path, run: str) -> None:
    result = squeeze(root, str(tmp_path / "file"), run=run)
    assert result["bytes"] == (tmp_path / "file/images.vlae").stat().st_size
    assert (result["images"], result["blocks"]) == (13, 1)
    unfold(root, str(tmp_path / "file"), str(tmp_path / "back"), run=run)
    mode = Binarization.none if run == "grey" else Binarization.dynamic
    assert torch.equal(images_of(str(tmp_path / "back")), original(root, mode))


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_write_blocks_that_decode_alone(root: str, storage: Storage, tmp_path: Path) -> None:
    words = ["split=train", "images_per_block=30"]
    result = squeeze(root, storage.child("file").url, *words)
    assert (result["images"], result["blocks"]) == (96, 4)
    first = storage.read("file/images.vlae")
    squeeze(root, storage.child("again").url, *words)
    assert storage.read("again/images.vlae") == first
    unfold(root, storage.child("file").url, storage.child("back").url)
    expected = original(root, Binarization.dynamic, "train")
    (batch,) = EvalLoader(DataSet.load(storage.child("back")), split="train", batch_size=96)
    assert torch.equal(batch.images, expected)


def test_another_process_with_more_threads_decodes(root: str, tmp_path: Path) -> None:
    squeeze(root, str(tmp_path / "file"))
    options = [f"model={root}/runs/binary", f"file={tmp_path}/file/images.vlae"]
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "decompress", *options, f"output={tmp_path}/back"],
        env=os.environ | {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "13 test images given back bit for bit" in ended.stdout
    assert torch.equal(images_of(str(tmp_path / "back")), original(root, Binarization.dynamic))


def test_keys_and_labels_travel_along_if_asked(root: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    store = open_storage(str(tmp_path / "named"))
    keys, labels = [f"cats/{n}.png" for n in range(5)], np.array([0, 1, 1, 0, 1])
    shard = write_images(
        store, "test/0.tar", 0, list(pixels), labels, 4, compression.Encoding.npy, keys
    )
    Manifest("named", (1, 8, 8), 2, 4, {"test": (shard,)}).publish(store)
    for names in ("true", "false"):
        squeeze(root, f"{tmp_path}/{names}", f"dataset_url={store.url}", f"names={names}")
        unfold(root, f"{tmp_path}/{names}", f"{tmp_path}/back-{names}")
        loader = EvalLoader(
            DataSet.load(open_storage(f"{tmp_path}/back-{names}")), split="test", batch_size=5
        )
        (batch,) = loader
        kept = names == "true"
        assert batch.labels.tolist() == (labels.tolist() if kept else [-1] * 5)
        assert loader.keys(batch) == (keys if kept else None)


def test_a_lossy_file_is_as_long_as_asked_and_redrawn_alike_each_time(
    root: str, tmp_path: Path
) -> None:
    sizes = {}
    for bits in (1, 9):
        result = squeeze(root, f"{tmp_path}/{bits}", "lossy=true", f"bits={bits}", "split=train")
        sizes[bits] = result["bytes"]
        assert result["bytes"] - result["container_bytes"] == 96 * bits // 8
    drawn = [f"{tmp_path}/a", f"{tmp_path}/b"]
    for target in drawn:
        unfold(root, f"{tmp_path}/9", target)
    assert torch.equal(images_of(drawn[0], "train"), images_of(drawn[1], "train"))
    unfold(root, f"{tmp_path}/9", f"{tmp_path}/mode", "draw=mode")
    assert not torch.equal(images_of(f"{tmp_path}/mode", "train"), images_of(drawn[0], "train"))
    with pytest.raises(UserError, match="made from other images or options"):
        unfold(root, f"{tmp_path}/9", drawn[0], "draw=mode")


@pytest.fixture(scope="module")
def nested(root: str) -> OpenedModel:
    """A nested model whose latents carry about two bits each; the run is ``nested``."""
    config = strokes.train_config(root, "name=nested", "train.images=80", "train.nested=true")
    loop.fit(config)
    model = Run.of(config).open()
    with torch.no_grad():
        model.network.encoder.head.bias[4:] -= 1.5  # the log scales of its 4 latents
    Run.of(config).publish(model.network, model.training)
    return Run.of(config).open()


@pytest.mark.parametrize(("bits", "sent"), [(1, 1), (3, 1), (4, 2), (None, 4)])
def test_a_nested_model_sends_as_many_latents_as_keep_the_budget(
    root: str, nested: OpenedModel, tmp_path: Path, bits: int | None, sent: int
) -> None:
    data = DataSet.load(strokes.data_storage(root))
    rates = compression.rate_bits(nested.network, data, "test", Binarization.dynamic)
    words = ["lossy=true"] if bits is None else ["lossy=true", f"bits={bits}"]
    result = squeeze(root, f"{tmp_path}/file", *words, run="nested")
    bits = bits or math.ceil(rates.sum())
    assert (result["lossy_bits"], result["lossy_latents"]) == (bits, sent)
    assert sent == 1 or rates[:sent].sum() <= bits
    assert sent == 4 or rates[: sent + 1].sum() > bits
    assert result["bytes"] - result["container_bytes"] == math.ceil(13 * bits / 8)

    unfold(root, f"{tmp_path}/file", f"{tmp_path}/mode", "draw=mode", run="nested")
    reader = Reader(open_storage(f"{tmp_path}/file").stream("images.vlae"), "")
    assert reader.header.sent == sent
    (frame,) = reader.frames()
    numbers = torch.from_numpy(lossy.unpack(frame.payload, 13, bits))
    noise = torch.from_numpy(normal((0, Purpose.CODEBOOK), np.arange(1 << bits), 4))
    with torch.no_grad():
        z = nested.network.prior.sample(noise)[numbers]
        z[:, sent:] = 0
        drawn = walk(nested.network.decoder, z, lambda pixels, row, column: pixels.mode())
    assert torch.equal(images_of(f"{tmp_path}/mode"), (255 * drawn).to(torch.uint8))

    for target in ("a", "b"):
        unfold(root, f"{tmp_path}/file", f"{tmp_path}/{target}", run="nested")
    assert torch.equal(images_of(f"{tmp_path}/a"), images_of(f"{tmp_path}/b"))


@pytest.mark.usefixtures("nested")
@pytest.mark.parametrize("run", ["binary", "nested"])
def test_a_lossy_file_of_an_empty_split_says_that_it_is_empty(
    root: str, tmp_path: Path, run: str
) -> None:
    store = open_storage(f"{tmp_path}/empty")
    contents = DataSet.load(strokes.data_storage(root)).manifest
    dataclasses.replace(contents, name="empty", splits={"test": ()}).publish(store)
    options = [f"model={root}/runs/{run}", f"output={tmp_path}/file", "lossy=true"]
    config = commands.load("compress", [*options, f"dataset_url={store.url}"])
    assert "no images: the test split is empty" in compress.format_result(
        config, compress.run(config)
    )
    result = unfold(root, f"{tmp_path}/file", f"{tmp_path}/back", run=run)
    assert result["images"] == 0


def test_a_nested_model_codes_whole_images_with_whole_codes(
    root: str, nested: OpenedModel, tmp_path: Path
) -> None:
    result = squeeze(root, f"{tmp_path}/file", run="nested")
    assert result["lossy_latents"] is None
    unfold(root, f"{tmp_path}/file", f"{tmp_path}/back", run="nested")
    assert torch.equal(images_of(f"{tmp_path}/back"), original(root, Binarization.dynamic))


def test_a_lossy_file_is_about_as_long_as_the_rate(root: str, tmp_path: Path) -> None:
    result = squeeze(root, f"{tmp_path}/file", "lossy=true")
    assert 1 <= result["lossy_bits"] <= 20
    with pytest.raises(UserError, match="posterior_depth=0"):
        squeeze(root, f"{tmp_path}/iaf", "lossy=true", "bits=3", run="iaf")


def test_what_cannot_be_decompressed_is_named(root: str, tmp_path: Path) -> None:
    squeeze(root, f"{tmp_path}/file")
    with pytest.raises(UserError, match="was compressed with the model of sha256"):
        unfold(root, f"{tmp_path}/file", f"{tmp_path}/back", run="iaf")
    with pytest.raises(UserError, match="draw=mode redraws"):
        unfold(root, f"{tmp_path}/file", f"{tmp_path}/back", "draw=mode")
    with pytest.raises(UserError, match="add lossy=true"):
        squeeze(root, f"{tmp_path}/none", "bits=3")
    with pytest.raises(UserError, match="holds other compressed images"):
        squeeze(root, f"{tmp_path}/file", "seed=1")
    path = tmp_path / "file/images.vlae"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedData, match=r"images\.vlae is damaged"):
        unfold(root, f"{tmp_path}/file", f"{tmp_path}/back")
    assert not (tmp_path / "back/manifest.json").exists()


def test_a_machine_that_computes_other_probabilities_says_so(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeeze(root, f"{tmp_path}/file")
    header = Reader(open_storage(f"{tmp_path}/file").stream("images.vlae"), "").header
    assert "torch" in header.machine
    # What a last bit more in the decoder's arithmetic does, as on another processor.
    monkeypatch.setattr("vlae.likelihood.torch.sigmoid", lambda x: 1 / (1 + torch.exp(-x * 1.001)))
    with pytest.raises(UserError, match="computes other probabilities"):
        unfold(root, f"{tmp_path}/file", f"{tmp_path}/back")


def test_the_command_tells_the_size(root: str, tmp_path: Path) -> None:
    config = commands.load("compress", [f"model={root}/runs/binary", f"output={tmp_path}/file"])
    text = compress.format_result(config, json.loads(json.dumps(compress.run(config))))
    assert "13 test images in" in text
    assert "initial bits" in text
