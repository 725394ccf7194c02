"""A run that is killed goes on where it was."""

import os
import signal
import subprocess
import time
from pathlib import Path

from pipeline.metrics import read_rows
from pipeline.storage import open_storage
from tests.e2e.conftest import TINY, VLAE, Run


def test_a_killed_run_continues_from_its_newest_checkpoint_and_ends_as_if_it_had_not_been(
    run: Run, root: str, workplace: Path
) -> None:
    run("shard", f"storage.root={root}", standalone=True)
    options = [f"storage.root={root}", *TINY, "train.images=24000", "train.valid_every=24000"]
    options += ["train.report_seconds=0.5", "train.checkpoint_seconds=1"]
    storage = open_storage(f"{root}/runs/killed")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [VLAE, "train", "name=killed", *options],
        cwd=workplace,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    give_up = time.monotonic() + 120
    while len(storage.list("checkpoints/")) < 2 and time.monotonic() < give_up:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoints = storage.list("checkpoints/")
    assert checkpoints, "no checkpoint was written in time"
    assert not storage.exists("result.json"), "the run ended before it could be killed"
    time.sleep(3)  # the workers notice that their driver is gone, and end
    step = int(max(storage.list("checkpoints/")).split("/")[1].split("-")[0])
    kept = [row for row in read_rows(storage) if row["step"] <= step]

    run("train", "name=killed", *options, standalone=True)
    run("train", "name=whole", *options, standalone=True)
    rows = read_rows(storage)
    assert kept
    assert rows[: len(kept)] == kept, "the log starts afresh: the checkpoint was not used"
    steps = [row["step"] for row in rows if "train/code_length" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1500
    whole = open_storage(f"{root}/runs/whole")
    assert storage.read("model/model.safetensors") == whole.read("model/model.safetensors")
