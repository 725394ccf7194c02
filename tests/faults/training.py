"""Training runs that are killed, terminated, or cut off from storage, or whose newest checkpoint is
damaged.

    python -m tests.faults.training        (part of make faults)

Every run is a ``vlae train`` on two workers, with its data and state on the real object storage
server. It must end with the weights of an undisturbed run, bit for bit, and so must have seen the
same samples and the same noise at every step.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.multiprocessing.spawn import spawn

from pipeline import commands
from pipeline.cluster import HEALTH_CHECK_TIMEOUT
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer
from pipeline.training import loop
from tests.conftest import kill_with_descendants
from tests.faults import suite
from tests.faults.storage import Exchange, FaultyServer
from tests.pipeline import strokes

ROOT, WEIGHTS, WORKERS = "s3://tests/training", "model/model.safetensors", 2
VLAE = str(Path(sys.executable).with_name("vlae"))
OPTIONS = [
    *strokes.TINY,
    f"storage.root={ROOT}",
    "train.images=16000",
    "train.valid_every=4000",
    "train.report_seconds=0.5",
    "train.checkpoint_seconds=1",
]
"""2000 steps, which take at least 15 seconds."""


@dataclass
class Command:
    """A ``vlae train`` process, by the name of its run."""

    name: str
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = open_storage(f"{ROOT}/runs/{self.name}")
        self.start()

    def start(self) -> None:
        """Start the command, or start it again."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= self.environment
        self.process = subprocess.Popen(
            [
                VLAE,
                "train",
                f"name={self.name}",
                f"cluster.num_workers={WORKERS}",
                *OPTIONS,
                *self.options,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def newest(self) -> str:
        return max(self.run.list("checkpoints/"), default="checkpoints/0000000000")

    def step(self) -> int:
        """The step of its newest checkpoint."""
        return int(Path(self.newest()).name[:10])

    def wait_for_step(self, step: int) -> int:
        """Wait for a checkpoint of this step or a later one; returns its step."""
        while self.step() < step:
            assert self.process.poll() is None, f"it ended:\n{self.output()[-2000:]}"
            time.sleep(0.1)
        return self.step()

    def workers(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(process.cmdline())
        ]

    def kill(self) -> None:
        """Kill the command and all its descendants, as a power cut would."""
        kill_with_descendants(self.process)

    def output(self) -> str:
        return self.process.communicate(timeout=900)[0]

    def finish(self) -> None:
        """Wait for the command to end, and check that it succeeded."""
        output = self.output()
        assert self.process.returncode == 0, (
            f"exit code {self.process.returncode}:\n{output[-2000:]}"
        )


@dataclass(frozen=True)
class Stage:
    """What the faults act on."""

    server: ObjectStorageServer
    folder: Path

    def stop_server(self) -> None:
        self.server._process.kill()
        self.server._process.wait()

    def start_server(self) -> None:
        """Start another server on the same folder and port."""
        self.server.__exit__(None, None, None)
        self.server.__enter__()


def worker_killed(stage: Stage) -> str:
    command = Command("worker-killed")
    at = command.wait_for_step(300)
    command.workers()[1].kill()
    return ended_as_whole(command, f"at step {at}")


def worker_stopped(stage: Stage) -> str:
    """SIGSTOP: the process lives and does nothing."""
    command = Command("worker-stopped", environment={HEALTH_CHECK_TIMEOUT: "15"})
    at, worker = command.wait_for_step(300), command.workers()[1]
    worker.suspend()
    stopped = time.monotonic()
    command.wait_for_step(at + 1)
    seconds = time.monotonic() - stopped
    ended = ended_as_whole(command, f"at step {at}, further after {seconds:.0f} s")
    restart = Run(command.run).restarts()[0]
    assert re.fullmatch(
        rf"rank \d \(process {worker.pid} on .+\) has not answered for 15 s", restart["reason"]
    ), restart
    assert not worker.is_running(), "the stopped process is left"
    return ended


def worker_stuck(stage: Stage) -> str:
    """One rank waits for a shard that never comes; its process answers Ray all the time."""
    hung = threading.Event()

    def hang(exchange: Exchange) -> None:
        """Hang on the first read of a shard that comes once the run is under way."""
        if exchange.is_shard and command.step() >= 300 and not hung.is_set():
            hung.set()
            time.sleep(60)  # much longer than a worker may be stuck
        exchange.answer()

    with FaultyServer(stage.server.port, Exchange.answer) as server:
        command = Command(
            "worker-stuck",
            ["cluster.stuck_seconds=10"],
            environment={"AWS_ENDPOINT_URL": server.url},
        )
        server.fault = hang
        while not hung.wait(0.1):
            assert command.process.poll() is None, "no shard was read after step 300"
        at, since = command.step(), time.monotonic()
        command.wait_for_step(at + 1)
        seconds = time.monotonic() - since
        ended = ended_as_whole(command, f"at step {at}, further after {seconds:.0f} s")
    restart = Run(command.run).restarts()[0]
    assert re.fullmatch(
        r"no step after step \d+ for 10 s: rank \d \(process \d+ on .+\) at pipeline/data/\S+ in"
        r" \w+",
        restart["reason"],
    ), restart
    return f"{ended}; {restart['reason']}"


def worker_terminated(stage: Stage) -> str:
    command = Command("worker-terminated", ["train.checkpoint_seconds=600"])
    while len(Run(command.run).rows()) < 5:
        time.sleep(0.1)
    command.workers()[1].terminate()
    at = command.wait_for_step(1)  # no other checkpoint is due
    return ended_as_whole(command, f"saved step {at} first")


def driver_terminated(stage: Stage) -> str:
    command = Command("driver-terminated", ["train.checkpoint_seconds=600"])
    while len(Run(command.run).rows()) < 5:
        time.sleep(0.1)
    asked = time.monotonic()
    command.process.terminate()
    output = command.output()
    seconds = time.monotonic() - asked
    assert command.process.returncode == 128 + signal.SIGTERM, output[-2000:]
    said = re.search(
        r"run driver-terminated is stopped, its state saved after step (\d+) of 2000; the same"
        r" command resumes it",
        output,
    )
    assert said, output[-2000:]
    assert int(said[1]) == command.step() > 0
    command.start()
    return ended_as_whole(command, f"saved step {said[1]} and ended within {seconds:.1f} s")


def driver_killed(stage: Stage) -> str:
    command = Command("driver-killed")
    at = command.wait_for_step(300)
    command.kill()
    command.start()
    return ended_as_whole(command, f"at step {at}")


def killed_in_an_upload(stage: Stage) -> str:
    command = Command("killed-in-an-upload")
    command.wait_for_step(300)
    stage.server._process.send_signal(signal.SIGSTOP)
    time.sleep(3)  # the next checkpoint is due meanwhile, and its upload hangs
    command.kill()
    stage.server._process.send_signal(signal.SIGCONT)
    at = command.step()
    command.start()
    return ended_as_whole(command, f"from step {at} on")


def newest_damaged(stage: Stage) -> str:
    command = Command("newest-damaged")
    command.wait_for_step(300)
    command.kill()
    key = command.newest()
    content = bytearray(command.run.read(key))
    content[len(content) // 2] ^= 1
    command.run.write(key, bytes(content))
    command.start()
    return ended_as_whole(command, f"step {int(Path(key).name[:10])} was damaged")


def server_restarted(stage: Stage) -> str:
    command = Command("server-restarted")
    at = command.wait_for_step(300)
    stage.stop_server()
    stage.start_server()
    return ended_as_whole(command, f"at step {at}")


def server_away(stage: Stage) -> str:
    """The data is in the cache, so training and validation continue during the outage."""
    command = Command("server-away", [f"dataset.cache={stage.folder / 'cache'}"])
    at = command.wait_for_step(600)  # after the first validation
    stage.stop_server()
    time.sleep(60)
    back = time.time()
    stage.start_server()
    ended = ended_as_whole(command, f"from step {at} on, without a restart")
    failures = Run(command.run).rows()[-2]["train/failed_requests"]
    assert failures > 0, "no upload failed during the outage"
    attempts = command.run.list("tensorboard/")
    assert len(attempts) == 1, f"it was started {len(attempts)} times"
    events = stage.folder / "events"
    events.write_bytes(command.run.read(attempts[0]))
    last = max(EventFileLoader(str(events)).Load(), key=lambda event: event.step)
    assert last.step == 2000, last
    assert last.wall_time < back, f"it waited for the storage: {last.wall_time - back:.1f} s late"
    return f"{ended}; {failures:.0f} attempts at writing failed"


FULL = """
import sys
from pipeline.storage import uploads
from pipeline.training import loop
from tests.pipeline import strokes
uploads.MAX_OUTAGE = 3
strokes.write(strokes.data_storage(sys.argv[1]))
options = ["name=full", "train.images=80000", "train.keep_checkpoints=100000"]
loop.fit(strokes.train_config(sys.argv[1], *options))
"""


def disk_full(stage: Stage) -> str:
    """The run has a file system of 3 MB, which ends with its mount namespace."""
    command = (
        f"mount -t tmpfs -o size=3m none {stage.folder} && exec {sys.executable} -c '{FULL}'"
        f" {stage.folder}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"Unavailable: cannot use .*/runs/full/.*: No space left on device; retried for", last
    ), last
    return last


FAULTS: dict[str, Callable[[Stage], str]] = {
    "training: the driver is terminated": driver_terminated,
    "training: a worker is terminated": worker_terminated,
    "training: a worker is killed": worker_killed,
    "training: a worker is stopped": worker_stopped,
    "training: a worker waits forever": worker_stuck,
    "training: the driver and all workers are killed": driver_killed,
    "training: killed in the middle of an upload": killed_in_an_upload,
    "training: the newest checkpoint is damaged": newest_damaged,
    "training: the S3 server is killed and restarted": server_restarted,
    "training: the S3 server is away for 60 s": server_away,
    "training: the disk is full": disk_full,
}


# --- the undisturbed run --------------------------------------------------------------------------


def train_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS
    )
    loop.fit(commands.load("train", [*OPTIONS, "name=whole"]), rank=rank, world_size=WORKERS)
    dist.destroy_process_group()


def undisturbed() -> None:
    """Train the undisturbed run, on as many ranks, without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(train_on_one_rank, (folder,), nprocs=WORKERS)


def ended_as_whole(command: Command, how: str) -> str:
    command.finish()
    assert_same(command.run, open_storage(f"{ROOT}/runs/whole"))
    return f"{how}; same weights"


def assert_same(run: Storage, whole: Storage) -> None:
    assert run.read(WEIGHTS) == whole.read(WEIGHTS), "other weights"
    one, other = (
        [row for row in Run(each).rows() if "valid/elbo_nats" in row] for each in (run, whole)
    )
    assert one == other, "other validations"


def alone(fault: Callable[[Stage], str], stage: Stage) -> str:
    """Run a fault, and leave nothing of it to the next: no command, and a server that runs."""
    before = set(psutil.Process().children())
    try:
        return fault(stage)
    finally:
        server = stage.server._process
        for left in set(psutil.Process().children()) - before:
            if left.pid != server.pid:
                kill_with_descendants(left)
        if server.poll() is not None:
            stage.start_server()


def run(only: Sequence[str] = ()) -> tuple[int, int]:
    """Run all faults of training, or those whose names contain one of the words in ``only``.

    Returns the number of faults, and how many of them passed.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))  # where the commands keep MLflow's database
        server = stack.enter_context(ObjectStorageServer(f"{folder}/objects", "tests"))
        stack.enter_context(mock.patch.dict(os.environ, server.environment()))
        ours = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }  # as in Ray's workers
        stack.enter_context(mock.patch.dict(os.environ, ours))
        strokes.write(strokes.data_storage(ROOT))
        undisturbed()
        return suite.run(
            (name, partial(alone, fault, Stage(server, Path(tempfile.mkdtemp(dir=folder)))))
            for name, fault in FAULTS.items()
            if not only or any(word in name for word in only)
        )


if __name__ == "__main__":
    suite.finish(*run(sys.argv[1:]))
