"""A worker that lives and does nothing is found, named and ended; one that works is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from pipeline.cluster import connect
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.runs import Run
from pipeline.training import launch
from pipeline.training.watch import Heartbeats, StepWatch, heartbeat, take_stuck
from tests.pipeline import strokes

WORKER = """
import time
from pipeline.training import watch
watch.SETTLE_SECONDS = 0.1

with watch.StepWatch("mine", 3, 1.0) as watching:
    for step in range(8):
        watching.begin(step)
        time.sleep(0.3)
    BEHAVIOUR
print("finished")
"""


def worker(behaviour: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WORKER.replace("BEHAVIOUR", behaviour)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_worker_that_makes_no_step_ends_with_its_stacks_and_one_that_only_uploads_does_not() -> (
    None
):
    stuck, uploads = worker("time.sleep(600)"), worker("watching.begin(None); time.sleep(3)")
    out, err = stuck.communicate(timeout=60)
    assert (stuck.returncode, out) == (1, "")
    assert "run mine: no step after step 7 for 1 s: rank 3 (process " in err
    assert '"<string>", line 10 in <module>' in err, "no stacks"
    assert uploads.communicate(timeout=60)[0] == "finished\n"


def test_time_in_which_a_process_did_not_run_does_not_count() -> None:
    process = worker("print('now', flush=True); time.sleep(0.5)")
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "finished\n"


@pytest.mark.usefixtures("ray_cluster")
def test_the_rank_behind_the_others_is_named_once_and_a_stopped_process_is_lost() -> None:
    # Local functions, which Ray sends by value: its workers cannot import the tests.
    def train(rank: int, step: int) -> None:
        with StepWatch("mine", rank, 1.0) as watching:
            watching.begin(step)  # and no other
            time.sleep(600)

    def beat() -> None:
        with heartbeat("stopped"):
            time.sleep(600)

    connect(ClusterOptions(), StorageOptions())
    task = ray.remote(num_cpus=0, max_retries=0)
    heartbeats = Heartbeats(5.0)
    heartbeats.expect("stopped")
    beating = task(beat).remote()
    ranks = [task(train).remote(rank, step) for rank, step in enumerate([41, 40, 41])]
    for rank in ranks:
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(rank)
    said = take_stuck("mine")
    assert said is not None
    assert said.startswith("no step after step 40 for 1 s: rank 1 (process ")
    assert take_stuck("mine") is None

    assert not heartbeats.is_lost("stopped")
    sign = heartbeats._seen["stopped"][0]
    assert sign, "no sign of life came"
    pid = int(sign.split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        while not heartbeats.is_lost("stopped"):
            time.sleep(0.2)
        assert time.monotonic() - began > 3
    finally:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(beating)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_are_lost_at_their_start_leave_the_cluster_to_those_that_follow(
    tmp_path: Path,
) -> None:
    def losing(moment: str) -> Any:
        """A callback that kills the first workers that come to a moment of their start."""

        def lose(callback: WorkerGroupCallback, group: Any) -> None:
            if not (tmp_path / moment).exists():
                (tmp_path / moment).touch()
                for worker in group.get_workers():
                    ray.kill(worker.actor)
                while True:  # until Ray knows of the loss, of which it may only be told later
                    ray.get(worker.actor.get_metadata.remote())

        return type("Lost", (WorkerGroupCallback,), {moment: lose})()

    moments = {
        "after_worker_group_start": "its workers were lost at their start",
        "after_worker_group_training_start": "Ray Train's controller failed: ",
    }
    strokes.write(strokes.data_storage(str(tmp_path)))
    # The two workers take the whole cluster.
    config = strokes.train_config(str(tmp_path), "name=lost", "cluster.num_workers=2")
    connect(config.cluster, config.storage)
    launch.check(config)
    launch.fit(config, [losing(moment) for moment in moments])
    run = Run.of(config)
    assert run.is_finished
    for restart, reason in zip(run.restarts(), moments.values(), strict=True):
        assert restart["reason"].startswith(reason)
