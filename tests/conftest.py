"""Shared fixtures: the real object storage server, storages on it and in a folder, and Ray."""

import gc
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import torch

from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer

# Ray reads the token once, when a process first needs it: it has to be there before anything
# imports Ray.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that take long, so that no core waits for the other in the end: the main
    job, the others of ``tests/e2e``, then those that start servers or Ray, or train for long.

    Otherwise the order remains the one that pytest-randomly chose.
    """
    long = {
        item.path
        for item in items
        if "faults" in item.path.parts
        or "ray_cluster" in item.fixturenames  # type: ignore[attr-defined]
        or item.path.stem in ("test_theory", "test_loop", "test_loader_page", "test_site")
    }

    def turn(item: pytest.Item) -> tuple[bool, bool, bool]:
        path = item.path
        return path.stem != "test_main_job", "e2e" not in path.parts, path not in long

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what collecting made: going through it takes seconds."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """PyTorch draws the same numbers in every test and for every fixture, whatever was drawn
    before.

    The tensors of the tests are tiny: more threads than one would only wait for each other.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Whatever a test calls in this process, the next one finds the environment and the folder as
    they were.

    Ray stays connected, since that takes seconds, but only to the cluster of the session.
    """
    environment, folder, was_connected = dict(os.environ), Path.cwd(), _is_connected()
    torch.manual_seed(0)
    try:
        result = yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(folder)
        stays_connected = (
            _is_connected() and not was_connected and "ray_cluster" not in item.fixturenames
        )  # type: ignore[attr-defined]
        if stays_connected:
            sys.modules["ray"].shutdown()
    assert not stays_connected, "a test that connects to Ray has to ask for ray_cluster"
    return result


def _is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands remember for a user is not that of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def storage_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorageServer]:
    """A running object storage server with the bucket ``tests``.

    Environment variables point every client of this session to it.
    """
    with (
        ObjectStorageServer(tmp_path_factory.mktemp("objects"), "tests") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage: a test that asks for it runs on a folder and on S3."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "storage"))
    request.getfixturevalue("storage_server")
    return open_storage(f"s3://tests/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def ray_cluster(
    storage_server: ObjectStorageServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A Ray cluster started with ``ray start --head``, with a token; gives the address for jobs.

    It starts after the S3 server, whose environment its workers inherit. RAY_ADDRESS leads every
    process of this session to it.
    """
    gcs, dashboard, agent = free_ports(3)
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        Path(sys.executable).with_name("ray"),
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        "--num-cpus=2",
        "--include-log-monitor=false",  # no driver of this project reads what it sends
    ]
    command += [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    command += [f"--dashboard-agent-listen-port={agent}"]
    # A folder of its own, with a short name for its sockets: in the one that they share, a Ray
    # started after it is taken for it by jobs.
    with (
        pytest.MonkeyPatch.context() as patch,
        log.open("w") as file,
        TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        head = psutil.Popen(
            [*command, f"--temp-dir={folder}"], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: answers(gcs) and answers(dashboard) and answers(agent), head, log)
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{gcs}")
            # As the commands do when they start Ray on one machine.
            patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            import ray

            ray.shutdown()
            # Told to end, it may wait half a minute for what still runs.
            for process in [*head.children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    """Whether something on this machine accepts connections on ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait up to two minutes for a condition; fails with the process's log if it ends, or time is
    up.
    """
    give_up = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > give_up:
            pytest.fail(f"it ended, or time is up; its log:\n{log.read_text()}")
        time.sleep(0.2)


def kill_with_descendants(process: "subprocess.Popen[Any] | psutil.Process") -> None:
    """SIGKILL for a process and all below it, the driver, its Ray and the workers, as when the
    machine's power is cut.

    Left alone, the workers would train on until they notice that their driver is gone: several
    seconds on a busy machine.
    """
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in below:
        with suppress(psutil.NoSuchProcess):  # it ended with its parent
            each.kill()
    process.wait()
