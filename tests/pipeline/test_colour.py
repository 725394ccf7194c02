"""Colour images of 256 values go the whole way: shards, training, evaluation, pictures; with every
kind of window and code.
"""

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import vlae
from pipeline import commands
from pipeline.commands.models import evaluate
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import Images, ImageSource, Labels
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline.images import write_shard

SIZE = 14
SPLITS = {"train": 160, "valid": 24, "test": 24}


class Skies(ImageSource):
    """Pictures of 14 x 14: a ground and a sky of two colours, with a little noise; the label is
    which of two skies.
    """

    description: ClassVar[dict[str, Any]] = {"source": "skies"}
    image_shape = (3, SIZE, SIZE)
    num_classes = 2
    splits: ClassVar[dict[str, int]] = SPLITS

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        images = np.empty((stop - start, SIZE, SIZE, 3), np.uint8)
        labels = np.empty(stop - start, np.int64)
        for index, number in enumerate(range(start, stop)):
            random = np.random.default_rng([list(SPLITS).index(split), number])
            labels[index] = random.integers(2)
            picture = np.where(
                np.arange(SIZE)[:, None, None] < random.integers(4, 10),
                [40, 90, 200 - 90 * labels[index]],
                [60, 140, 50],
            )
            images[index] = np.clip(picture + random.integers(-4, 5, (SIZE, SIZE, 3)), 0, 255)
        return images, labels


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with the data set ``skies``."""
    folder = str(tmp_path_factory.mktemp("root"))
    storage = open_storage(f"{folder}/datasets/skies")
    shards = {
        split: (write_shard(storage, Skies(), split, f"{split}/00000.tar", 0, count, 16),)
        for split, count in SPLITS.items()
    }
    Manifest("skies", Skies.image_shape, Skies.num_classes, 16, shards).publish(storage)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.window=3x1"],
        ["model.window=4x2-grey", "model.code=maps", "model.latents=2"],
        ["model.window=2x1-down2", "model.posterior_depth=1", "model.flow_depth=0"],
        [
            "model.window=3x2",
            "model.context_layers=2",
            "model.activation=elu",
            "model.flow_mean_only=true",
        ],
    ],
    ids=lambda overrides: overrides[0].removeprefix("model."),
)
def test_a_model_of_colour_images_is_trained_evaluated_and_drawn(
    root: str, tmp_path: Path, overrides: list[str]
) -> None:
    options = [
        "model=tiny",
        "model.mixtures=2",
        "train=short",
        "train.global_batch=8",
        "train.num_streams=4",
        "optim.warmup_steps=5",
    ]
    options += [
        "train.images=640",
        "train.valid_images=24",
        "train.valid_every=640",
        "optim.ema_decay=0.9",
        "train.free_nats=2",
    ]
    options += [
        "dataset.name=skies",
        "dataset.binarization=none",
        f"storage.root={root}",
        *overrides,
    ]
    typed = commands.load("train", options)
    loop.fit(typed)
    folder = Run.of(typed).storage
    output = tmp_path / "evaluation"
    settings = ["bounds.samples=4", "bounds.pictures=6"]
    result = evaluate.run(
        commands.load("evaluate", [f"model={folder.url}", f"output={output}", *settings])
    )
    test = result["test"]
    assert test["num_images"] == SPLITS["test"]
    # Ignorant of everything, an image costs 8 bits per dim, and its noise alone costs log2(9) =
    # 3.2.
    assert 3.1 < test["iwae_bits_per_dim"] <= test["elbo_bits_per_dim"] < 7.5
    for name in ("samples.png", "reconstructions.png"):
        picture = np.asarray(Image.open(io.BytesIO((output / name).read_bytes())))
        colourful = picture.max(-1).astype(int) - picture.min(-1)
        assert (colourful > 20).mean() > 0.05, "the picture is grey"
    model = vlae.load(Path(folder.url) / "model")
    assert str(model.decoder.window) == typed.model.window
