"""``vlae shard`` by Ray tasks: what it writes, when it refuses, and what a killed run leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import webdataset

from pipeline.commands.images import shard
from pipeline.commands.images.shard import ShardConfig
from pipeline.config.sections import (
    ClusterOptions,
    DatasetOptions,
    Encoding,
    ShardOptions,
    Source,
    StorageOptions,
)
from pipeline.data import DataSet
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.pipeline.images import write_idx, write_images

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_for(storage: Storage, source: Source, path: Path, **options: Any) -> ShardConfig:
    return ShardConfig(
        storage=StorageOptions(root=storage.url),
        dataset=DatasetOptions(name="small", source=source, path=str(path), url=storage.url),
        shard=ShardOptions(**({"samples_per_shard": 20, "block_size": 8} | options)),
        cluster=ClusterOptions(),
    )


def objects(storage: Storage) -> dict[str, bytes]:
    return {key: storage.read(key) for key in storage.list()}


PLACES = [("train", 0), ("train", 1), ("train", 2), ("valid", 0), ("test", 0)]


def name_of(storage: Storage, split: str, number: int) -> str:
    """The name of a shard, without its ending."""
    return DataSet.load(storage).manifest.shards(split)[number].name.removesuffix(".tar")


def test_idx_files_become_a_data_set(storage: Storage, tmp_path: Path) -> None:
    arrays = write_idx(tmp_path / "idx")
    result = shard.run(config_for(storage, Source.idx, tmp_path / "idx"))
    data = DataSet.load(storage)
    assert result == {
        "url": storage.url,
        "reused": False,
        "image_shape": [1, 5, 4],
        "num_classes": 3,
        "splits": {
            "train": {"images": 50, "shards": 3},
            "valid": {"images": 10, "shards": 1},
            "test": {"images": 10, "shards": 1},
        },
        "bytes": sum(
            len(content) for key, content in objects(storage).items() if key.endswith(".tar")
        ),
        "manifest_digest": data.manifest.digest,
        "pixels": "values",
        "class_names": None,
        "binarization": "none",
        "report": storage.read_json("report.json"),
    }
    account = result["report"]
    assert (account["found"], account["used"], account["passed_over"]) == (70, 70, {})
    assert (account["labels"]["classes"], account["labels"]["unlabelled"]) == (3, 0)
    assert account["duplicates"] == 0
    assert storage.list() == sorted(
        ["manifest.json", "report.json"]
        + [
            f"{name}.{kind}"
            for name in (name_of(storage, *place) for place in PLACES)
            for kind in ("tar", "index.json")
        ]
    )
    train = next(iter(EvalLoader(data, split="train", batch_size=64)))
    np.testing.assert_array_equal(train.images[:, 0], arrays["train-images-idx3-ubyte"][:50])
    np.testing.assert_array_equal(train.labels, arrays["train-labels-idx1-ubyte"][:50])


def test_a_second_run_writes_nothing_unless_something_is_missing(
    storage: Storage, tmp_path: Path
) -> None:
    write_idx(tmp_path / "idx")
    config = config_for(storage, Source.idx, tmp_path / "idx")
    first, written = shard.run(config), objects(storage)
    assert shard.run(config) == first | {"reused": True}
    second, third, test = (name_of(storage, *place) for place in (PLACES[1], PLACES[2], PLACES[4]))
    for key, content in (
        (f"{second}.tar", None),
        (f"{third}.tar", b"cut"),
        (f"{test}.index.json", None),
    ):
        storage.delete([key]) if content is None else storage.write(key, content)
        assert shard.run(config) == first  # not reused
        assert objects(storage) == written  # byte for byte


def test_other_options_or_images_are_refused_with_what_to_do(
    storage: Storage, tmp_path: Path
) -> None:
    write_idx(tmp_path / "idx")
    shard.run(config_for(storage, Source.idx, tmp_path / "idx"))
    written = objects(storage)
    write_idx(tmp_path / "other", seed=1)
    for path, options, differing in (
        ("idx", {"block_size": 9}, "block_size"),
        ("idx", {"samples_per_shard": 10}, "samples_per_shard"),
        ("idx", {"valid_fraction": 0.5}, "images.train, images.valid, sha256"),
        ("other", {}, "sha256"),
    ):
        message = (
            rf"{storage.url} was made from other images or options \({differing}\); choose another"
            r" dataset\.name, or delete"
        )
        with pytest.raises(UserError, match=message):
            shard.run(config_for(storage, Source.idx, tmp_path / path, **options))
    assert objects(storage) == written


def test_a_folder_of_images_becomes_a_data_set(storage: Storage, tmp_path: Path) -> None:
    write_images(
        tmp_path / "images",
        [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(40)],
    )
    result = shard.run(
        config_for(storage, Source.folder, tmp_path / "images", channels=3, image_size=4)
    )
    assert result["image_shape"] == [3, 4, 4]
    assert result["num_classes"] == 2
    assert sum(split["images"] for split in result["splits"].values()) == 80
    batches = [
        b
        for split in result["splits"]
        for b in EvalLoader(DataSet.load(storage), split=split, batch_size=100)
    ]
    colours = sorted(tuple(image[:, 0, 0].tolist()) for batch in batches for image in batch.images)
    assert colours == sorted((number, 255 - number, 7) for number in range(80))


@pytest.mark.parametrize("encoding", [Encoding.npy, Encoding.png])
def test_images_keep_their_names_also_where_some_cannot_be_read(
    storage: Storage, tmp_path: Path, encoding: Encoding
) -> None:
    odd = os.fsdecode(b"dog/b\xe9b\xe9.png")  # no UTF-8
    write_images(
        tmp_path / "images",
        [*(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(40)), odd],
    )
    (tmp_path / "images" / "cat/3.png").write_bytes(b"no image")
    shard.run(
        config_for(
            storage,
            Source.folder,
            tmp_path / "images",
            max_unreadable=1,
            channels=3,
            encoding=encoding,
        )
    )
    data = DataSet.load(storage)
    named = {}
    for split in data.manifest.splits:
        loader = EvalLoader(data, split=split, batch_size=9)
        for batch in loader:
            named |= dict(
                zip(loader.keys(batch) or [], batch.images[:, 0, 0, 0].tolist(), strict=True)
            )
    expected = {
        f"{kind}/{number}.png": at + number
        for kind, at in (("cat", 0), ("dog", 40))
        for number in range(40)
    } | {odd: 80}
    assert named == {name: colour for name, colour in expected.items() if name != "cat/3.png"}


def test_a_damaged_image_is_named_and_leaves_no_data_set(storage: Storage, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{number}.png" for number in range(80)])
    (tmp_path / "images" / "33.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read .*/33\.png .*; mend or remove it$"):
        shard.run(config_for(storage, Source.folder, tmp_path / "images", image_size=4))
    assert "manifest.json" not in storage.list()
    (tmp_path / "images" / "33.png").unlink()
    assert not shard.run(config_for(storage, Source.folder, tmp_path / "images", image_size=4))[
        "reused"
    ]


def test_images_that_cannot_be_read_may_be_left_out_up_to_a_bound_and_are_listed(
    storage: Storage, tmp_path: Path
) -> None:
    write_images(
        tmp_path / "images",
        [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(40)],
    )
    for name in ("cat/3.png", "dog/33.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    shutil.copy(tmp_path / "images/cat/7.png", tmp_path / "images/dog/copy.png")
    options = {"channels": 3, "image_size": 4}
    with pytest.raises(
        UserError,
        match=(
            r"2 images cannot be read, more than shard\.max_unreadable=1: .*report\.json lists them"
        ),
    ):
        shard.run(
            config_for(
                storage,
                Source.folder,
                tmp_path / "images",
                max_unreadable=1,
                samples_per_shard=100,
                **options,
            )
        )
    assert not storage.exists("manifest.json")
    result = shard.run(
        config_for(storage, Source.folder, tmp_path / "images", max_unreadable=2, **options)
    )
    account = result["report"]
    assert (account["found"], account["used"]) == (81, 79)
    assert account["passed_over"]["unreadable"]["count"] == 2
    assert account["duplicates"] == 1
    assert sum(split["images"] for split in result["splits"].values()) == 79
    report = storage.read_json("report.json")
    assert sorted(
        item["image"].removeprefix(f"{tmp_path}/images/") for item in report["unreadable"]
    ) == [
        "cat/3.png",
        "dog/33.png",
    ]
    (pair,) = report["examples_of_duplicates"]
    assert sorted(key.removeprefix(f"{tmp_path}/images/") for key in pair) == [
        "cat/7.png",
        "dog/copy.png",
    ]
    data = DataSet.load(storage)
    for split in data.manifest.splits:
        for batch in EvalLoader(data, split=split, batch_size=9):
            assert (batch.images[:, 1] == 255 - batch.images[:, 0]).all()


@pytest.mark.parametrize("encoding", [Encoding.png, Encoding.webp])
def test_large_images_are_kept_one_by_one_without_loss(
    storage: Storage, tmp_path: Path, encoding: Encoding
) -> None:
    arrays = write_idx(tmp_path / "idx")
    shard.run(config_for(storage, Source.idx, tmp_path / "idx", encoding=encoding))
    data = DataSet.load(storage)
    assert (data.manifest.encoding, data.manifest.block_size) == ("image", 1)
    train = next(iter(EvalLoader(data, split="train", batch_size=64)))
    np.testing.assert_array_equal(train.images[:, 0], arrays["train-images-idx3-ubyte"][:50])
    np.testing.assert_array_equal(train.labels, arrays["train-labels-idx1-ubyte"][:50])
    storage.download(f"{name_of(storage, 'train', 0)}.tar", tmp_path / "stock.tar")
    stock = (
        webdataset.WebDataset(str(tmp_path / "stock.tar"), shardshuffle=False)
        .decode("l8")
        .to_tuple(encoding.value, "cls")
    )
    for (image, label), mine, number in zip(stock, train.images, train.labels, strict=False):
        np.testing.assert_array_equal(image, mine[0])
        assert label == number


def test_a_killed_run_goes_on_after_the_shards_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    write_idx(tmp_path / "idx")
    config = config_for(storage, Source.idx, tmp_path / "idx", samples_per_shard=7)
    shard.run(config)
    whole, fourth = objects(storage), name_of(storage, "train", 3)
    valid = name_of(storage, "valid", 0)
    storage.delete(storage.list())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # When all shards are written, and the manifest is not.
        patch.setattr(Manifest, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            shard.run(config)
    storage.delete([f"{fourth}.tar"])
    storage.write(f"{valid}.tar", b"cut")
    marks = {
        key: os.stat(tmp_path / "storage" / key).st_mtime_ns
        for key in storage.list("train")
        if key.endswith(".tar")
    }
    shard.run(config)
    assert objects(storage) == whole
    again = {
        key
        for key, mark in marks.items()
        if os.stat(tmp_path / "storage" / key).st_mtime_ns != mark
    }
    assert again == set()


def test_a_killed_run_leaves_no_data_set_and_the_next_one_none_of_its_shards(
    tmp_path: Path,
) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    write_idx(tmp_path / "idx", num_train=3000)
    code = (
        "import sys; from pipeline.commands.images.shard import ShardConfig, run;"
        " from pipeline.config.sections import *; url, path, address = sys.argv[1:];"
        " dataset = DatasetOptions(name='small', source=Source.idx, path=path, url=url);"
        " options = ShardOptions(samples_per_shard=1, block_size=1);"
        " storage, cluster = StorageOptions(root=url), ClusterOptions(address=address);"
        " run(ShardConfig(storage, dataset, options, cluster))"
    )
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    with subprocess.Popen(
        [sys.executable, "-c", code, storage.url, str(tmp_path / "idx"), address], env=environment
    ) as process:
        deadline = time.monotonic() + 180
        while not storage.list("train") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert storage.list("train")
    assert not storage.exists("manifest.json")
    with pytest.raises(UserError, match="there is no data set"):
        DataSet.load(storage)
    before: list[str] = []
    while before != (
        before := storage.list("train")
    ):  # Ray ends the tasks of a killed driver in a moment
        time.sleep(1)
    result = shard.run(
        config_for(storage, Source.idx, tmp_path / "idx", samples_per_shard=1000, block_size=100)
    )
    assert not result["reused"]
    assert result["splits"]["train"] == {"images": 2500, "shards": 3}
    assert len(storage.list("train")) == 6
