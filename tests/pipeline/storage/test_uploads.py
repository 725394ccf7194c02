"""Uploads run in the background, in order, through an outage of the real server.

An error that is not temporary is raised as it is.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import open_storage, resume, uploads
from pipeline.storage.base import Unavailable
from pipeline.storage.server import ObjectStorageServer
from pipeline.storage.uploads import UploadQueue, retry


@pytest.fixture
def short_outage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(uploads, "MAX_OUTAGE", 1.0)
    monkeypatch.setattr(uploads, "MAX_PAUSE", 0.1)
    return


def fail() -> None:
    raise Unavailable("the storage is unavailable")


def test_writes_run_in_order_and_a_newer_one_replaces_a_waiting_one_of_its_name() -> None:
    begun, proceed, done = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        begun.set()
        proceed.wait()
        done.append("first")

    with UploadQueue() as uploads:
        uploads.submit("a", first)
        begun.wait()
        uploads.submit("b", lambda: done.append("b, old"))
        uploads.submit("a", lambda: done.append("second"))
        uploads.submit("b", lambda: done.append("b, new"))
        assert uploads.is_pending("a")
        assert uploads.is_pending("b")
        assert not uploads.is_pending("c")
        proceed.set()
        uploads.join()
        assert not uploads.is_pending("a")
    assert done == ["first", "b, new", "second"]


@pytest.mark.usefixtures("short_outage")
def test_writes_are_retried_through_an_outage_and_failures_are_counted() -> None:
    attempts = list[int]()

    def work() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 4:
            fail()

    before = resume.failed
    with UploadQueue() as uploads:
        uploads.submit("a", work)
    assert resume.failed - before == 3


@pytest.mark.usefixtures("short_outage")
def test_an_endless_outage_raises_in_the_thread_that_submits() -> None:
    def train() -> None:
        with UploadQueue() as uploads:
            uploads.submit("a", fail)
            for _ in range(100):
                time.sleep(0.1)
                uploads.submit("b", lambda: None)
            raise AssertionError("no error was raised")

    with pytest.raises(Unavailable, match=r"the storage is unavailable; retried for"):
        train()
    with pytest.raises(Unavailable), UploadQueue() as uploads:
        uploads.submit("a", fail)


def test_an_error_that_is_not_temporary_is_not_retried() -> None:
    attempts = list[int]()

    def work() -> None:
        attempts.append(1)
        raise UserError("refused")

    with pytest.raises(UserError, match=r"^refused$"):
        retry(work)
    with pytest.raises(UserError, match=r"^refused$"), UploadQueue() as uploads:
        uploads.submit("a", work)
    assert len(attempts) == 2


def test_an_error_in_the_block_lets_pending_writes_finish() -> None:
    done = list[str]()

    def train() -> None:
        with UploadQueue() as uploads:
            uploads.submit("a", lambda: time.sleep(0.2))
            uploads.submit("b", lambda: done.append("b"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert done == ["b"]


@pytest.mark.parametrize("attempts", [1, resume.ATTEMPTS])
def test_an_object_is_written_when_the_server_is_back(
    attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the queue repeats the request or the storage itself, the failures are counted."""
    monkeypatch.setattr(resume, "ATTEMPTS", attempts)
    with ObjectStorageServer(tmp_path, "uploads") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        storage = open_storage("s3://uploads/run", server.endpoint_url)
        storage.write("before", b"1")
        port = server.port
    before = resume.failed
    with UploadQueue() as uploads:
        uploads.submit("a", lambda: storage.write("after", b"2"))
        while resume.failed == before:
            time.sleep(0.05)
        with ObjectStorageServer(tmp_path, "uploads", port):
            uploads.join()
            assert (storage.read("before"), storage.read("after")) == (b"1", b"2")
