"""A host loses its network in the middle of a run, and gets it back.

    python -m tests.faults.hosts        (part of make faults)

The two hosts are network namespaces, launched as a user would: `ray up infra/local.yaml`, then
`ray job submit` for the shards and for each run. A run that waits for the host must end with the
weights of an undisturbed run, bit for bit. A run that continues on the other host alone must come
as close as another order of summation allows.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch.multiprocessing.spawn import spawn

from pipeline import commands
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer
from pipeline.training import loop
from tests.faults import namespaces, suite

ROOT, WEIGHTS = "s3://tests/hosts", "model/model.safetensors"
OPTIONS = [
    f"storage.root={ROOT}",
    "dataset=synthetic",
    "model=tiny",
    "train=short",
    "train.precision=float64",
    "train.valid_every=1_000_000",
    "train.valid_images=200",
    "train.report_seconds=0.5",
    "train.checkpoint_seconds=1",
]
STALL_SECONDS = 600.0
"""A run without a new checkpoint for this long has failed."""


@dataclass(frozen=True)
class Stage:
    """What the faults act on."""

    network: namespaces.Network
    laptop: namespaces.Laptop
    server: ObjectStorageServer

    def start(self, name: str, *options: str) -> None:
        """Submit a run."""
        self.laptop.submit(
            name,
            self.server,
            "python",
            "-m",
            "pipeline",
            "train",
            f"name={name}",
            *OPTIONS,
            *options,
            wait=False,
        )

    def wait_for_step(self, name: str, step: int) -> int:
        """Wait for a checkpoint of this step or a later one; returns its step."""
        return self.wait(name, lambda: (newest := newest_step(name)) >= step and newest)

    def wait_for_end(self, name: str) -> None:
        self.wait(name, lambda: run_of(name).exists("result.json"))

    def wait(self, name: str, condition: Callable[[], int]) -> int:
        """Wait for a condition while the run makes progress; returns its value."""
        furthest, since = -1, time.monotonic()
        while not (value := condition()):
            if (newest := newest_step(name)) > furthest:
                furthest, since = newest, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS or "failed" in self.laptop.ray(
                "job", "status", name
            ):
                raise AssertionError(
                    f"run {name} makes no progress:\n{self.laptop.ray('job', 'logs', name)[-3000:]}"
                )
            time.sleep(2)
        return value

    def sizes(self, since: float) -> list[int]:
        """The sizes of Ray Train's worker groups since then, in order, from the head's log."""
        head = self.network.hosts[0]
        lines = [
            (json.loads(line)["asctime"], int(found[1]))
            for path in head.ray.glob("session_2*/logs/train/ray-train-app-controller-*.log")
            if path.stat().st_mtime >= since
            for line in path.read_text().splitlines()
            if (found := re.search(r"Started training worker group of size (\d+)", line))
        ]
        return [size for _, size in sorted(lines)]


def run_of(name: str) -> Storage:
    return open_storage(f"{ROOT}/runs/{name}")


def newest_step(name: str) -> int:
    """The step of a run's newest checkpoint; -1 if it has none."""
    return max(
        (int(key.partition("/")[2].partition("-")[0]) for key in run_of(name).list("checkpoints/")),
        default=-1,
    )


def undisturbed(num_ranks: int, name: str, options: list[str]) -> Storage:
    """An undisturbed run, on ``num_ranks`` processes without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(
            on_one_rank, (num_ranks, folder, [f"name={name}", *OPTIONS, *options]), nprocs=num_ranks
        )
    return run_of(name)


def on_one_rank(rank: int, num_ranks: int, folder: str, options: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    loop.fit(commands.load("train", options), rank=rank, world_size=num_ranks)
    dist.destroy_process_group()


def host_cut_off_and_back(stage: Stage) -> str:
    """Two workers are needed: the run waits for the host, then resumes from a checkpoint."""
    since, options = time.time(), ["train.images=32_000", "cluster.num_workers=2"]
    stage.start("waits", *options)
    stage.wait_for_step("waits", 300)
    cut = stage.network.hosts[1]
    cut.unplug()
    time.sleep(45)
    at = newest_step("waits")
    cut.plug_in()
    back = time.monotonic()
    stage.wait_for_step("waits", at + 1)
    waited = time.monotonic() - back
    stage.wait_for_end("waits")
    assert stage.sizes(since) == [2, 2]
    assert run_of("waits").read(WEIGHTS) == undisturbed(2, "whole", options).read(WEIGHTS)
    return (
        f"cut at step {at} of 2000 for 45 s, stepping again {waited:.0f} s after that; weights bit"
        " for bit"
    )


def host_cut_off_and_replaced(stage: Stage) -> str:
    """One worker is enough: the run continues on the other host, and grows again when it can."""
    # Over this many steps, differences in the last bit would grow without bound, were the steps not
    # small.
    since, options = (
        time.time(),
        ["train.images=320_000", "optim.learning_rate=1e-5", "cluster.num_workers=[1,2]"],
    )
    stage.start("shrinks", *options)
    stage.wait_for_step("shrinks", 500)
    cut = stage.network.hosts[1]
    cut.unplug()
    gone = time.monotonic()
    time.sleep(3)
    at = newest_step("shrinks")
    alone = stage.wait_for_step("shrinks", at + 1)
    waited = time.monotonic() - gone
    cut.plug_in()
    stage.wait_for_end("shrinks")
    sizes = stage.sizes(since)
    assert sizes == [2, 1, 2], sizes
    disturbed, whole = (
        load(run_of("shrinks").read(WEIGHTS)),
        load(undisturbed(1, "alone", options).read(WEIGHTS)),
    )
    furthest = max((disturbed[name] - whole[name]).abs().max().item() for name in whole)
    assert furthest < 1e-9, f"weights differ by {furthest:.0e}"
    return (
        f"cut at step {at} of 20000, on one host {waited:.0f} s later (step {alone}), then on two;"
        f" weights within {furthest:.0e}"
    )


FAULTS = {
    "a host is cut off for 45 s": host_cut_off_and_back,
    "a host is cut off, and the run goes on without": host_cut_off_and_replaced,
}


@contextmanager
def stage() -> Iterator[Stage]:
    with (
        tempfile.TemporaryDirectory() as folder,
        namespaces.network(Path(folder), 2) as network,
        namespaces.storage_server(network, Path(folder, "objects")) as server,
        mock.patch.dict("os.environ", server.environment()),
        namespaces.ray_up(network, Path(folder)) as laptop,
    ):
        while namespaces.num_hosts(laptop) < 2:
            time.sleep(1)
        laptop.submit("shards", server, "python", "-m", "pipeline", "shard", *OPTIONS[:2])
        yield Stage(network, laptop, server)


def run() -> tuple[int, int]:
    """Run all faults of hosts, and print a line for each.

    Returns the number of faults, and how many of them passed. Where no hosts can be made, prints
    the reason and runs none.
    """
    if reason := namespaces.lacking():
        print(f"no host is cut off: {reason}")
        return 0, 0
    start = time.monotonic()
    with stage() as started:
        suite.print_row("(two hosts, ray up, shards)", start)
        return suite.run((name, partial(fault, started)) for name, fault in FAULTS.items())


if __name__ == "__main__":
    suite.finish(*run())
