"""Uploads go on in the background, in order, through an outage of the real server; what does not
pass ends in its own sentence.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import open_storage, uploads
from pipeline.storage.base import Unavailable
from pipeline.storage.server import ObjectStorageServer
from pipeline.storage.uploads import Uploads, patiently


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(uploads, "PATIENCE", 1.0)
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.1)
    return


def fail() -> None:
    raise Unavailable("the storage is away")


def test_work_is_done_in_order_and_what_waits_is_replaced_by_newer_work_of_its_name() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        begun.set()
        go_on.wait()
        done.append("first")

    with Uploads() as uploads:
        uploads.put("a", first)
        begun.wait()
        uploads.put("b", lambda: done.append("b, old"))
        uploads.put("a", lambda: done.append("second"))
        uploads.put("b", lambda: done.append("b, new"))
        assert uploads.is_busy("a")
        assert uploads.is_busy("b")
        assert not uploads.is_busy("c")
        go_on.set()
        uploads.wait()
        assert not uploads.is_busy("a")
    assert done == ["first", "b, new", "second"]


@pytest.mark.usefixtures("impatient")
def test_an_outage_is_outlasted_and_counted() -> None:
    attempts = list[int]()

    def work() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 4:
            fail()

    with Uploads() as uploads:
        uploads.put("a", work)
        uploads.wait()
        assert uploads.failures == 3


@pytest.mark.usefixtures("impatient")
def test_an_outage_without_end_is_an_error_for_whoever_goes_on() -> None:
    def train() -> None:
        with Uploads() as uploads:
            uploads.put("a", fail)
            for _ in range(100):
                time.sleep(0.1)
                uploads.put("b", lambda: None)
            raise AssertionError("nobody was told")

    with pytest.raises(Unavailable, match=r"the storage is away; this went on for"):
        train()
    with pytest.raises(Unavailable), Uploads() as uploads:
        uploads.put("a", fail)


def test_what_does_not_pass_is_not_tried_again() -> None:
    attempts = list[int]()

    def work() -> None:
        attempts.append(1)
        raise UserError("refused")

    with pytest.raises(UserError, match=r"^refused$"):
        patiently(work)
    with pytest.raises(UserError, match=r"^refused$"), Uploads() as uploads:
        uploads.put("a", work)
    assert len(attempts) == 2


def test_an_error_of_the_body_lets_work_finish_that_can() -> None:
    done = list[str]()

    def train() -> None:
        with Uploads() as uploads:
            uploads.put("a", lambda: time.sleep(0.2))
            uploads.put("b", lambda: done.append("b"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert done == ["b"]


def test_an_object_is_written_when_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.s3.WRITE_ATTEMPTS", 1)
    with ObjectStorageServer(tmp_path, "uploads") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        storage = open_storage("s3://uploads/run", server.endpoint_url)
        storage.write("before", b"1")
        port = server.port
    with Uploads() as uploads:
        uploads.put("a", lambda: storage.write("after", b"2"))
        while not uploads.failures:
            time.sleep(0.05)
        with ObjectStorageServer(tmp_path, "uploads", port):
            uploads.wait()
            assert (storage.read("before"), storage.read("after")) == (b"1", b"2")
