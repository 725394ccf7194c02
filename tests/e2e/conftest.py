"""Running the commands as a user does: as processes, against the real servers."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage.server import ObjectStore

VLAE = str(Path(sys.executable).with_name("vlae"))
TINY = [
    "model=tiny",
    "train=short",
    "train.images=4000",
    "train.valid_every=1000",
    "train.valid_images=200",
]
"""A model and a run of seconds."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def root(object_store: ObjectStore) -> str:
    """A fresh storage root on the S3 server."""
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a module's commands."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module")
def run(root: str, workplace: Path) -> Run:
    """Run ``vlae`` with the module's storage, in its working directory; fails the test if the exit
    code is not ``code``.
    """

    def run(
        *arguments: str, code: int = 0, standalone: bool = False
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not (standalone and name == "RAY_ADDRESS")
        }
        done = subprocess.run(
            [VLAE, *arguments],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, f"vlae {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done

    return run
