"""Running the commands as a user does, against the real servers."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.data import DataSet
from pipeline.storage.server import ObjectStorageServer
from tests.conftest import kill_with_descendants
from tests.pipeline import strokes

VLAE = str(Path(sys.executable).with_name("vlae"))
TINY = [
    "model=tiny",
    "train=short",
    "train.images=2400",
    "train.valid_every=600",
    "train.valid_images=100",
]
"""A model and a run of seconds on MNIST."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def root(storage_server: ObjectStorageServer) -> str:
    """A fresh storage root on the S3 server."""
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def small_data(root: str) -> DataSet:
    """The strokes below ``root``, for tests of what is the same for every data set."""
    return strokes.write(strokes.data_storage(root))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a module's commands, and with it their registry."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module")
def run(workplace: Path) -> Run:
    """Run ``vlae`` as a process in the module's working directory; fails the test if the exit code
    is not ``code``.
    """
    return partial(vlae, workplace)


def vlae(
    folder: Path, *arguments: str, code: int = 0, standalone: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (standalone and name == "RAY_ADDRESS")
    }
    done = subprocess.run(
        [VLAE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == code, f"vlae {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def call(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The same without a process of its own, for what is over before one could start."""
    monkeypatch.chdir(workplace)

    def call(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["vlae", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.console()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, (
            f"vlae {' '.join(arguments)}\n{printed.out}\n{printed.err}"
        )
        return subprocess.CompletedProcess(["vlae", *arguments], code, printed.out, printed.err)

    return call


@pytest.fixture
def begun() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes that a test starts. Those that still run when it ends, as after its time limit,
    are killed.
    """
    processes = list["subprocess.Popen[bytes]"]()
    yield processes
    for process in processes:
        if process.poll() is None:
            kill_with_descendants(process)
