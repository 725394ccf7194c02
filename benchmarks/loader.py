"""How fast the loader gives batches from the real S3 server, beside its peers and the ceilings.

    .venv/bin/python benchmarks/loader.py [--peers PYTHON] [--rounds N]

Two data sets: 60,000 grey images of 28 x 28 (MNIST), and 3,038 colour images of 64 x 64 (pieces of scikit-learn's two
photographs). For each, from the same server, with the same batches of 128, shuffled, in one process without workers, for
two epochs (the second may use what the first left on disk):

* ours: blocks of raw pixels, with the local cache;
* webdataset: a PNG for each image, decoded, shuffled and batched in the documented form;
* webdataset_blocks: webdataset on our own tars of blocks, decoded and shuffled by hand, four blocks at a time;
* streaming (MosaicML) and litdata: arrays in their own formats;
* raw_get: in the first epoch, the GETs of our shards alone; in the second, numpy slices of all images in memory.

PYTHON has the peers installed (``pip install webdataset mosaicml-streaming litdata``); without it, only those that our own
environment has are run. The loaders take turns, N times. Speed is in images per second of processor time (on one core, so to
speak), since wall time on a shared machine is mostly that of others. The last line is JSON, with medians of each round's ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from pipeline.sources import MnistSource
from pipeline.store import ObjectStore

LOADERS = ("ours", "webdataset", "webdataset_blocks", "streaming", "litdata", "raw_get")
OWN_FORMATS = ("ours", "webdataset", "streaming", "litdata")
PEERS = ("webdataset", "webdataset_blocks", "streaming", "litdata")


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
    return {"grey28": (grey.transpose(0, 3, 1, 2), labels), "colour64": (colour, np.arange(len(colour)) % 10)}


def child(python: str, action: str, loader: str, folder: Path, prefix: str) -> list[dict[str, float]]:
    folder.mkdir()
    command = [python, str(Path(__file__).with_name("peers.py")), action, loader, str(folder), prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        sys.exit(f"{loader} failed:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    return json.loads(lines[-1].removeprefix("found: ")) if lines else []


def ratios(speed: dict[str, list[list[float]]], others: list[str]) -> list[float]:
    """Our speed over that of the fastest of others: the median over the rounds, for each epoch."""
    found = []
    for epoch in (0, 1):
        turns = zip(speed["ours"], *(speed[other] for other in others), strict=True)
        found.append(round(statistics.median(ours[epoch] / max(other[epoch] for other in rest) for ours, *rest in turns), 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaders = [name for name in LOADERS if options.peers != sys.executable or name not in ("streaming", "litdata")]
    summary: dict[str, dict[str, object]] = {"ratio_to_best_peer": {}, "ratio_to_webdataset": {}, "ratio_to_ceiling": {}}
    with tempfile.TemporaryDirectory() as name, ObjectStore(f"{name}/store", "benchmark") as store:
        os.environ.update(store.environment() | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"})
        for data, (images, labels) in data_sets().items():
            folder = Path(name, data)
            folder.mkdir()
            np.save(folder / "images.npy", images)
            np.save(folder / "labels.npy", labels)
            python = {loader: options.peers if loader in PEERS else sys.executable for loader in loaders}
            for loader in OWN_FORMATS:
                if loader in loaders:
                    child(python[loader], "write", loader, folder / f"write-{loader}", f"{data}/{loader}")
            speed: dict[str, list[list[float]]] = {loader: [] for loader in loaders}
            for turn in range(options.rounds):
                for loader in loaders:
                    epochs = child(python[loader], "read", loader, folder / f"{turn}-{loader}", f"{data}/{loader}")
                    assert all(epoch["images"] > len(images) - 129 for epoch in epochs), (loader, epochs)
                    speed[loader].append([epoch["images"] / epoch["cpu"] for epoch in epochs])
                    walls = ", ".join(f"{epoch['images'] / epoch['wall']:,.0f}" for epoch in epochs)
                    cpus = ", ".join(f"{value:,.0f}" for value in speed[loader][-1])
                    print(
                        f"{data:<9}{loader:<18} images/s by epoch: {cpus:>20} of processor time, {walls:>20} of wall time",
                        flush=True,
                    )
            summary["ratio_to_best_peer"][data] = ratios(speed, [loader for loader in loaders if loader in PEERS])
            summary["ratio_to_webdataset"][data] = ratios(speed, ["webdataset"])
            summary["ratio_to_ceiling"][data] = ratios(speed, ["raw_get"])
            summary[data] = {
                loader: [round(statistics.median(turn[epoch] for turn in turns)) for epoch in (0, 1)]
                for loader, turns in speed.items()
            }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
