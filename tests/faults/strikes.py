"""What strikes in ``tests.faults.chaos``: the kinds of faults, and how a seed draws them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.storage.server import ObjectStorageServer
from tests.faults.registry import Team
from tests.faults.storage import (
    Act,
    Exchange,
    FaultyServer,
    corrupt,
    cut,
    no_answer,
    refuse,
    slow,
    stall,
)

LOG = "command.log"
"""What all commands print, in the folder of the stage."""
AS_TYPED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pipeline.cli import console
console()
"""
"""``vlae``, which heeds SIGINT even if this was started in a shell's background."""


@dataclass
class Command:
    """A ``vlae`` command, which can be given again."""

    arguments: list[str]
    folder: Path
    environment: dict[str, str]
    known: set[psutil.Process] = field(default_factory=set)

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (self.folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AS_TYPED, *self.arguments],
                cwd=self.folder,
                env=environment | self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def look(self) -> None:
        """Note the processes below this one, which may outlive it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known |= set(psutil.Process(self.process.pid).children(recursive=True))

    def kill(self) -> None:
        """Kill the process and all below it."""
        self.look()
        self.process.kill()
        self.process.wait()
        self.kill_rest()

    def kill_rest(self) -> None:
        """Kill what the process has left behind."""
        for process in self.known:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.known.clear()

    def tail(self) -> str:
        """The end of all that it has printed."""
        return (self.folder / LOG).read_text(errors="replace")[-3000:]


@dataclass(frozen=True)
class Strike:
    """A fault: ``kind`` is one of KINDS."""

    after: float
    """Seconds after the start of the phase, or after the strike before."""
    kind: str
    seconds: float
    """How long what is temporary lasts."""
    choice: float
    """In [0, 1): which of several processes it hits."""


def draw(seed: int, number: int, phase: str, count: int) -> list[Strike]:
    """The strikes of one phase of one round."""
    drawn = random.Random(f"{seed} {number} {phase}")
    kinds = sorted(kind for kind, fault in KINDS.items() if phase in fault.phases)
    return [
        Strike(
            round(drawn.uniform(2, 30), 1),
            drawn.choice(kinds),
            round(drawn.uniform(0.5, 8), 1),
            drawn.random(),
        )
        for _ in range(count)
    ]


@dataclass
class Stage:
    """What strikes act on."""

    folder: Path
    server: ObjectStorageServer
    proxy: FaultyServer
    team: Team | None
    """The registry's servers; None keeps the registry in a SQLite file."""
    environment: dict[str, str]
    """What the commands have besides this process's environment."""
    has_small_disk: bool
    """Whether the cache of shards is on a disk that may be filled."""
    command: "Command" = field(init=False)
    expected_end: bool = False
    """Whether a fault was to end the command's process, which is then given again."""

    def processes(self, name: str) -> list[psutil.Process]:
        """The command's processes whose command line contains ``name``, oldest first."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.command.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if name in " ".join(process.cmdline()):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)


class Skipped(Exception):
    """A fault that cannot strike on this machine; the message says what it needs."""


@dataclass(frozen=True)
class Kind:
    """How a kind of fault strikes.

    ``strike`` returns what it did, None if there was no target yet, and may raise Skipped.
    """

    strike: Callable[[Stage, Strike], str | None]
    phases: tuple[str, ...] = ("train", "tune", "register")


def on_worker(act: Callable[[psutil.Process], None], how: str) -> Kind:
    """A fault of one of the processes that train."""

    def strike(stage: Stage, drawn: Strike) -> str | None:
        found = stage.processes("ray::RayTrainWorker") or stage.processes("ray::ImplicitFunc")
        if not found:
            return None
        process = found[int(drawn.choice * len(found))]
        with contextlib.suppress(psutil.NoSuchProcess):
            act(process)
        return f"worker {process.pid} {how}"

    return Kind(strike, ("train", "tune"))


def raylet_killed(stage: Stage, drawn: Strike) -> str | None:
    found = [each for each in stage.processes("raylet") if Path(each.exe()).name == "raylet"]
    if not found:
        return None
    found[0].kill()
    stage.expected_end = True  # on one machine, Ray does not survive it
    return "raylet killed"


def driver_killed(stage: Stage, drawn: Strike) -> str | None:
    """The command and all its descendants, as a power cut would."""
    stage.expected_end = True
    stage.command.kill()
    return "the command and all below it killed"


def driver_told(number: signal.Signals) -> Callable[[Stage, Strike], str | None]:
    def strike(stage: Stage, drawn: Strike) -> str | None:
        stage.expected_end = True
        stage.command.process.send_signal(number)
        return f"{number.name} to the command"

    return strike


def store_killed(stage: Stage, drawn: Strike) -> str | None:
    """The object storage server; another one on the same folder and port takes its place."""
    stage.server._process.kill()
    stage.server._process.wait()
    time.sleep(drawn.seconds)
    stage.server.__exit__(None, None, None)
    stage.server.__enter__()
    return f"object storage killed, back after {drawn.seconds} s"


def store_stopped(stage: Stage, drawn: Strike) -> str | None:
    stage.server._process.send_signal(signal.SIGSTOP)
    time.sleep(drawn.seconds)
    stage.server._process.send_signal(signal.SIGCONT)
    return f"object storage silent for {drawn.seconds} s"


def registry_killed(stage: Stage, drawn: Strike) -> str | None:
    if stage.team is None:
        return None
    stage.team.kill()
    time.sleep(drawn.seconds)
    stage.team.start()
    return f"registry killed, back after {drawn.seconds} s"


def network(name: str, act: Act, checked_only: bool = False) -> Kind:
    """Answers to reads that go wrong for some seconds.

    ``checked_only`` spares objects without a checksum of their own, since plain HTTP has none.
    """

    def strike(stage: Stage, drawn: Strike) -> str | None:
        hit = 0

        def fault(exchange: Exchange) -> None:
            nonlocal hit
            checked = exchange.is_shard or ".safetensors" in exchange.path
            if time.monotonic() > until or (checked_only and not checked):
                exchange.answer()
            else:
                hit += 1
                act(exchange)

        until = time.monotonic() + drawn.seconds
        stage.proxy.fault = fault
        time.sleep(drawn.seconds)
        stage.proxy.fault = Exchange.answer
        return f"{hit} reads {name} in {drawn.seconds} s"

    return Kind(strike)


def disk_full(stage: Stage, drawn: Strike) -> str | None:
    """The disk of the cache of shards is full for a while."""
    if not stage.has_small_disk:
        raise Skipped("it needs root, to mount a disk of 2 MB: any other would fill this machine's")
    ballast = stage.folder / "cache" / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
    time.sleep(drawn.seconds)
    ballast.unlink()
    return f"the cache's disk full for {drawn.seconds} s"


def clock_moved(stage: Stage, drawn: Strike) -> str | None:
    """The wall clock that Python reads in the command and its workers, by up to a day."""
    hours = round(48 * drawn.choice - 24, 1)
    (stage.folder / "clock").write_text(str(3600 * hours))
    time.sleep(drawn.seconds)
    (stage.folder / "clock").write_text("0")
    return f"the clock moved by {hours} h for {drawn.seconds} s"


CLOCK = """
import os, time

def moved(read, unit):
    def now():
        try:
            with open(os.environ["CHAOS_CLOCK"]) as file:
                return read() + type(read())(float(file.read() or 0) * unit)
        except (OSError, ValueError):
            return read()
    return now

time.time, time.time_ns = moved(time.time, 1), moved(time.time_ns, 10**9)
"""
"""``sitecustomize`` of the commands, which moves their clock."""

KINDS = {
    "a worker is killed": on_worker(psutil.Process.kill, "killed"),
    "a worker is terminated": on_worker(psutil.Process.terminate, "terminated"),
    "a worker is stopped": on_worker(psutil.Process.suspend, "stopped"),
    "the raylet is killed": Kind(raylet_killed, ("train", "tune")),
    "the command is killed": Kind(driver_killed),
    "the command gets SIGTERM": Kind(driver_told(signal.SIGTERM), ("train",)),
    "the command gets SIGINT": Kind(driver_told(signal.SIGINT), ("train", "tune")),
    "the object storage is killed": Kind(store_killed),
    "the object storage is silent": Kind(store_stopped),
    "the registry is killed": Kind(registry_killed, ("register", "tune")),
    "reads are cut": network("cut", cut(0.5)),
    "reads are reset": network("reset", no_answer),
    "reads stall": network("stalled", stall(0.3)),
    "reads are slow": network("slow", slow),
    "reads are refused": network("refused", refuse(503, "SlowDown")),
    "reads are altered": network("altered", corrupt, checked_only=True),
    "the cache's disk is full": Kind(disk_full, ("train", "tune")),
    "the clock moves": Kind(clock_moved),
}
"""Every kind of fault. Dropped RPCs are drawn for each phase as a whole, see ``rpc_failures``."""


RPC_FAILURE = "RAY_testing_rpc_failure"
METHODS = [
    "CoreWorkerService.grpc_client.PushTask",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "ray::rpc::ActorInfoGcsService.grpc_client.KillActorViaGcs",
]
"""RPCs that Ray sends again, by the names that it logs."""


def rpc_failures(seed: int, number: int, phase: str) -> dict[str, str]:
    """In a third of the phases, Ray loses some requests or answers of one of ``METHODS``."""
    drawn = random.Random(f"{seed} {number} {phase} rpc")
    if drawn.random() > 1 / 3:
        return {}
    percent = drawn.randint(1, 10)
    method = drawn.choice(METHODS)
    lost = {"num_failures": 5, "req_failure_prob": percent, "resp_failure_prob": percent}
    return {RPC_FAILURE: json.dumps({method: lost})}
