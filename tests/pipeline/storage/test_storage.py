"""Storage behaves the same in a folder and on S3, and reads survive a bad connection."""

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import open_storage, resume, s3
from pipeline.storage.base import PARTIAL, ObjectNotFound, Storage, atomic_file
from pipeline.storage.folder import FolderStorage
from pipeline.storage.server import ObjectStorageServer

# --- both kinds -----------------------------------------------------------------------------------


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("a/b.bin", b"first")
    storage.write("a/b.bin", b"second one")
    assert storage.read("a/b.bin") == b"second one"
    assert storage.read_range("a/b.bin", 7, 3) == b"one"
    assert storage.read_range("a/b.bin", 3, 0) == b""
    storage.write("empty", b"")
    assert storage.read("empty") == b""


def test_uploaded_files_are_downloaded_unchanged(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(os.urandom(9_000_001))  # large enough for a multipart upload
    storage.upload("big", source)
    storage.download("big", target)
    assert target.read_bytes() == source.read_bytes()


def test_json_is_read_as_written(storage: Storage) -> None:
    storage.write_json("value.json", {"a": [1, 2.5, None]})
    assert storage.read_json("value.json") == {"a": [1, 2.5, None]}
    storage.write("value.json", b"{")
    with pytest.raises(UserError, match=r"value\.json is damaged"):
        storage.read_json("value.json")


def test_list_gives_the_keys_below_a_folder_in_order(storage: Storage) -> None:
    for key in ("train/2", "train/10", "train/x/1", "training/3", "top"):
        storage.write(key, key.encode())
    assert storage.list() == ["top", "train/10", "train/2", "train/x/1", "training/3"]
    assert storage.list("train") == storage.list("train/") == ["train/10", "train/2", "train/x/1"]
    assert storage.sizes("training") == {"training/3": 10}
    assert storage.list("nothing") == []


def test_a_child_holds_the_objects_below_its_prefix(storage: Storage) -> None:
    child = storage.child("runs/one")
    child.write("result", b"1")
    assert storage.read("runs/one/result") == b"1"
    assert child.list() == ["result"]
    assert child.url == f"{storage.url}/runs/one"
    assert open_storage(child.url) == child


def test_exists_and_delete(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.write("a/c", b"2")
    assert storage.exists("a/b")
    assert not storage.exists("a")
    assert not storage.exists("a/d")
    storage.delete(["a/b", "never there"])
    assert storage.list() == ["a/c"]


def test_a_missing_object_is_named(storage: Storage, tmp_path: Path) -> None:
    for read in (
        lambda: storage.read("a/missing"),
        lambda: storage.read_range("a/missing", 0, 5),
        lambda: storage.download("a/missing", tmp_path / "target"),
    ):
        with pytest.raises(ObjectNotFound, match=f"{storage.url}/a/missing"):
            read()
    assert list(tmp_path.glob("target*")) == []


def test_a_range_beyond_the_end_is_an_error(storage: Storage) -> None:
    storage.write("short", b"0123456789")
    for start in (8, 20):
        with pytest.raises(
            UserError,
            match=(
                f"short is cut short: bytes {start} to {start + 5} were wanted, but it has only 10"
            ),
        ):
            storage.read_range("short", start, 5)


def test_a_storage_can_be_pickled(storage: Storage) -> None:
    storage.write("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"  # noqa: S301  (as Ray does)


def test_another_scheme_is_refused() -> None:
    with pytest.raises(
        UserError,
        match="cannot store anything at gs://bucket/x; use s3://BUCKET/PREFIX or a local folder",
    ):
        open_storage("gs://bucket/x")


# --- folders --------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_object(tmp_path: Path) -> None:
    folder = FolderStorage(tmp_path)
    folder.write("a", b"old")
    with atomic_file(tmp_path / "b") as file:
        file.write(b"ne")
        assert len(list(tmp_path.glob(f"{PARTIAL}*"))) == 1
        assert folder.list() == ["a"]
    folder.delete(["b"])
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as file:
        file.write(bytes([1 // 0]))
    assert folder.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_key_leads_out_of_the_folder(tmp_path: Path) -> None:
    for key in ("../secret", "a/../../secret", "/etc/passwd"):
        with pytest.raises(UserError, match="leads out"):
            FolderStorage(tmp_path).read(key)


def test_deleting_the_last_object_removes_its_folder(tmp_path: Path) -> None:
    folder = FolderStorage(tmp_path)
    folder.write("a/b/c", b"")
    folder.write("a/d", b"")
    folder.delete(["a/b/c"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "d"]


# --- S3 -------------------------------------------------------------------------------------------


def test_more_objects_than_one_page_are_listed_and_deleted(
    storage_server: ObjectStorageServer,
) -> None:
    storage = open_storage("s3://tests/pages")
    keys = [f"{number:04d}" for number in range(1005)]  # a page and a batch hold 1000
    for key in keys:
        storage.write(key, b"")
    assert storage.list() == keys
    storage.delete(keys)
    assert storage.list() == []


def test_a_missing_bucket_is_named(storage_server: ObjectStorageServer) -> None:
    storage = open_storage("s3://no-such-bucket/prefix")
    for use in (lambda: storage.read("a"), lambda: storage.write("a", b""), storage.list):
        with pytest.raises(
            UserError, match=f"no bucket 'no-such-bucket' at {storage_server.endpoint_url}"
        ):
            use()


def test_wrong_credentials_are_refused_with_what_to_do(
    storage_server: ObjectStorageServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3._client.cache_clear()
    storage = open_storage("s3://tests/x")
    for use in (
        lambda: storage.read("a"),
        lambda: storage.exists("a"),
        lambda: storage.upload("a", tmp_path / "file"),
    ):
        with pytest.raises(
            UserError, match=r"refused access to s3://tests/x/a .* set AWS_ACCESS_KEY_ID"
        ):
            use()
    s3._client.cache_clear()


def test_missing_credentials_are_named(storage_server: ObjectStorageServer) -> None:
    code = "from pipeline.storage import open_storage; open_storage('s3://tests/x').read('a')"
    hidden = {
        "HOME": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert "UserError: no credentials for s3://tests/x/a" in done.stderr


def test_an_endpoint_that_does_not_answer_is_named(storage_server: ObjectStorageServer) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot reach {endpoint} for s3://tests/x/a"):
            open_storage("s3://tests/x", endpoint).read("a")


# --- a bad connection -----------------------------------------------------------------------------


class BadConnection:
    """A relay on loopback in front of the real server, which breaks connections.

    ``limits`` has one number of bytes for each connection; later connections have no limit. When a
    limit is reached, ``at_limit`` is called, and the connection is cut or, with ``stall``, left
    open without sending anything.
    """

    def __init__(
        self,
        port: int,
        limits: list[int],
        at_limit: Callable[[], object] = lambda: None,
        stall: bool = False,
    ) -> None:
        self.requests: list[str] = []
        self._port, self._limits, self._at_limit, self._stall = port, limits, at_limit, stall
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        for opened in self._open:
            opened.close()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                limit = self._limits.pop(0) if self._limits else None
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                threading.Thread(target=self._upward, args=(client, server), daemon=True).start()
                threading.Thread(
                    target=self._downward, args=(server, client, limit), daemon=True
                ).start()
        except OSError:
            return  # closed

    def _upward(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                self.requests.append(data.decode(errors="replace"))
                server.sendall(data)
        except OSError:
            return

    def _downward(self, server: socket.socket, client: socket.socket, limit: int | None) -> None:
        try:
            while data := server.recv(65536):
                if limit is not None and len(data) >= limit:
                    client.sendall(data[:limit])
                    self._at_limit()
                    if not self._stall:
                        client.shutdown(socket.SHUT_RDWR)
                    return
                limit = None if limit is None else limit - len(data)
                client.sendall(data)
        except OSError:
            return


@pytest.fixture
def content(storage_server: ObjectStorageServer) -> bytes:
    """The content of the object ``big`` in ``s3://tests/bad``."""
    content = os.urandom(1_000_000)
    open_storage("s3://tests/bad").write("big", content)
    return content


def test_a_cut_body_resumes_at_the_byte_reached(
    storage_server: ObjectStorageServer, content: bytes
) -> None:
    with closing(BadConnection(storage_server.port, [300_000, 200_000, 1_000])) as bad:
        assert open_storage("s3://tests/bad", bad.url).read("big") == content
        assert len(bad.requests) == 4
        ranges = [
            line
            for request in bad.requests
            for line in request.splitlines()
            if line.lower().startswith("range:")
        ]
        starts = [int(line.partition("=")[2].partition("-")[0]) for line in ranges]
        assert len(starts) == 3  # the first request asks for the whole object
        assert 200_000 < starts[0] < 300_000
        assert 350_000 < starts[1] < 500_000
        assert starts[2] >= starts[1]
        assert all("if-match:" in request.lower() for request in bad.requests[1:])


def test_a_cut_range_resumes_at_the_byte_reached(
    storage_server: ObjectStorageServer, content: bytes, tmp_path: Path
) -> None:
    with closing(BadConnection(storage_server.port, [150_000])) as bad:
        assert (
            open_storage("s3://tests/bad", bad.url).read_range("big", 100_001, 500_000)
            == content[100_001:600_001]
        )
    with closing(BadConnection(storage_server.port, [150_000])) as bad:
        open_storage("s3://tests/bad", bad.url).download("big", tmp_path / "big")
        assert (tmp_path / "big").read_bytes() == content


def test_a_stalled_body_resumes(
    storage_server: ObjectStorageServer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "READ_TIMEOUT", 0.5)
    with closing(BadConnection(storage_server.port, [300_000], stall=True)) as bad:
        assert open_storage("s3://tests/bad", bad.url).read("big") == content


def test_an_object_replaced_during_a_read_is_an_error(
    storage_server: ObjectStorageServer, content: bytes
) -> None:
    def replace() -> None:
        open_storage("s3://tests/bad").write("big", content[::-1])

    with (
        closing(BadConnection(storage_server.port, [300_000], at_limit=replace)) as bad,
        pytest.raises(UserError, match="s3://tests/bad/big was replaced while it was being read"),
    ):
        open_storage("s3://tests/bad", bad.url).read("big")


def test_requests_are_repeated_while_their_answers_are_lost(
    storage_server: ObjectStorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "BACKOFF", 0.01)
    (tmp_path / "file").write_bytes(b"uploaded")
    kept = open_storage("s3://tests/lost")
    kept.write("old/a", b"1")
    requests: dict[str, Callable[[Storage], object]] = {
        "list": lambda storage: storage.list("old"),
        "exists": lambda storage: storage.exists("old/a"),
        "write": lambda storage: storage.write("new/a", b"2"),
        "create": lambda storage: storage.create("new/b", b"3"),  # by the attempt that seems lost
        "upload": lambda storage: storage.upload("new/c", tmp_path / "file"),
        "delete": lambda storage: storage.delete(["old/a"]),
    }
    answers = {}
    for name, request in requests.items():
        with closing(BadConnection(storage_server.port, [30] * 4)) as bad:
            answers[name] = request(open_storage("s3://tests/lost", bad.url))
    assert answers["list"] == ["old/a"]
    assert answers["exists"] is answers["create"] is True
    assert {key: kept.read(key) for key in kept.list()} == {
        "new/a": b"2",
        "new/b": b"3",
        "new/c": b"uploaded",
    }


def test_what_arrives_altered_is_read_for_a_while_before_it_is_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = list[float]()
    monkeypatch.setattr(resume.time, "sleep", pauses.append)
    monkeypatch.setattr(resume, "_has_damage", False)
    assert next(resume.rereads(True)) == 1
    assert list(resume.rereads(False)) == [1, 2], "a disk does not alter for a while"
    assert not pauses
    resume._has_damage = False
    assert len(list(resume.rereads(True))) == 8
    assert 10 < sum(pauses) < 30
    assert len(list(resume.rereads(True))) == 2, "once something is damaged"


def test_a_connection_that_always_breaks_is_an_error(
    storage_server: ObjectStorageServer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "ATTEMPTS", 3)
    with (
        closing(BadConnection(storage_server.port, [1_000] * 20)) as bad,
        pytest.raises(
            UserError,
            match=(
                r"reading s3://tests/bad/big broke off at byte [0-9]+ of 1000000, 3 times in a row"
            ),
        ),
    ):
        open_storage("s3://tests/bad", bad.url).read("big")
