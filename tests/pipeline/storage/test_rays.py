"""Ray's own records reach a server that is slow to answer, or away for a while."""

import pickle
import socket
import socketserver
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.storage import open_storage
from pipeline.storage.rays import ray_storage
from pipeline.storage.server import ObjectStorageServer
from tests.servers import serving

SILENCE = 7.0
"""Seconds; Arrow alone gives up after three, in each of its attempts."""


class Late(socketserver.BaseRequestHandler):
    """Passes a connection on; the first answer of each comes late."""

    port: ClassVar[int]
    silence: ClassVar[float] = SILENCE

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            threading.Thread(target=self.answer, args=(server,), daemon=True).start()
            while data := self.request.recv(1 << 16):
                server.sendall(data)

    def answer(self, server: socket.socket) -> None:
        data = server.recv(1 << 16)
        time.sleep(self.silence)
        while data:
            self.request.sendall(data)
            data = server.recv(1 << 16)


class Away(Late):
    """Hangs up on four requests, one more than Arrow alone makes."""

    silence: ClassVar[float] = 0.0
    refused: ClassVar[list[bytes]]

    def handle(self) -> None:
        if len(self.refused) < 4:
            self.refused.append(self.request.recv(1 << 16))
        else:
            super().handle()


@pytest.mark.parametrize("bad", [Late, Away])
def test_a_bad_server_gets_what_ray_writes(
    bad: type[Late], storage_server: ObjectStorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Handler", (bad,), {"port": storage_server.port, "refused": []})
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)) as relay:
        relay.daemon_threads = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.server_address[1]}")
        arguments = ray_storage("s3://tests/late")
        pickled = pickle.dumps(arguments["storage_filesystem"])  # which workers get
        path = f"{arguments['storage_path']}/search/tuner.pkl"
        with pickle.loads(pickled).open_output_stream(path) as file:  # noqa: S301
            file.write(b"state")
    kept = open_storage("s3://tests/late", f"http://127.0.0.1:{storage_server.port}")
    assert kept.read("ray/search/tuner.pkl") == b"state"


def test_a_folder_needs_no_file_system_of_its_own(tmp_path: Path) -> None:
    assert ray_storage(str(tmp_path)) == {"storage_path": f"{tmp_path}/ray"}
