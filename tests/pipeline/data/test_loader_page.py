"""The programs in docs/loader.md run as they stand there, but for the address."""

import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from pipeline.storage import open_storage
from pipeline.storage.server import ObjectStorageServer
from tests.pipeline import strokes

PAGE = Path(__file__).parents[3] / "docs" / "loader.md"
PLAIN, DDP, LIGHTNING = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def address(storage_server: ObjectStorageServer) -> str:
    """A data set of 96 training images, four batches of 24, on the S3 server."""
    return strokes.write(open_storage(f"s3://tests/{uuid.uuid4().hex}")).storage.url


def run(program: str, address: str, folder: Path, *launcher: str) -> str:
    """Run a program of the page as a script in ``folder``; returns what it printed."""
    assert '"s3://bucket/prefix"' in program
    script = folder / "train.py"
    script.write_text(program.replace("s3://bucket/prefix", address))
    command = [*(launcher or [sys.executable]), str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_first_fifteen_lines_train_three_epochs(address: str, tmp_path: Path) -> None:
    assert len([line for line in PLAIN.splitlines() if line]) <= 15
    checked = PLAIN + "assert (epoch, batches.step, len(labels)) == (2, 12, 24)\nprint('done')\n"
    assert "done" in run(checked, address, tmp_path)


def test_the_ddp_program_resumes_on_another_number_of_processes(
    address: str, tmp_path: Path
) -> None:
    run(DDP, address, tmp_path, *TORCHRUN, "--nproc-per-node=2")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["batches"]["step"] == 15, "saved every fifth of 16 steps"
    run(DDP, address, tmp_path, *TORCHRUN, "--nproc-per-node=1")
    resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    assert resumed["batches"] == state["batches"], "one step was left"


def test_the_lightning_program_trains_on_two_processes(address: str, tmp_path: Path) -> None:
    run(LIGHTNING, address, tmp_path)
    (kept,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(kept, weights_only=True)
    assert checkpoint["global_step"] == 8
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["step"] == 8
