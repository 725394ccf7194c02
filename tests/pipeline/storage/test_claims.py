"""One command at a time works on a run; one that died keeps no other from its work."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import commands
from pipeline.errors import UserError
from pipeline.storage import claims, open_storage
from pipeline.storage.base import Storage
from pipeline.storage.claims import CLAIM, claimed
from tests.pipeline import strokes

HOLDER = """
import pickle, sys, time
from pipeline.storage import claims
claims.BEAT_SECONDS = 0.2
with claims.claimed(pickle.load(sys.stdin.buffer), "run mine"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(claims, "LOST_SECONDS", 4.0)


@contextmanager
def holder(storage: Storage) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the claim."""

    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(pickle.dumps(storage))
    process.stdin.close()
    assert process.stdout.readline() == b"held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def seconds(storage: Storage) -> float:
    """How long it takes to take the claim."""
    began = time.monotonic()
    with claimed(storage, "run mine"):
        return time.monotonic() - began


def changed(storage: Storage, **fields: Any) -> None:
    storage.write_json(CLAIM, storage.read_json(CLAIM) | fields)


def test_what_another_process_works_on_is_refused_until_it_ends(storage: Storage) -> None:
    with holder(storage) as process:
        kept = storage.read_json(CLAIM)
        with pytest.raises(UserError) as raised, claimed(storage, "run mine"):
            pass
        assert str(raised.value) == (
            f"run mine is alive since {kept['since']}, in process {process.pid} on {kept['host']};"
            " stop that command, or wait for its end"
        )
        process.kill()
        process.wait()
        assert seconds(storage) < 3, "a process of this host that ended was waited for"
    assert not storage.list()


@pytest.mark.parametrize(
    ("command", "folder", "what", "options"),
    [
        ("train", "runs", "run", []),
        ("tune", "searches", "search", ["search.space.model.latents=[2,4]", "search.sampler=grid"]),
    ],
)
def test_a_command_for_a_run_or_search_that_is_alive_is_refused_and_writes_no_option(
    tmp_path: Path, command: str, folder: str, what: str, options: list[str]
) -> None:
    strokes.write(strokes.data_storage(str(tmp_path)))
    config = commands.load(
        command, [*strokes.TINY, f"storage.root={tmp_path}", "name=mine", *options]
    )
    storage = open_storage(f"{tmp_path}/{folder}/mine")
    with holder(storage), pytest.raises(UserError, match=f"^{what} mine is alive since 20"):
        commands.find(command).run(config)
    assert not storage.exists("config.json")


def test_a_process_on_a_host_that_died_is_waited_for_and_then_replaced(storage: Storage) -> None:
    with holder(storage) as process:
        process.kill()
        process.wait()
        changed(storage, host="another")
    assert seconds(storage) > 4
    assert seconds(storage) < 3


def test_who_was_taken_for_dead_neither_takes_the_claim_back_nor_deletes_it(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(storage) as process:
        process.send_signal(signal.SIGSTOP)
        with claimed(storage, "run mine"):
            mine = storage.read_json(CLAIM)["holder"]
            process.send_signal(signal.SIGCONT)
            time.sleep(1)
            assert storage.read_json(CLAIM)["holder"] == mine
            # A beat that found its own claim just before may write it once more.
            while storage.read_json(CLAIM)["holder"] != "other":
                changed(storage, holder="other")
                time.sleep(1)
        assert storage.read_json(CLAIM)["holder"] == "other"
    assert "another command works on run mine as well" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 200_000,
        b"{}",
        b'{"holder": 1, "since": 2, "host": 3, "process": "4", "beat": null}',
        json.dumps(
            {"holder": "a", "since": "\x1b[2J", "host": "b", "process": -1, "beat": 1}
        ).encode(),
    ],
    ids=["empty", "deep", "fields", "types", "signs"],
)
def test_a_damaged_claim_is_replaced(storage: Storage, content: bytes) -> None:
    storage.write(CLAIM, content)
    with claimed(storage, "run mine"):
        assert storage.read_json(CLAIM)["process"] == os.getpid()


def test_an_error_in_the_work_ends_the_claim(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), claimed(storage, "run mine"):
        raise ZeroDivisionError
    assert not storage.list()
