"""What every worker of a cluster is given."""

import http.server
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray.util

from pipeline.cluster import TLS_FILES, _check_answers, _tls, connect, in_tasks
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.machine import WORKER_ENVIRONMENT
from tests.servers import serving

ENVIRONMENT = """
import json, os
from pipeline.cluster import _check_answers, connect, in_tasks
from pipeline.commands import load
from pipeline.errors import UserError

config = load("train", [])
connect(config.cluster, config.storage)
(environment,) = in_tasks(lambda: dict(os.environ), [()])
try:
    _check_answers(environment["RAY_ADDRESS"])
except UserError as error:
    environment["REFUSED"] = str(error)
print(json.dumps(environment))
"""
FAULTS = """
import json, re, resource, threading
import torch
from pipeline.commands import load
from pipeline.machine import keep_freed_memory

faults = []

def train():
    torch.set_num_threads(1)
    keep_freed_memory()
    model = load("train", ["model=fast"]).build((1, 28, 28))
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bound = model(torch.ones(64, 1, 28, 28), torch.zeros(64, model.latents))
        (bound.distortion + bound.rate).mean().backward()
        del bound
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=train)
thread.start()
thread.join()
with open("/proc/self/smaps_rollup") as file:
    huge = int(re.search(r"AnonHugePages: +(\\d+) kB", file.read())[1])
print(json.dumps({"faults": faults, "huge_kilobytes": huge}))
"""


def last_line(code: str, **environment: str) -> Any:
    """What a Python of its own, without this one's Ray, prints last."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", *WORKER_ENVIRONMENT)
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_workers_have_the_environment_that_is_meant_for_them_with_tls_too(tmp_path: Path) -> None:
    tls = certificate(tmp_path, f"IP:127.0.0.1,IP:{ray.util.get_node_ip_address()}")
    environment = last_line(ENVIRONMENT, **tls)
    assert environment.items() >= (WORKER_ENVIRONMENT | tls).items()
    assert "hangs up" in environment["REFUSED"], "Ray answers without TLS"


def test_with_it_a_thread_that_trains_keeps_the_memory_of_a_step_for_the_next() -> None:
    # On small pages, each of which is a fault when it is new.
    faults = last_line(FAULTS, **WORKER_ENVIRONMENT | {"THP_MEM_ALLOC_ENABLE": "0"})["faults"]
    assert faults[0] > 10_000, "the first step's arrays are new memory"
    assert statistics.median(faults[4:]) < 100, "later steps, too, take new memory from the kernel"


def test_with_it_large_tensors_lie_on_large_pages_which_are_kept_likewise() -> None:
    found = last_line(FAULTS, **WORKER_ENVIRONMENT)
    assert statistics.median(found["faults"][4:]) < 100, (
        "later steps, too, take new memory from the kernel"
    )
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert found["huge_kilobytes"] > 10_000, "the arrays of a step lie on small pages"


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_do_not_fit_are_refused_also_where_ray_is_connected_already() -> None:
    connect(ClusterOptions(), StorageOptions())
    for workers in (
        ClusterOptions(num_workers=99),
        ClusterOptions(num_workers=[99, 100]),
        ClusterOptions(cpus_per_worker=99),
    ):
        with pytest.raises(
            UserError,
            match=r"^cluster\.num_workers=\d+ workers of \d+ CPU each do not fit",
        ):
            connect(workers, StorageOptions())
    connect(ClusterOptions(num_workers=[1, 99]), StorageOptions())


@pytest.mark.usefixtures("ray_cluster")
def test_another_s3_server_is_refused_where_ray_is_connected_already() -> None:
    connect(ClusterOptions(), StorageOptions())
    here = os.environ["AWS_ENDPOINT_URL"]
    connect(ClusterOptions(), StorageOptions(endpoint_url=here))
    with pytest.raises(
        UserError,
        match=rf"its workers have AWS_ENDPOINT_URL={here}, not storage\.endpoint_url=http://",
    ):
        connect(ClusterOptions(), StorageOptions(endpoint_url="http://127.0.0.1:1"))
    assert os.environ["AWS_ENDPOINT_URL"] == here


@pytest.mark.usefixtures("ray_cluster")
def test_a_user_who_has_connected_gets_the_same_settings_for_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect(ClusterOptions(), StorageOptions())
    monkeypatch.delenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", raising=False)
    connect(ClusterOptions(), StorageOptions())
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "30"


FAILING = """
import time
from pipeline.cluster import connect, in_tasks
from pipeline.commands import load
from pipeline.errors import UserError

def fail(number):
    time.sleep(1)
    raise UserError(f"task {number} cannot read its file")

config = load("train", ["cluster.address=auto"])
connect(config.cluster, config.storage)
try:
    list(in_tasks(fail, [(number,) for number in range(20)]))
except UserError as error:
    print(error)
import gc; gc.collect(); time.sleep(2)
"""


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_fail_together_give_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], env=os.environ, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("task ")
    assert "cannot read its file" not in done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_whose_process_dies_gives_a_sentence() -> None:
    connect(ClusterOptions(), StorageOptions())
    with pytest.raises(UserError, match=r"^a task was lost \(.*run the command again$"):
        list(in_tasks(lambda: os.kill(os.getpid(), 9), [()]))


class Web(http.server.BaseHTTPRequestHandler):
    """A server of HTTP/1, as Ray's dashboard is."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["refused", "silent", "web"])
def test_an_address_where_no_cluster_answers_ends_in_a_sentence_soon(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.ANSWER_SECONDS", 1.0)
    reasons = {"refused": "Connection refused", "silent": "no answer", "web": "another server"}
    with socket.socket() as taken, serving(http.server.HTTPServer(("127.0.0.1", 0), Web)) as web:
        taken.bind(("127.0.0.1", 0))
        if kind == "silent":
            taken.listen()
        port = web.server_port if kind == "web" else taken.getsockname()[1]
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{port}"
            with pytest.raises(
                UserError, match=f"^no Ray cluster answers at {address}: {reasons[kind]}"
            ):
                _check_answers(address)


DOCS = Path(__file__).parents[2] / "docs/cluster.md"


def certificate(folder: Path, names: str) -> dict[str, str]:
    """A certificate for ``names`` that the documented command makes, in Ray's variables."""
    shown = re.search(r"^openssl req .*?[^\\]$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    command = shlex.split(shown[0].replace("\\\n", " ").replace("~/.ray", str(folder)))
    place = next(index for index, word in enumerate(command) if word.startswith("subjectAltName="))
    command[place] = f"subjectAltName={names}"
    folder.mkdir(exist_ok=True)
    subprocess.run(command, check=True, capture_output=True)
    assert (folder / "tls.key").stat().st_mode & 0o077 == 0, "others can read the key"
    files = [str(folder / name) for name in ("tls.crt", "tls.key", "tls.crt")]
    return {"RAY_USE_TLS": "1"} | dict(zip(TLS_FILES, files, strict=True))


@contextmanager
def grpc_server(tls: dict[str, str] | None) -> Iterator[str]:
    """The address of a server of the library that Ray's servers are made with."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    if tls:
        certificate, key, authority = (Path(tls[name]).read_bytes() for name in TLS_FILES)
        port = server.add_secure_port(
            "127.0.0.1:0",
            grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True),
        )
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_cluster_is_reached_with_its_own_certificate_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = certificate(tmp_path / "ours", "IP:127.0.0.1")
    other = certificate(tmp_path / "other", "IP:127.0.0.1")
    elsewhere = certificate(tmp_path / "elsewhere", "IP:192.0.2.10")
    stranger = ours | {name: other[name] for name in TLS_FILES[:2]}  # whom nobody signed
    plain = {"RAY_USE_TLS": "0"}

    def check(server: dict[str, str] | None, client: dict[str, str]) -> None:
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        with grpc_server(server) as address:
            _check_answers(address, _tls())

    check(ours, ours)
    check(None, plain)
    for server, client, reason in (
        (ours, plain, "hangs up; RAY_USE_TLS and its certificates must be the cluster's"),
        (ours, stranger, "hangs up; RAY_USE_TLS and its certificates must be the cluster's"),
        (ours, other, "its certificate is not trusted"),
        (elsewhere, elsewhere, "not valid for '127.0.0.1'"),
        (None, ours, "does not use TLS"),
    ):
        with pytest.raises(UserError, match=reason):
            check(server, client)


@pytest.mark.parametrize("fault", ["unset", "missing", "another key", "no certificate"])
def test_a_missing_certificate_ends_in_a_sentence_before_ray_starts(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificate(tmp_path, "IP:127.0.0.1").items():
        monkeypatch.setenv(name, value)
    other = certificate(tmp_path / "other", "IP:127.0.0.1")
    if fault == "unset":
        monkeypatch.delenv("RAY_TLS_CA_CERT")
    elif fault == "missing":
        (tmp_path / "tls.key").unlink()
    elif fault == "another key":
        monkeypatch.setenv("RAY_TLS_SERVER_KEY", other["RAY_TLS_SERVER_KEY"])
    else:
        (tmp_path / "tls.crt").write_text("certificate")
    named = {"unset": "RAY_TLS_CA_CERT=", "missing": f"RAY_TLS_SERVER_KEY={tmp_path}/tls.key"}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"^RAY_USE_TLS is on, but ") as raised:
        connect(ClusterOptions(), StorageOptions())
    assert named.get(fault, "in PEM") in str(raised.value)
    assert "\n" not in str(raised.value)
