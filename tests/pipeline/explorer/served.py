"""Small models and data sets for the explorer, and the command that serves its page."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pipeline import commands
from pipeline.config import options
from pipeline.config.sections import Encoding
from pipeline.data import DataSet, writer
from pipeline.data.manifest import Manifest
from pipeline.runs import OpenedModel, Run
from pipeline.storage import open_storage
from tests.pipeline import strokes

COLOUR = (3, 12, 10)
COLOURS = 70
"""Images in the test split of the colour images, in two shards."""
FIRST = 64
"""Of these in the first shard: as many as a session encodes at once."""
TWO = {"near": ["model.window=3x1"], "far": ["model.window=0x0", "model.flow_depth=2"]}
"""Two models, by the options that set them apart."""


def models(root: Path, data: DataSet, variants: dict[str, list[str]] = TWO) -> list[OpenedModel]:
    """Models of a data set, with random weights, as finished runs below ``root``."""
    place = [f"dataset.name={data.manifest.name}", f"dataset.url={data.storage.url}"]
    opened = []
    for name, overrides in variants.items():
        words = [f"storage.root={root}", *place, "model=tiny", f"name={name}"]
        config = commands.load("train", [*words, *overrides])
        torch.manual_seed(len(opened))
        model = config.build(data.manifest.image_shape)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
                parameter.normal_(std=1.2 / fan_in**0.5)
        run = Run.of(config)
        run.publish(model, {"config": options.to_dict(config)})
        opened.append(run.open())
    return opened


def write_strokes(root: Path) -> DataSet:
    """Black and white images without names."""
    return strokes.write(open_storage(f"{root}/datasets/strokes"))


def write_tiles(root: Path, shape: tuple[int, int, int] = COLOUR) -> DataSet:
    """Colour images that are not square, with names and classes with names."""
    storage = open_storage(f"{root}/datasets/tiles")
    random = np.random.default_rng(0)
    height, width = shape[1:]
    images = random.integers(0, 256, (COLOURS, height, width, 3)).astype(np.uint8)
    labels = np.arange(COLOURS) % 2
    shards = []
    for start, stop in ((0, FIRST), (FIRST, COLOURS)):
        shards.append(
            writer.write_images(
                storage,
                f"test/{start}.tar",
                start,
                images[start:stop],
                labels[start:stop],
                8,
                Encoding.npy,
                [f"{'ABC'[n % 3]}/tile-{n:02d}.png" for n in range(start, stop)],
            )
        )
    manifest = Manifest(
        "tiles", shape, 2, 8, {"train": shards, "test": shards}, class_names=["even", "odd"]
    )
    manifest.publish(storage)
    return DataSet(storage, manifest)


@contextmanager
def serving(*words: str) -> Iterator[tuple[str, str, "subprocess.Popen[str]"]]:
    """``vlae explore`` on a free port: its address without the secret, the secret, the process.

    At the end Ctrl-C stops it, and it must end well.
    """
    command = [sys.executable, "-m", "pipeline", "explore", "port=0", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("explore at http://127.0.0.1:"), process.stderr.read()
            address, _, secret = line.split()[-1].partition("/#")
            yield address, secret, process
            process.send_signal(signal.SIGINT)
            code, complaints = process.wait(60), process.stderr.read()
            assert (code, complaints) == (0, ""), f"exit code {code}: {complaints}"
        finally:
            if process.poll() is None:
                process.kill()
