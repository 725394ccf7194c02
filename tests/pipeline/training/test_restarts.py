"""A run is restarted after growing pauses while it progresses; a user's mistake ends it at once."""

import pickle
import threading
from pathlib import Path

import pytest

from pipeline.errors import DamagedData, UserError
from pipeline.runs import Run
from pipeline.storage import uploads
from pipeline.storage.base import Unavailable
from pipeline.storage.folder import FolderStorage
from pipeline.training import restarts
from pipeline.training.restarts import Restarts


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the pause before each restart."""
    waited: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", waited.append)
    return waited


def publish(storage: FolderStorage, step: int) -> None:
    storage.write(f"checkpoints/{step:010d}-{'0' * 64}.safetensors", b"")


def test_failures_in_a_row_without_a_new_checkpoint_end_a_run(
    tmp_path: Path, pauses: list[float]
) -> None:
    policy = Restarts("mine", FolderStorage(tmp_path), 3)
    for _ in range(3):
        policy.after_exception(None, {1: RuntimeError("out of luck"), 0: ValueError()})
    assert pauses == [0, 5, 10]
    with pytest.raises(
        UserError,
        match=r"^run mine failed 4 times in a row .* step 0; the last error: rank 1: out of luck$",
    ):
        policy.after_exception(None, {1: RuntimeError("long story\nout of luck")})


def test_a_run_that_progresses_is_restarted_without_limit(
    tmp_path: Path, pauses: list[float]
) -> None:
    policy = Restarts("mine", FolderStorage(tmp_path), 1)
    for number in range(20):
        publish(policy.storage, 10 + number // 2 * 10)
        if number % 2 == 0:
            policy.after_exception(None, {0: RuntimeError()})
    assert pauses == [0] * 10


def test_a_restart_in_an_outage_is_recorded_when_the_storage_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(FolderStorage):
        """Its writes succeed, but are not answered."""

        def write(self, key: str, data: bytes) -> None:
            super().write(key, data)
            if not is_back.is_set():
                tried.set()
                raise Unavailable("the storage does not answer")

    tried, is_back = threading.Event(), threading.Event()
    monkeypatch.setattr(uploads, "MAX_PAUSE", 0.1)
    policy = Restarts("mine", Away(tmp_path), 3)
    policy.record("first")
    assert tried.wait(10)
    policy.record("second")  # without waiting for the first
    is_back.set()
    policy.wait_until_written()
    assert [each["reason"] for each in Run(policy.storage).restarts()] == ["first", "second"]
    policy.storage = FolderStorage(tmp_path)
    pickle.dumps(policy)  # for the next controller


def test_a_users_mistake_ends_a_run_at_once(tmp_path: Path, pauses: list[float]) -> None:
    policy = Restarts("mine", FolderStorage(tmp_path), 3)
    mistake = DamagedData("this shard is damaged")
    with pytest.raises(DamagedData, match="this shard is damaged"):
        policy.after_exception(None, {0: RuntimeError("connection closed by peer"), 1: mistake})
    assert pauses == []
    policy.after_exception(None, {0: Unavailable("the storage does not answer")})
    assert pauses == [0], "storage comes back"
