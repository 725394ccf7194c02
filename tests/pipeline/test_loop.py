"""The training loop, without Ray: what a killed run, or one on more ranks, must have in common with a whole one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import config, loop
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.metrics import read_rows
from pipeline.shard import write_shard
from pipeline.sources import Images, ImageSource, Labels
from pipeline.storage import open_storage

SIZE = 6


class Bars(ImageSource):
    """Grey images of 6 x 6 pixels: a bright column or row, at one of six places, on a dim ground."""

    description: Any = {"source": "bars"}  # noqa: RUF012
    image_shape = (1, SIZE, SIZE)
    num_classes = 2
    splits: Any = {"train": 300, "valid": 50, "test": 50}  # noqa: RUF012

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images = np.full((stop - start, SIZE, SIZE, 1), 25, dtype=np.uint8)
        for row, number in enumerate(range(start, stop)):
            place = number // 2 % SIZE
            images[row, place] = 230 if number % 2 else 25
            if number % 2 == 0:
                images[row, :, place] = 230
        return images, np.arange(start, stop) % 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with the data set ``bars``."""
    folder = str(tmp_path_factory.mktemp("root"))
    storage = open_storage(f"{folder}/datasets/bars")
    shards = {
        split: tuple(
            write_shard(storage, Bars(), split, f"{split}/{number:05d}.tar", start, min(start + 70, count), 16)
            for number, start in enumerate(range(0, count, 70))
        )
        for split, count in Bars.splits.items()
    }
    Manifest("bars", (1, SIZE, SIZE), 2, 16, shards).publish(storage)
    return folder


def settings(root: str, name: str, **values: object) -> config.TrainConfig:
    options = {
        "storage.root": root, "dataset.name": "bars", "name": name, "model": "tiny", "train": "short",
        "train.images": 1600, "train.valid_every": 400, "train.valid_images": 50,
        "train.report_seconds": 0, "train.checkpoint_seconds": 0,
    }  # fmt: skip
    options |= {key.replace("__", "."): value for key, value in values.items()}
    return config.load("train", [f"{key}={value}" for key, value in options.items()])  # type: ignore[no-any-return]


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_run_interrupted_twice_ends_bit_for_bit_as_one_that_was_not(root: str) -> None:
    whole = loop.fit(settings(root, "whole"))
    for images in (400, 1200):

        def stop(metrics: dict[str, Any], images: int = images) -> None:
            if metrics["images"] == images:
                raise Killed

        with pytest.raises(Killed):
            loop.fit(settings(root, "interrupted"), on_validation=stop)
    resumed = loop.fit(settings(root, "interrupted"))
    assert resumed == whole
    runs = [open_storage(f"{root}/runs/{name}") for name in ("whole", "interrupted")]
    assert runs[0].read("model/model.safetensors") == runs[1].read("model/model.safetensors")
    steps = [row["step"] for row in read_rows(runs[1]) if "train/rate" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100


def test_it_learns(root: str) -> None:
    rows = []
    loop.fit(settings(root, "learns", train__images=8000, train__valid_every=2000), on_validation=rows.append)
    assert rows[-1]["elbo_nats"] < rows[0]["elbo_nats"] < SIZE * SIZE * np.log(2)
    assert rows[-1]["elbo_nats"] == pytest.approx(rows[-1]["rate_nats"] + rows[-1]["distortion_nats"])
    assert rows[-1]["num_images"] == 50


def train_rank(rank: int, world_size: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    rows: list[dict[str, Any]] = []
    # Reports at every step, so that the log holds every step's loss.
    loop.fit(settings(root, f"ranks-{world_size}"), rank=rank, world_size=world_size, on_validation=rows.append)
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def test_any_number_of_ranks_has_the_same_loss_at_every_step(root: str, tmp_path: Path) -> None:
    one = settings(root, "ranks-1")
    loop.fit(one)
    mp.spawn(train_rank, (2, root, str(tmp_path)), nprocs=2)
    losses = [
        {
            row["step"]: row["train/code_length"]
            for row in read_rows(open_storage(f"{root}/runs/ranks-{ranks}"))
            if "train/rate" in row
        }
        for ranks in (1, 2)
    ]
    common = losses[0].keys() & losses[1].keys()
    assert len(common) > 20
    early = sorted(common)[:5]
    assert [losses[0][step] for step in early] == pytest.approx([losses[1][step] for step in early], rel=1e-5)
    assert [losses[0][step] for step in common] == pytest.approx([losses[1][step] for step in common], rel=1e-3)
    reports = [json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1], "every rank reports what all ranks measured"
    assert reports[0][-1]["num_images"] == 50


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(root: str) -> None:
    with pytest.raises(UserError, match=r"run diverges: .* lower optim\.learning_rate"):
        loop.fit(settings(root, "diverges", optim__learning_rate=1e30, optim__warmup_steps=0, optim__clip_norm=1e30))


def test_it_needs_no_ray(root: str) -> None:
    script = """
import sys
sys.modules["ray"] = None  # importing it fails
from pipeline import config, loop
loop.fit(config.load("train", sys.argv[1:]))
"""
    arguments = [
        f"storage.root={root}",
        "dataset.name=bars",
        "model=tiny",
        "train=short",
        "train.images=64",
        "train.valid_images=8",
    ]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
