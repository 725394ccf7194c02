"""A seed draws the same faults again, and a run under them ends as an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pipeline import commands
from pipeline.cluster import HEALTH_CHECK_TIMEOUT
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.faults import chaos, training
from tests.faults.strikes import KINDS, METHODS, RPC_FAILURE, Skipped, Strike, draw, rpc_failures

SEED = 52
"""Its first two faults of training are a stopped worker and reads that are cut."""
SHORT = ["train.images=3200", "train.valid_every=1600", "train.checkpoint_seconds=0.5"]
"""400 steps."""
PACE = 0.02
"""The faults come 0.2 s after the first checkpoint: the steps that are left take seconds."""


def test_faults_are_a_function_of_the_seed_and_all_kinds_are_drawn() -> None:
    assert draw(3, 1, "train", 20) == draw(3, 1, "train", 20)
    assert draw(3, 1, "train", 3) == draw(3, 1, "train", 20)[:3]
    drawn = [draw(seed, 1, "tune", 3) for seed in range(60)]
    assert len(set(map(tuple, drawn))) == 60
    assert {each.kind for some in drawn for each in some} == {
        kind for kind, fault in KINDS.items() if "tune" in fault.phases
    }
    dropped = [rpc_failures(seed, 1, "train") for seed in range(60)]
    assert dropped == [rpc_failures(seed, 1, "train") for seed in range(60)]
    assert 5 < sum(map(bool, dropped)) < 40


def test_ray_loses_the_rpcs_that_it_is_told_to() -> None:
    program = """
import ray, sys
ray.init("local", include_dashboard=False, _temp_dir=sys.argv[1])

@ray.remote
def double(number):
    return 2 * number

assert ray.get([double.remote(number) for number in range(20)])[-1] == 38
"""
    # Ray's processes end if they cannot read it.
    lost = {method: {"num_failures": 1, "req_failure_prob": 100} for method in METHODS}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment[RPC_FAILURE] = json.dumps(lost)
    # With a short name, for its sockets.
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", program, folder]
        subprocess.run(command, env=environment, check=True)
        found = Path(folder).glob("session_2*/logs/*driver*.log")
        logs = "".join(path.read_text() for path in found)
    for method in METHODS[:2]:  # those that such a short program sends
        assert f"Inject RPC request failure for {method}" in logs


def test_the_disk_is_filled_only_where_a_small_one_could_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").write_text("#!/bin/sh\nexit 32\n")
    (tmp_path / "mount").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    strike = Strike(0, "the cache's disk is full", 0.1, 0)
    with chaos.stage(tmp_path, with_team=False) as stage:
        assert not stage.has_small_disk
        with pytest.raises(Skipped, match="it needs root"):
            KINDS[strike.kind].strike(stage, strike)
        assert not list((tmp_path / "cache").iterdir())


def test_a_run_under_drawn_faults_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(chaos.ENVIRONMENT, HEALTH_CHECK_TIMEOUT, "5")
    with chaos.stage(tmp_path, with_team=False) as stage:
        disturbed = chaos.Round(stage, 1)
        disturbed.arguments["train"] += [*SHORT, "cluster.num_workers=1"]
        run = open_storage(f"{disturbed.root}/runs/run", stage.server.endpoint_url)
        assert disturbed.play(["train"], SEED, 2, lambda: run.list("checkpoints/"), pace=PACE) == 2
        assert "has not answered" in Run(run).restarts()[0]["reason"]
        options = [*chaos.RUN, *SHORT, f"storage.root={disturbed.root}"]
        loop.fit(commands.load("train", [*options, "name=whole"]))
        whole = open_storage(f"{disturbed.root}/runs/whole", stage.server.endpoint_url)
        training.assert_same(run, whole)
