"""``vlae serve-store``: run the embedded object storage server on this machine."""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.commands import Command
from pipeline.config.options import option
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.storage.server import ObjectStorageServer


@dataclass
class ServeStoreConfig:
    """Run an object storage server (S3) on this machine."""

    folder: str = option("folder of its data, log and credentials", "vlae-objects", path=True)
    bucket: str = option("its bucket, created at the start", "vlae")
    port: int = option("its port on loopback; 0 is any free port", 8333, at_least=0, below=1 << 16)
    command: list[str] = option("a command to run beside the server, usually given after --", [])


def run(config: ServeStoreConfig) -> int:
    """Run the server until Ctrl-C or SIGTERM, or until ``config.command`` ends.

    The command gets the server's environment. Returns the exit code: the command's, or 0.
    """
    from pipeline.storage.server import ObjectStorageServer

    with ObjectStorageServer(config.folder, config.bucket, config.port) as server:
        return _run_command(server, config.command) if config.command else _serve(server)


def _serve(server: "ObjectStorageServer") -> int:
    stopped = threading.Event()
    with _handlers({signal.SIGINT: stopped.set, signal.SIGTERM: stopped.set}):
        print(
            f"object storage server at {server.endpoint_url} with bucket {server.bucket}, data in"
            f" {server.folder}"
        )
        print(f"to use it: source {shlex.quote(str(server.env_file))}   (which runs:)")
        for name, value in server.environment().items():
            print(f"  export {name}={shlex.quote(value)}")
        print(f"then storage.root=s3://{server.bucket}/PREFIX; Ctrl-C stops it", flush=True)
        while not stopped.wait(0.5):
            server.check()
    print("object storage server stopped")
    return 0


def _run_command(server: "ObjectStorageServer", command: list[str]) -> int:
    try:
        process = subprocess.Popen(command, env=os.environ | server.environment())
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    # Ctrl-C reaches the command directly. The server must outlive the command's response to it.
    with _handlers({signal.SIGINT: lambda: None, signal.SIGTERM: process.terminate}):
        code = process.wait()
    return 128 - code if code < 0 else code


def _handlers(actions: dict[signal.Signals, Callable[[], object]]) -> ExitStack:
    """Signal handlers that are set for the length of a ``with`` block."""
    stack = ExitStack()
    for number, action in actions.items():
        stack.callback(
            signal.signal, number, signal.signal(number, lambda *_, action=action: action())
        )
    return stack


COMMAND = Command(
    ServeStoreConfig,
    run,
    lambda config, result: "",
    lambda config: config.folder,
    usage=(
        "vlae serve-store [key=value ...] [-- COMMAND ...]\n       with a COMMAND: run it with the"
        " server's address and credentials in its environment, then stop the server"
    ),
)
