"""What it costs one of thousands of ranks to start anywhere in a huge data set: time and memory.

    .venv/bin/python benchmarks/order.py

Simulates 10^6 shards, 10^10 images of 64 x 64 RGB and 4096 ranks. The manifest and its pages are in
a folder. For each of several positions, a separate process does everything from reading the
manifest to knowing which bytes of which shards come next. The last line is JSON: the median and the
worst time in seconds, and the peak memory of a process, everything included.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data import manifest
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.records import PagedShards, Shard
from pipeline.storage import open_storage

SHARDS, RANKS, SAMPLES = 10**6, 4096, 10**10
IMAGE_SHAPE = (3, 64, 64)
BATCH = 4 * RANKS
GROUP = 128 << 20
"""Bytes that a rank shuffles together."""


def shards() -> Iterator[Shard]:
    """Simulated shards of different sizes."""
    random = np.random.default_rng(0)
    sizes = random.integers(5_000, 15_001, SHARDS)
    missing = SAMPLES - int(sizes.sum())
    sizes += missing // SHARDS
    sizes[: missing % SHARDS] += 1
    for number, size in enumerate(sizes.tolist()):
        digests = random.bytes(64).hex()
        name = f"train/{number:07d}"
        yield Shard(
            f"{name}.tar", size * 12_500, digests[:64], size, f"{name}.index.json", digests[64:]
        )


def peak_kib() -> int:
    """This process's peak memory. (getrusage would include its parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def start(folder: str, step: int, rank: int) -> None:
    """Start one rank as the loader does; prints seconds and megabytes."""
    before = peak_kib()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    contents = manifest.load(open_storage(folder))
    order = Order(
        contents.shard_samples("train"), 0, BATCH, RANKS, GROUP // int(np.prod(IMAGE_SHAPE))
    )
    epoch, within = divmod(step, order.steps_per_epoch)
    circle = order.circle(epoch)
    group = order.group(epoch, circle, rank, within * order.stream_batch // order.group_length)
    opened = [contents.shards("train")[number] for number in group.segments[:, 0].tolist()]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    assert len(opened) >= 1
    assert 0 < len(group.permutation) <= order.group_length
    after = peak_kib()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "mb": after / 1024,
                "mb_added": (after - before) / 1024,
                "samples": order.num_samples,
            }
        )
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        paged = PagedShards.write(storage, "train", shards())
        Manifest("planet", IMAGE_SHAPE, 1000, 250, {"train": paged}).publish(storage)
        steps_per_epoch = SAMPLES // BATCH
        found = []
        for step, rank in (
            (0, 0),
            (123_456, 77),
            (steps_per_epoch - 100, RANKS - 1),
            (7 * steps_per_epoch // 2, 2048),
            (10**8, 5),
        ):
            command = [sys.executable, __file__, folder, str(step), str(rank)]
            found.append(
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            )
            print(
                f"step {step:>12,} rank {rank:>4}: {found[-1]['seconds']:.2f} s, "
                f"{found[-1]['mb']:.0f} MB"
            )
        assert {each["samples"] for each in found} == {SAMPLES}
        pages = sum(path.stat().st_size for path in Path(folder, "pages").iterdir())
    seconds = [each["seconds"] for each in found]
    print(
        json.dumps(
            {
                "seconds_median": round(statistics.median(seconds), 2),
                "seconds_worst": round(max(seconds), 2),
                "cpu_seconds_worst": round(max(each["cpu_seconds"] for each in found), 2),
                "mb_of_process": round(max(each["mb"] for each in found)),
                "mb_added_by_start": round(max(each["mb_added"] for each in found)),
                "mb_of_pages_in_storage": round(pages / 1e6),
            }
        )
    )


if __name__ == "__main__":
    start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 1 else main()
