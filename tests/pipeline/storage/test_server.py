"""The embedded object storage server, started and stopped for real."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from boto3.session import Session

from pipeline.commands.start.serve_store import ServeStoreConfig, run
from pipeline.errors import UserError
from pipeline.storage import server
from pipeline.storage.server import ObjectStorageServer


def get(s3: ObjectStorageServer, key: str) -> bytes:
    return client(s3).get_object(Bucket=s3.bucket, Key=key)["Body"].read()


def client(s3: ObjectStorageServer) -> Any:
    environment = s3.environment()
    keys = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    return Session(*keys, region_name=environment["AWS_REGION"]).client(
        "s3", endpoint_url=s3.endpoint_url
    )


def wait_until_gone(folder: Path) -> None:
    """Wait until no server process uses ``folder``."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(path.read_bytes().decode(errors="replace"))
            except OSError:
                continue  # it has just ended
        if not any("mini" in command and f"-dir={folder}" in command for command in commands):
            return
        time.sleep(0.1)
    raise AssertionError(f"a server still runs on {folder}")


def test_data_and_credentials_outlast_the_server(tmp_path: Path) -> None:
    with ObjectStorageServer(tmp_path / "store", "images") as s3:
        client(s3).put_object(Bucket="images", Key="a/b", Body=b"kept")
        credentials = s3.environment()["AWS_SECRET_ACCESS_KEY"]
        with pytest.raises(UserError, match=r"already running on .*store; use it, or stop it"):
            ObjectStorageServer(tmp_path / "store", "images").__enter__()
        with pytest.raises(
            UserError, match=f"port {s3.port} on 127.0.0.1 cannot be used .* or port=0"
        ):
            ObjectStorageServer(tmp_path / "other", "images", s3.port).__enter__()
    wait_until_gone(tmp_path / "store")
    with ObjectStorageServer(tmp_path / "store", "images", s3.port) as again:
        assert (
            again.endpoint_url
            == again.environment()["AWS_ENDPOINT_URL"]
            == f"http://127.0.0.1:{s3.port}"
        )
        assert get(again, "a/b") == b"kept"
        assert again.environment()["AWS_SECRET_ACCESS_KEY"] == credentials


def test_two_servers_run_at_once_and_the_death_of_one_is_noticed(
    storage_server: ObjectStorageServer, tmp_path: Path
) -> None:
    with ObjectStorageServer(tmp_path, "tests") as other:
        client(storage_server).put_object(Bucket="tests", Key="who", Body=b"one")
        client(other).put_object(Bucket="tests", Key="who", Body=b"other")
        assert (get(storage_server, "who"), get(other, "who")) == (b"one", b"other")
        assert (
            storage_server.environment()["AWS_SECRET_ACCESS_KEY"]
            != other.environment()["AWS_SECRET_ACCESS_KEY"]
        )
        other._process.kill()
        other._process.wait()
        with pytest.raises(
            UserError,
            match=f"server ended with code -9: .* \\(see {tmp_path}/server.log\\)",
        ):
            other.check()


def test_it_is_for_this_machine_and_this_user_only(storage_server: ObjectStorageServer) -> None:
    for name in ("credentials.json", "env"):
        assert stat.S_IMODE((storage_server.folder / name).stat().st_mode) == 0o600
    ports = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    addresses = {
        address
        for address, port in (entry.split(":") for entry in ports)
        if int(port, 16) == storage_server.port
    }
    assert addresses == {"0100007F"}  # 127.0.0.1


def test_the_shell_file_holds_the_environment(storage_server: ObjectStorageServer) -> None:
    shown = subprocess.run(
        ["sh", "-c", '. "$0"; env', str(storage_server.env_file)],
        capture_output=True,
        text=True,
        check=True,
        env={},
    ).stdout.splitlines()
    assert {f"{name}={value}" for name, value in storage_server.environment().items()} <= set(shown)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the server wants a folder")
    with pytest.raises(UserError, match=f"cannot keep objects in {tmp_path}"):
        ObjectStorageServer(tmp_path, "images").__enter__()


def test_a_bad_bucket_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'My Bucket' is no name for a bucket"):
        ObjectStorageServer(tmp_path, "My Bucket")


def test_a_command_runs_with_the_environment_and_gives_its_exit_code(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.storage import open_storage; s = open_storage('s3://images/x');"
        " s.write('a', b'1'); sys.exit(7 if s.read('a') == b'1' else 1)"
    )
    words = [sys.executable, "-c", code]
    assert run(ServeStoreConfig(str(tmp_path), "images", 0, words)) == 7
    wait_until_gone(tmp_path)


def serve(folder: Path) -> "subprocess.Popen[str]":
    """A process that serves ``folder``; returns when it has printed the address."""
    code = (
        "import sys; from pipeline.commands.start.serve_store import ServeStoreConfig, run; "
        "sys.exit(run(ServeStoreConfig(folder=sys.argv[1], bucket='images', port=0)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(8)]
    assert "object storage server at http://127.0.0.1:" in lines[0]
    assert f"source {folder}/env" in lines[1]
    assert "export AWS_ACCESS_KEY_ID=" in lines[2]
    return process


def test_serving_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    wait_until_gone(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(tmp_path)


def test_a_port_that_another_process_takes_at_the_last_moment_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_ports, chosen = server._free_ports, list[list[int]]()
    with socket.create_server(("127.0.0.1", 0)) as other:

        def choose(wanted: int, count: int) -> list[int]:
            ports = free_ports(wanted, count)
            chosen.append(
                ports if chosen else [*ports[:5], other.getsockname()[1], *ports[6:]]
            )  # the admin part's
            return chosen[-1]

        monkeypatch.setattr(server, "_free_ports", choose)
        with ObjectStorageServer(tmp_path, "tests") as running:
            assert running.port == chosen[1][0]


def test_a_port_that_is_taken_while_the_server_starts_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, begun = server._binary(), tmp_path / "begun"
    late = tmp_path / "late"
    late.write_text(
        f'#!/bin/sh\n[ -e {begun} ] && exec {binary} "$@"\ntouch {begun}\n'
        "echo 'S3 API Server listener error: bind: address already in use' >&2\nexit 255\n"
    )
    late.chmod(0o755)
    monkeypatch.setattr(server, "_binary", lambda: str(late))
    with ObjectStorageServer(tmp_path / "objects", "tests") as running:
        assert begun.exists()
        running.check()
