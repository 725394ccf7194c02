"""A search outlives Ctrl-C and the death of its driver and of its trials, and its mistakes are not
repeated.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import runs
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.conftest import kill_with_descendants
from tests.e2e.conftest import VLAE, Run
from tests.pipeline import strokes

pytestmark = pytest.mark.usefixtures("ray_cluster", "small_data")

SEARCH = [
    "tune",
    "name=fated",
    *strokes.TINY,
    "train.images=4800",
    "train.valid_every=600",
    "train.report_seconds=0.2",
    "search.space.model.window=[3x1]",
    "search.space.model.latents=[2,4]",
    "search.space.model.flow_depth=[0]",
    "search.space.optim.learning_rate=[0.003,1e30]",
    "search.sampler=grid",
    "search.stopping=none",
    "search.constraints=[]",
    "search.num_trials=4",
    "search.max_concurrent=1",
    "search.samples=2",
    "search.num_images=13",
    "search.probe_images=0",
]
"""600 steps a trial. The second and the fourth fail: no number stays finite at their learning rate.
"""


def records(storage: Storage) -> list[dict[str, Any]]:
    """What the search has kept of its trials."""
    return [storage.read_json(key) for key in sorted(storage.list("trials/"))]


def start(
    begun: list["subprocess.Popen[bytes]"], workplace: Path, root: str, *, has_own_ray: bool = True
) -> tuple["subprocess.Popen[bytes]", Path]:
    """The search in a process, with its own Ray or on the cluster of the session, and its log."""
    log = workplace / "search.log"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (has_own_ray and name == "RAY_ADDRESS")
    }
    with log.open("w") as file:
        command = [VLAE, *SEARCH, f"storage.root={root}"]
        options: dict[str, Any] = {"cwd": workplace, "env": environment, "start_new_session": True}
        # Tests that were started in the background have Ctrl-C ignored, and hand that on.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        begun.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options))
    return begun[-1], log


def wait_until(condition: Callable[[], Any], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """However long a busy machine takes; pytest's time limit ends what hangs."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the search ended before it could be disturbed:\n{log.read_text()}")
        time.sleep(0.2)


def test_a_search_that_is_interrupted_and_killed_with_a_trial_runs_every_trial_once(
    call: Run, root: str, workplace: Path, begun: list["subprocess.Popen[bytes]"]
) -> None:
    storage = open_storage(f"{root}/searches/fated")
    third = open_storage(f"{root}/runs/fated-window3x1-latents4-flow_depth0-learning_rate0.003")

    def kept() -> list[dict[str, float]]:
        """The rows of the third trial's log up to its newest checkpoint."""
        steps = [int(key.split("/")[1].split("-")[0]) for key in third.list("checkpoints/")]
        return [row for row in runs.Run(third).rows() if row["step"] <= max(steps)] if steps else []

    process, log = start(begun, workplace, root)
    wait_until(kept, process, log)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C: all that a terminal started
    assert process.wait() == 130
    assert log.read_text().endswith("\ninterrupted; the same command continues from here\n")
    assert "Traceback" not in log.read_text()

    rows_before = kept()
    process, log = start(begun, workplace, root)
    wait_until(lambda: len(kept()) > len(rows_before), process, log)
    kill_with_descendants(process)
    before, rows_before = records(storage), kept()
    assert [row["status"] for row in before] == ["finished", "failed", "unfinished"]
    assert "not finite" in before[1]["error"]

    process, log = start(begun, workplace, root, has_own_ray=False)
    wait_until(lambda: len(kept()) > len(rows_before), process, log)
    below = set(psutil.Process().children(recursive=True))
    (trial,) = [
        each
        for each in psutil.process_iter(["cmdline"])
        if each in below
        and (command := " ".join(each.info["cmdline"] or [])).startswith("ray::")
        and "train" in command
    ]
    trial.kill()
    assert process.wait() == 0, log.read_text()

    output, after = log.read_text(), records(storage)
    assert [row["status"] for row in after] == ["finished", "failed", "finished", "failed"]
    assert after[:2] == before[:2], "what had ended is not run again"
    assert "trial 1/4" not in output
    assert "trial 2/4" not in output
    assert [row["failures"] for row in after] == [0, 0, 1, 0]
    assert (
        "trial 3/4  window 3x1, latents 4, flow_depth 0, learning_rate 0.003: its process was"
        " lost; retry 1" in output
    )
    rows = runs.Run(third).rows()
    assert rows[: len(rows_before)] == rows_before, (
        "the trial starts afresh: its checkpoint was not used"
    )
    steps = [row["step"] for row in rows if "train/code_length" in row]
    assert steps == sorted(set(steps))
    images = [entry["images"] for entry in after[2]["curve"]]
    assert images == sorted(set(images))
    assert images[-1] == 4_800
    last = json.loads(open_storage(f"{root}/searches/fated").read("result.json"))
    assert [row["status"] for row in last["trials"]] == ["finished", "finished", "failed", "failed"]

    for budget in ("search.hours=0.0001", "search.core_hours=0.0001"):
        done = call(*SEARCH, f"storage.root={root}", "search.num_trials=9", budget)
        assert "was finished already" in done.stdout


def test_an_hour_that_is_over_begins_no_trial_and_other_options_under_a_used_name_are_refused(
    call: Run, root: str
) -> None:
    done = call(*SEARCH, f"storage.root={root}", "name=late", "search.hours=0.000001", code=2)
    assert "search.hours=1e-06 was over before a trial began" in done.stderr
    others = ["search.samples=3", "search.objectives=[max rate_bits]"]
    done = call(*SEARCH, f"storage.root={root}", "name=late", *others, code=2)
    assert (
        "was started with another search.objectives, search.samples; give this one another name="
        in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
