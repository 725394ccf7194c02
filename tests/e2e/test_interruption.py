"""A run that is killed, or told to stop, goes on where it was."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline import commands, runs
from pipeline.storage import open_storage
from pipeline.storage.claims import CLAIM
from pipeline.training import loop
from tests.conftest import kill_with_descendants
from tests.e2e.conftest import VLAE, Run
from tests.pipeline import strokes


@pytest.mark.usefixtures("ray_cluster", "small_data")
def test_a_run_that_is_killed_and_then_told_to_stop_ends_as_if_neither_had_been(
    call: Run, root: str, workplace: Path, begun: list["subprocess.Popen[bytes]"]
) -> None:
    options = [*strokes.TINY, f"storage.root={root}", "train.images=4800", "train.valid_every=4800"]
    # The first checkpoint is that of step 10 of 600, and the next follows 0.2 s later: there is
    # most of the run to kill it in.
    options += ["train.report_seconds=0.2"]
    storage = open_storage(f"{root}/runs/killed")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def newest() -> int:
        return int(
            max(storage.list("checkpoints/"), default="checkpoints/0").split("/")[1].split("-")[0]
        )

    def logged() -> list[dict[str, float]]:
        """What the log has up to the newest checkpoint."""
        step = newest()
        return [row for row in runs.Run(storage).rows() if row["step"] <= step]

    def start_and_wait(log: Path) -> "subprocess.Popen[bytes]":
        """Start the run, and wait until it is further than it was, and has logged something that a
        resumed run keeps.
        """
        before = newest()
        with log.open("w") as file:
            command = [VLAE, "train", "name=killed", *options]
            process = subprocess.Popen(
                command, cwd=workplace, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        begun.append(process)
        # However long a busy machine takes to start Ray; pytest's time limit ends what hangs.
        while newest() <= before or not logged():
            assert process.poll() is None, (
                f"the run ended before it could be interrupted:\n{log.read_text()}"
            )
            time.sleep(0.2)
        assert storage.read_json(CLAIM)["process"] == process.pid
        return process

    kill_with_descendants(start_and_wait(workplace / "killed.log"))
    assert not storage.exists("result.json"), "the run ended before it could be killed"
    kept = logged()

    log = workplace / "stopped.log"
    process = start_and_wait(log)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert (
        f"run killed is stopped, its state saved after step {newest()} of 600; the same command"
        " resumes it" in log.read_text()
    )

    call("train", "name=killed", *options)  # on the cluster of the session
    loop.fit(
        commands.load("train", ["name=whole", *options])
    )  # without Ray, which changes nothing and takes long to start
    assert not storage.exists(CLAIM)
    rows = runs.Run(storage).rows()
    assert rows[: len(kept)] == kept, "the log starts afresh: the checkpoint was not used"
    steps = [row["step"] for row in rows if "train/code_length" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
    whole = open_storage(f"{root}/runs/whole")
    assert storage.read("model/model.safetensors") == whole.read("model/model.safetensors")
