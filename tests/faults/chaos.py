"""Faults that nobody scripted: a seed draws which, when and for how long.

    python -m tests.faults.chaos MINUTES SEED...        (make chaos SEED=n MINUTES=m)

A round trains a run on two workers, searches, and registers, each by the command that a user gives,
while faults strike at times after its start. A command that a fault ended is given again. The final
weights, trials and versions must equal those of a round without faults, which several seeds share.
Rounds of a seed follow each other until its minutes are over. The faults of a round are a function
of the seed and the round's number alone: the same seed draws the same faults at the same times.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.cluster import HEALTH_CHECK_TIMEOUT
from pipeline.config.sections import RegistryOptions
from pipeline.errors import UserError
from pipeline.registry.versions import CHECKSUM, Registry
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.server import ObjectStorageServer
from tests.faults import suite
from tests.faults.registry import Team
from tests.faults.storage import Exchange, FaultyServer
from tests.faults.strikes import (
    CLOCK,
    KINDS,
    LOG,
    Command,
    Skipped,
    Stage,
    Strike,
    draw,
    rpc_failures,
)
from tests.pipeline import strokes
from vlae.files import WEIGHTS_FILE

WEIGHTS = "model/model.safetensors"
PATIENCE = 600.0
"""Seconds without a fault, and with no new object in its storage, after which a command hangs."""
LOOK_SECONDS = 20.0
"""Seconds between two looks for new objects."""
BUSY = "timed out during startup"
"""What Ray says if its processes need more than its 30 s to start, as beside much other work. The
command, which is not to blame, is given again.
"""
ENVIRONMENT = {HEALTH_CHECK_TIMEOUT: "10", "OMP_NUM_THREADS": "1"}
RUN = [
    *strokes.TINY,
    "train.images=8000",
    "train.valid_every=4000",
    "train.report_seconds=0.5",
    "train.checkpoint_seconds=1",
    "cluster.max_failures=10",
    "cluster.stuck_seconds=120",
]
"""1000 steps."""
SEARCH = [
    "search.space.model.latents=[2,4]",
    "search.space.model.window=[3x1]",
    "search.space.model.flow_depth=[0]",
    "search.space.optim.learning_rate=[0.003]",
    "search.sampler=grid",
    "search.stopping=none",
    "search.constraints=[]",
    "search.num_trials=2",
    "search.samples=2",
    "search.num_images=13",
    "search.probe_images=0",
    "register_best=1",
]
VARYING = {"images_per_s", "seconds", "failures", "front", "number"}
"""What a trial's row holds that is not a function of its options."""
BUCKET = "tests"
PHASES = ("train", "tune", "register")


class Round:
    """One round on storage and registry that belong to it, with or without faults."""

    def __init__(self, stage: Stage, number: int, name: str = "round") -> None:
        self.stage, self.number = stage, number
        self.model = f"{name}-{number}"
        self.root = f"s3://{BUCKET}/{self.model}"
        registry = stage.team.uri if stage.team else f"sqlite:///{stage.folder}/registry.db"
        self.registry = RegistryOptions(uri=registry, artifacts="unused")
        common = [f"storage.root={self.root}", f"registry.uri={registry}"]
        cached = f"dataset.cache={stage.folder / 'cache'}"
        self.arguments = {
            "train": ["train", "name=run", "cluster.num_workers=2", *RUN, *common, cached],
            "tune": [
                *("tune", "name=search", f"model_name={self.model}-search"),
                *RUN,
                *SEARCH,
                *common,
                cached,
            ],
            "register": [
                *("registry", "register", f"name={self.model}", f"runs=[{self.root}/runs/run]"),
                *common,
                "bounds.samples=2",
                "bounds.num_images=13",
            ],
        }

    def play(
        self,
        phases: Sequence[str],
        seed: int | None,
        count: int,
        is_ready: Callable[[], object] = lambda: True,
        pace: float = 1.0,
    ) -> int:
        """Give the command of each phase, and again if a fault ended it.

        Each phase has ``count`` strikes, none if ``seed`` is None. They come after ``pace`` times
        the seconds that were drawn, and no time passes for them until ``is_ready``. Returns how
        many struck.

        Raises AssertionError if a command fails for another reason, or does not end.
        """
        strokes.write(strokes.data_storage(self.root))
        (self.stage.folder / LOG).unlink(missing_ok=True)
        struck = 0
        for phase in phases:
            drawn = [] if seed is None else draw(seed, self.number, phase, count)
            dropped = {} if seed is None else rpc_failures(seed, self.number, phase)
            for variable in dropped.values():
                print(f"  {phase}: RPCs dropped, {variable}", flush=True)
            struck += len(dropped) + self._play(phase, drawn, dropped, is_ready, pace)
        return struck

    def _play(
        self,
        phase: str,
        drawn: list[Strike],
        dropped: dict[str, str],
        is_ready: Callable[[], object],
        pace: float,
    ) -> int:
        stage, struck, began = self.stage, 0, time.monotonic()
        environment = ENVIRONMENT | dropped | stage.environment
        command = stage.command = Command(self.arguments[phase], stage.folder, environment)
        command.start()
        waiting = list(drawn)
        due: float | None = None
        storage, kept = open_storage(self.root, stage.server.endpoint_url), list[str]()
        give_up, next_look = began + PATIENCE, began
        stage.expected_end = False
        try:
            while True:
                time.sleep(0.2)
                command.look()
                if time.monotonic() > next_look:
                    before, kept = kept, list(storage.list())
                    next_look = time.monotonic() + LOOK_SECONDS
                    give_up = time.monotonic() + PATIENCE if kept != before else give_up
                assert time.monotonic() < give_up, f"{phase} hangs:\n{command.tail()}"
                code = command.process.poll()
                if code == 0:
                    return struck
                if code is not None:
                    command.kill_rest()
                    assert stage.expected_end or BUSY in command.tail()[-400:], (
                        f"{phase} ended with {code}:\n{command.tail()}"
                    )
                    stage.expected_end = False
                    command.start()
                if not waiting or (due is None and not is_ready()):
                    continue
                due = due or time.monotonic() + pace * waiting[0].after
                if time.monotonic() > due:
                    try:
                        done = KINDS[waiting[0].kind].strike(stage, waiting[0])
                        if done is None:  # no such process yet
                            continue
                        struck += 1
                    except Skipped as reason:
                        done = f"{waiting[0].kind}: skipped, {reason}"
                    print(f"  {phase} {time.monotonic() - began:5.1f} s  {done}", flush=True)
                    waiting.pop(0)
                    due = None
                    give_up = time.monotonic() + PATIENCE
        finally:
            command.kill()

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on faults: weights, validations, trials and versions."""
        storage = open_storage(self.root, self.stage.server.endpoint_url)
        weights = {
            key: hashlib.sha256(storage.read(key)).hexdigest()
            for key in storage.list("runs/")
            if key.endswith("/" + WEIGHTS) and "/best/" not in key
        }
        rows = Run(storage.child("runs/run")).rows()
        valid = [row for row in rows if "valid/elbo_nats" in row]
        found: dict[str, Any] = {"weights": weights, "validations": valid}
        if storage.exists("searches/search/result.json"):
            trials = storage.read_json("searches/search/result.json")["trials"]
            found["trials"] = sorted(
                [
                    {name: value for name, value in row.items() if name not in VARYING}
                    for row in trials
                ],
                key=lambda row: row["run"],
            )
        registry = Registry(self.registry)
        for model in registry.models():
            if not model.name.startswith(self.model):
                continue
            versions = registry.versions(model.name)
            found[model.name.removeprefix(self.model)] = {
                "versions": [
                    [str(each.run).removeprefix(self.root), each.tags.get(CHECKSUM + WEIGHTS_FILE)]
                    for each in versions
                ],
                "champion": [each.number for each in versions if "champion" in each.aliases],
            }
        return found


@contextlib.contextmanager
def stage(folder: Path, with_team: bool) -> Iterator[Stage]:
    """The servers, the proxy before the storage, and a small disk for the cache of shards."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ObjectStorageServer(folder / "objects", BUCKET))
        proxy = stack.enter_context(FaultyServer(server.port, Exchange.answer))
        environment = server.environment() | {"AWS_ENDPOINT_URL": proxy.url}
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(CLOCK)
        path = [str(folder / "site"), *(entry for entry in sys.path if entry)]
        environment |= {
            "PYTHONPATH": os.pathsep.join(path),
            "CHAOS_CLOCK": str(folder / "clock"),
        }
        stack.enter_context(mock.patch.dict(os.environ, server.environment()))
        small_disk = stack.enter_context(mounted(folder / "cache"))
        team = None
        if with_team:
            (folder / "team").mkdir()
            team = stack.enter_context(Team(folder / "team", server))
        yield Stage(folder, server, proxy, team, environment, small_disk)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Make ``folder``, on a disk of 2 MB if this process may mount one; yields whether it may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def run(seeds: Sequence[int], minutes: float) -> tuple[int, int]:
    """Play rounds of each seed for ``minutes``, at least one, and compare them with an undisturbed
    one.

    Prints a line of JSON for each seed. Of a round that did not end as undisturbed, it keeps all
    that its commands printed, in a file of this folder. Returns the number of faults that struck,
    and of those in rounds that ended as undisturbed.
    """
    total = total_passed = 0
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        stage(Path(folder), with_team=True) as started,
    ):
        began, whole = time.monotonic(), Round(started, 0)
        whole.play(PHASES, None, 0)
        expected = whole.outcome()
        suite.print_row("undisturbed", began)
        for seed in seeds:
            began, number, faults, passed = time.monotonic(), 0, 0, 0
            while number == 0 or time.monotonic() - began < 60 * minutes:
                number += 1
                start, disturbed = time.monotonic(), Round(started, number, f"seed-{seed}")
                struck, outcome = 1, ""
                try:
                    struck = disturbed.play(PHASES, seed, 3)
                    assert_same(disturbed.outcome(), expected)
                    passed += struck
                except (AssertionError, UserError, subprocess.SubprocessError) as error:
                    log = Path(f"chaos-{seed}-{number}.log").absolute()
                    shutil.copyfile(started.folder / LOG, log)
                    outcome = f"FAILED, all that its commands printed is in {log}: {error}"
                faults += struck
                suite.print_row(f"seed {seed}, round {number}: {struck} faults", start, outcome)
            print(json.dumps({"seed": seed, "faults": faults, "passed": passed}), flush=True)
            total, total_passed = total + faults, total_passed + passed
    return total, total_passed


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected | found:
        assert found.get(name) == expected.get(name), (
            f"other {name}: {found.get(name)}, undisturbed {expected.get(name)}"
        )


if __name__ == "__main__":
    suite.finish(*run([int(each) for each in sys.argv[2:]], float(sys.argv[1])))
