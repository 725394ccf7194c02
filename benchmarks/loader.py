"""How fast the loader reads batches from the object storage server, beside peers and ceilings.

    .venv/bin/python benchmarks/loader.py [--peers PYTHON] [--rounds N]

There are two data sets: 60,000 grey images of 28 x 28 (MNIST), and 3,038 colour images of 64 x 64
(crops of scikit-learn's two photographs). Every loader reads them from the same server in shuffled
batches of 128, in one process without workers. A first epoch and later ones are measured; the later
ones may use what the first left on disk. The loaders are:

* ours: blocks of raw pixels, with the local cache;
* ours_uncached: the same without the cache, so that every epoch reads every byte from the server;
* webdataset: a PNG for each image, decoded, shuffled and batched as documented;
* streaming (MosaicML) and litdata: arrays in their own formats, used as documented;
* hand_loop: our tars of blocks, read by webdataset, shuffled four blocks at a time and batched by
  a loop of 20 lines: the least that a user can write by hand, without checksums, an exact order or
  a position;
* raw_get: GETs of our shards by boto3, and nothing else;
* memory: numpy indexing of all images in memory.

PYTHON is an interpreter with the peers installed:
``python -m venv peers; peers/bin/pip install webdataset mosaicml-streaming litdata obstore``.
Without it, only the peers in our own environment run. The loaders alternate, for N rounds.

Speed is in images per second of processor time, including the kernel's part but not the server's,
because wall time on a shared machine depends mostly on other work. A first epoch is measured in a
process that runs one epoch. A later epoch is a third of the additional time of a process that runs
four. So reading ahead is charged to the right epoch, and start-up costs are not charged to later
ones.

The last line is JSON, with the median over rounds of each ratio, for a first and a later epoch:
ratio_to_best_peer (of webdataset, streaming and litdata), ratio_to_hand_loop, and ratio_to_ceiling
(ours_uncached to raw_get).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from pipeline.data.sources.mnist import MnistSource
from pipeline.storage.server import ObjectStorageServer

PEERS = ("webdataset", "streaming", "litdata")
EPOCHS = 4
LOADERS = ("ours", "ours_uncached", *PEERS, "hand_loop", "raw_get", "memory")


def data_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images ``(n, channels, height, width)`` and labels."""
    mnist = MnistSource()
    parts = [mnist.read(split, 0, mnist.splits[split]) for split in ("train", "valid")]
    grey, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    pieces = [
        photograph[top : top + 64, left : left + 64]
        for photograph in load_sample_images().images
        for top in range(0, 427 - 63, 12)
        for left in range(0, 640 - 63, 12)
    ]
    colour = np.stack(pieces).transpose(0, 3, 1, 2)
    return {
        "grey28": (grey.transpose(0, 3, 1, 2), labels),
        "colour64": (colour, np.arange(len(colour)) % 10),
    }


def child(
    python: str, action: str, loader: str, folder: Path, prefix: str, epochs: int = 0
) -> dict[str, float]:
    folder.mkdir()
    command = [
        python,
        str(Path(__file__).with_name("peers.py")),
        action,
        loader,
        str(folder),
        prefix,
        str(epochs),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        sys.exit(f"{loader} failed:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    shutil.rmtree(folder)
    return json.loads(lines[-1].removeprefix("found: ")) if lines else {}


def first_and_later(python: str, loader: str, folder: Path, prefix: str) -> list[dict[str, float]]:
    """Images, processor seconds and wall seconds of the first epoch, and of a later one."""
    one, all_of_them = (
        child(python, "read", loader, folder / loader, prefix, epochs) for epochs in (1, EPOCHS)
    )
    return [one, {name: (all_of_them[name] - one[name]) / (EPOCHS - 1) for name in one}]


Speeds = dict[str, list[list[float]]]
"""Speeds of the first and a later epoch, by loader and round."""


def ratios(speed: Speeds, ours: str, others: tuple[str, ...]) -> list[float]:
    """Our speed relative to the fastest of others: the median over rounds, for each epoch."""
    turns = list(
        zip(speed[ours], *(speed[other] for other in others if other in speed), strict=True)
    )
    return [
        round(
            statistics.median(own[n] / max(other[n] for other in rest) for own, *rest in turns), 2
        )
        for n in (0, 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaders = [
        name
        for name in LOADERS
        if options.peers != sys.executable or name not in ("streaming", "litdata")
    ]
    summary: dict[str, dict[str, object]] = {
        name: {} for name in ("ratio_to_best_peer", "ratio_to_hand_loop", "ratio_to_ceiling")
    }
    with (
        tempfile.TemporaryDirectory() as name,
        ObjectStorageServer(f"{name}/store", "benchmark") as server,
    ):
        os.environ.update(
            server.environment()
            | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        )
        for data, (images, labels) in data_sets().items():
            folder = Path(name, data)
            folder.mkdir()
            np.save(folder / "images.npy", images)
            np.save(folder / "labels.npy", labels)
            python = {
                loader: options.peers if loader in (*PEERS, "hand_loop") else sys.executable
                for loader in loaders
            }
            for loader in ("ours", *PEERS):
                if loader in loaders:
                    child(python[loader], "write", loader, folder / loader, f"{data}/{loader}")
            speed: Speeds = {loader: [] for loader in loaders}
            for _ in range(options.rounds):
                for loader in loaders:
                    epochs = first_and_later(python[loader], loader, folder, f"{data}/{loader}")
                    assert all(epoch["images"] > len(images) - 129 for epoch in epochs), (
                        loader,
                        epochs,
                    )
                    cpu, wall = (
                        [epoch["images"] / epoch[clock] for epoch in epochs]
                        for clock in ("cpu", "wall")
                    )
                    speed[loader].append(cpu)
                    texts = (f"{first:>11,.0f} {second:>11,.0f}" for first, second in (cpu, wall))
                    print(
                        f"{data:<9}{loader:<14} images/s of processor time, and of wall time:",
                        *texts,
                        flush=True,
                    )
            summary["ratio_to_best_peer"][data] = ratios(speed, "ours", PEERS)
            summary["ratio_to_hand_loop"][data] = ratios(speed, "ours", ("hand_loop",))
            summary["ratio_to_ceiling"][data] = ratios(speed, "ours_uncached", ("raw_get",))
            summary[data] = {
                loader: [
                    round(statistics.median(turn[epoch] for turn in turns)) for epoch in (0, 1)
                ]
                for loader, turns in speed.items()
            }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
