"""``vlae serve-store``: the embedded object storage server, on this machine."""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.options import option
from pipeline.errors import UserError
from pipeline.storage.server import ObjectStore


@dataclass
class ServeStoreConfig:
    """Run an S3 server on this machine."""

    folder: str = option("where its data is kept", "vlae-objects", path=True)
    bucket: str = option("a bucket that is made at the start", "vlae")
    port: int = option("its port on loopback; 0 takes a free one", 8333, at_least=0, below=1 << 16)
    command: list[str] = option("a command to run with the server, better written after --", [])


def run(config: ServeStoreConfig) -> int:
    """Run the server until Ctrl-C, or as long as ``config.command`` runs with the server's
    environment.

    Returns the exit code: the command's, or 0.
    """
    with ObjectStore(config.folder, config.bucket, config.port) as store:
        return _run_command(store, config.command) if config.command else _serve(store)


def _serve(store: ObjectStore) -> int:
    stopped = threading.Event()
    with _handlers({signal.SIGINT: stopped.set, signal.SIGTERM: stopped.set}):
        print(
            f"S3 server at {store.endpoint_url} with bucket {store.bucket}, data in {store.folder}"
        )
        print(f"to use it: source {shlex.quote(str(store.env_file))}   (that is:)")
        for name, value in store.environment().items():
            print(f"  export {name}={shlex.quote(value)}")
        print(f"then storage.root=s3://{store.bucket}/PREFIX; Ctrl-C stops the server", flush=True)
        while not stopped.wait(0.5):
            store.check()
    print("S3 server stopped")
    return 0


def _run_command(store: ObjectStore, command: list[str]) -> int:
    try:
        process = subprocess.Popen(command, env=os.environ | store.environment())
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    # Ctrl-C reaches the command by itself: the server must outlive what the command does about it.
    with _handlers({signal.SIGINT: lambda: None, signal.SIGTERM: process.terminate}):
        code = process.wait()
    return 128 - code if code < 0 else code


def _handlers(actions: dict[signal.Signals, Callable[[], object]]) -> ExitStack:
    """Signal handlers for the length of a ``with`` block."""
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
        " server's address and credentials in its environment, and stop with it"
    ),
)
