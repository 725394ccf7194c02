"""How fast the loader reads batches from the object storage server, beside peers and ceilings.

    .venv/bin/python benchmarks/loader.py [--peers PYTHON] [--rounds N] [--photographs N]
        [--data NAME ...]

There are three data sets: 60,000 grey images of 28 x 28 (MNIST), 3,038 colour images of 64 x 64
(crops of scikit-learn's two photographs), and 4,000 JPEG files of 256 x 256, read at 64 x 64, which
``photographs.py`` describes with their loaders. Every loader reads them from the same server in
shuffled batches of 128, in one process without workers. A first epoch and later ones are measured;
the later ones may use what the first left on disk. The loaders of the first two are:

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
``python -m venv peers; peers/bin/pip install webdataset mosaicml-streaming litdata obstore
simplejpeg torchvision spdl``. Without it, only the peers in our own environment run, and SPDL runs
only where FFmpeg's libraries are. The loaders alternate, for N rounds.

Speed is in images per second of processor time, including the kernel's part but not the server's,
because wall time on a shared machine depends mostly on other work. A first epoch is measured in a
process that runs one epoch. A later epoch is a third of the additional time of a process that runs
four. So reading ahead is charged to the right epoch, and start-up costs are not charged to later
ones.

The last line is JSON, with the median over rounds of each ratio, for a first and a later epoch:
ratio_to_best_peer (of all peers), ratio_to_hand_loop, ratio_to_ceiling (ours_uncached to raw_get),
and for JPEG files ratio_to_pil (webdataset with Pillow) and
two_cores_to_one: the wall speed of a first epoch, decoded from a local folder.
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
import photographs
from sklearn.datasets import load_sample_images

from pipeline.data.sources.mnist import MnistSource
from pipeline.storage.server import ObjectStorageServer

PEERS = ("webdataset", "streaming", "litdata")
EPOCHS = 4
LOADERS = ("ours", "ours_uncached", *PEERS, "hand_loop", "raw_get", "memory")
JPEG, PIL = "jpeg256", "webdataset_pil"
JPEG_PEERS = (PIL, "webdataset_simplejpeg", "spdl", "streaming", "litdata")
JPEG_LOADERS = ("ours", *JPEG_PEERS, "one_core", "two_cores")
WRITERS = ("ours", "webdataset", "streaming", "litdata")
OF_PEERS = (*PEERS, *JPEG_PEERS, "hand_loop")
"""They run in the peers' environment."""


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


def prepare(data: str, folder: Path, num_photographs: int) -> int:
    """Write what the loaders' formats are made from. Returns the number of images."""
    folder.mkdir()
    if data == JPEG:
        files = list(photographs.make(load_sample_images().images, num_photographs))
        photographs.save(files, folder)
        return len(files)
    images, labels = data_sets()[data]
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return len(images)


def measure(
    data: str,
    folder: Path,
    loaders: list[str],
    python: dict[str, str],
    rounds: int,
    num_images: int,
) -> tuple[Speeds, Speeds]:
    """Speeds by processor time, and by wall time."""
    for loader in WRITERS:
        if loader in loaders:
            child(python[loader], "write", loader, folder / loader, f"{data}/{loader}")
    speeds: tuple[Speeds, Speeds] = {}, {}
    for _ in range(rounds):
        for loader in loaders:
            epochs = first_and_later(python[loader], loader, folder, f"{data}/{loader}")
            assert all(epoch["images"] > num_images - 129 for epoch in epochs), (loader, epochs)
            for speed, clock in zip(speeds, ("cpu", "wall"), strict=True):
                found = [epoch["images"] / epoch[clock] for epoch in epochs]
                speed.setdefault(loader, []).append(found)
            texts = (
                f"{first:>11,.0f} {later:>11,.0f}"
                for first, later in (speed[loader][-1] for speed in speeds)
            )
            print(
                f"{data:<9}{loader:<22} images/s of processor time, and of wall time:",
                *texts,
                flush=True,
            )
    return speeds


def has_spdl(python: str) -> bool:
    """Whether SPDL can decode there."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(next(photographs.make(load_sample_images().images, 1)))
        file.flush()
        code = f"import spdl.io; spdl.io.load_image({file.name!r})"
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=int, default=4000)
    parser.add_argument("--data", nargs="+", default=["grey28", "colour64", JPEG])
    options = parser.parse_args()
    missing = {"streaming", "litdata"} if options.peers == sys.executable else set[str]()
    if not has_spdl(options.peers):
        missing.add("spdl")
        print("SPDL is left out: it, or FFmpeg's libraries, cannot be loaded", flush=True)
    names = ("ratio_to_best_peer", "ratio_to_hand_loop", "ratio_to_ceiling", "ratio_to_pil")
    summary: dict[str, dict[str, object]] = {name: {} for name in (*names, "two_cores_to_one")}
    with (
        tempfile.TemporaryDirectory() as name,
        ObjectStorageServer(f"{name}/store", "benchmark") as server,
    ):
        os.environ.update(
            server.environment()
            | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        )
        for data in options.data:
            peers = JPEG_PEERS if data == JPEG else PEERS
            loaders = [
                loader
                for loader in (JPEG_LOADERS if data == JPEG else LOADERS)
                if loader not in missing
            ]
            python = {
                loader: options.peers if loader in OF_PEERS else sys.executable
                for loader in loaders
            }
            folder = Path(name, data)
            count = prepare(data, folder, options.photographs)
            speed, wall = measure(data, folder, loaders, python, options.rounds, count)
            summary["ratio_to_best_peer"][data] = ratios(speed, "ours", peers)
            if data == JPEG:
                summary["ratio_to_pil"][data] = ratios(speed, "ours", (PIL,))
                two = ratios(wall, "two_cores", ("one_core",))
                summary["two_cores_to_one"][data] = two[0]
            else:
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
