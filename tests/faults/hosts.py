"""A host is cut off in the middle of a run, and comes back: on two hosts in network namespaces,
launched as a user would.

    python -m tests.host_faults        (part of make faults)

`ray up infra/local.yaml`, then `ray job submit` for the shards and for each run. A run has to end
with the weights of one that was never disturbed: bit for bit, if it waited for the host; if it went
on with the other alone, as near as another order of the sums allows.
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
from pipeline.storage.server import ObjectStore
from pipeline.training import loop
from tests.faults import namespaces, playing

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
PATIENCE = 600.0
"""Seconds for which a run may get no further."""


@dataclass(frozen=True)
class Stage:
    """What the faults play on."""

    network: namespaces.Network
    laptop: namespaces.Laptop
    store: ObjectStore

    def start(self, name: str, *options: str) -> None:
        """Submit a run."""
        self.laptop.submit(
            name,
            self.store,
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
        """Wait until a run has a checkpoint of this step or a later one; gives its step."""
        return self.wait(name, lambda: (newest := newest_step(name)) >= step and newest)

    def wait_for_end(self, name: str) -> None:
        self.wait(name, lambda: run_of(name).exists("result.json"))

    def wait(self, name: str, condition: Callable[[], int]) -> int:
        """Wait for a condition for as long as the run gets further; gives its value."""
        furthest, since = -1, time.monotonic()
        while not (value := condition()):
            if (newest := newest_step(name)) > furthest:
                furthest, since = newest, time.monotonic()
            if time.monotonic() - since > PATIENCE or "failed" in self.laptop.ray(
                "job", "status", name
            ):
                raise AssertionError(
                    f"run {name} does not go on:\n{self.laptop.ray('job', 'logs', name)[-3000:]}"
                )
            time.sleep(2)
        return value

    def sizes(self, since: float) -> list[int]:
        """The numbers of workers that Ray Train has started runs with, in the order of time, as its
        log on the head says.
        """
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
    """The step of the newest checkpoint that a run has, -1 if it has none."""
    return max(
        (int(key.partition("/")[2].partition("-")[0]) for key in run_of(name).list("checkpoints/")),
        default=-1,
    )


def undisturbed(num_ranks: int, name: str, options: list[str]) -> Storage:
    """A run that nothing happens to, on so many processes without Ray."""
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
    """Two workers are wanted: the run waits for the host, and goes on from its newest checkpoint
    when it is back.
    """
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


def host_cut_off_and_missed(stage: Stage) -> str:
    """One worker is enough: the run goes on with the other host, and takes the first back when it
    is there again.
    """
    # Over so many steps, differences in the last bit grow to all there is, unless the steps are
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
    "a host is cut off, and the run goes on without": host_cut_off_and_missed,
}


@contextmanager
def stage() -> Iterator[Stage]:
    with (
        tempfile.TemporaryDirectory() as folder,
        namespaces.network(Path(folder), 2) as network,
        namespaces.object_store(network, Path(folder, "objects")) as store,
        mock.patch.dict("os.environ", store.environment()),
        namespaces.ray_up(network, Path(folder)) as laptop,
    ):
        while namespaces.num_hosts(laptop) < 2:
            time.sleep(1)
        laptop.submit("shards", store, "python", "-m", "pipeline", "shard", *OPTIONS[:2])
        yield Stage(network, laptop, store)


def play() -> tuple[int, int]:
    """Play all of them, with a line for each; how many there were, and how many passed. None, with
    a line, where hosts cannot be had.
    """
    if reason := namespaces.lacking():
        print(f"no host is cut off: {reason}")
        return 0, 0
    start = time.monotonic()
    with stage() as played:
        playing.say("(two hosts, ray up, shards)", start)
        return playing.play((name, partial(fault, played)) for name, fault in FAULTS.items())


if __name__ == "__main__":
    playing.finish(*play())
