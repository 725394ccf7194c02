"""How fast the loader gives batches from the real S3 server, beside its peers and the ceilings.

    .venv/bin/python benchmarks/loader.py [--peers PYTHON] [--rounds N]

Two data sets: 60,000 grey images of 28 x 28 (MNIST), and 3,038 colour images of 64 x 64 (pieces of scikit-learn's two
photographs). For each, from the same server, with the same batches of 128, shuffled, in one process without workers, for
a first epoch and for later ones (which may use what the first left on disk):

* ours: blocks of raw pixels, with the local cache; ours_uncached: without it, so that each epoch gets every byte from the server;
* webdataset: a PNG for each image, decoded, shuffled and batched in the documented form;
* streaming (MosaicML) and litdata: arrays in their own formats, in the documented form;
* hand_loop: our own tars of blocks, read by webdataset, shuffled four blocks at a time and batched by a loop of 20 lines:
  the least that a user can write by hand, without checksums, an exact order or a position;
* raw_get: GETs of our shards by boto3, and nothing else; memory: numpy indexing of all images in memory.

PYTHON has the peers installed: ``python -m venv peers; peers/bin/pip install webdataset mosaicml-streaming litdata obstore``; without
it, only those that our own environment has are run. The loaders take turns, N times. Speed is in images per second of
processor time (on one core, so to speak; the kernel's part included, the server's not), since wall time on a shared machine is mostly
that of others. A first epoch is a process that runs one; a later one is what a process that runs four takes more, by three, so that
reading ahead is counted where it belongs, and what a process needs once does not pass for what an epoch needs.

The last line is JSON, with medians of each round's ratios, for a first and a later epoch: ratio_to_best_peer (of webdataset, streaming
and litdata), ratio_to_hand_loop, and ratio_to_ceiling: ours_uncached to raw_get.
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
from pipeline.storage.server import ObjectStore

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
    """Images, seconds of processor time and of wall time of the first epoch, and of a later one."""
    one, all_of_them = (
        child(python, "read", loader, folder / loader, prefix, epochs) for epochs in (1, EPOCHS)
    )
    return [one, {name: (all_of_them[name] - one[name]) / (EPOCHS - 1) for name in one}]


Speeds = dict[str, list[list[float]]]  # by loader, for each round: of the first and a later epoch


def ratios(speed: Speeds, ours: str, others: tuple[str, ...]) -> list[float]:
    """The speed of ours over that of the fastest of others: the median over the rounds, for each epoch."""
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
    with tempfile.TemporaryDirectory() as name, ObjectStore(f"{name}/store", "benchmark") as store:
        os.environ.update(
            store.environment()
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
                        f"{data:<9}{loader:<14} images/s by epoch, of processor time and of wall time:",
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
