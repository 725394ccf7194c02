"""The cache is bounded, shared by processes and harmless when full; damaged samples are skipped."""

import hashlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.background import in_parallel
from pipeline.config.sections import DatasetOptions
from pipeline.data import DataSet, cache
from pipeline.data.cache import ShardCache, open_cache
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.reader import ReadOptions
from pipeline.data.records import Index
from pipeline.errors import DamagedData, UserError
from pipeline.storage.base import PARTIAL, Storage
from pipeline.storage.folder import FolderStorage
from tests.pipeline.conftest import write
from tests.pipeline.data import test_pixels

SIZE = 10_000


def shard(storage: Storage, number: int) -> tuple[str, int, str]:
    """A made-up shard: its key, size and sha256."""
    content = np.random.default_rng(number).bytes(SIZE)
    storage.write(f"{number}.tar", content)
    return f"{number}.tar", SIZE, hashlib.sha256(content).hexdigest()


def read(
    cache: ShardCache, storage: Storage, made: tuple[str, int, str], start: int, length: int
) -> bytes:
    return b"".join(cache.stream(storage, *made, start, length))


def files(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.startswith("lock-"))


def test_what_was_read_once_is_read_from_this_machine(storage: Storage, tmp_path: Path) -> None:
    cache, made = ShardCache(tmp_path / "cache", 10 * SIZE), shard(storage, 0)
    content = storage.read("0.tar")
    assert read(cache, storage, made, 100, 50) == content[100:150]
    assert files(cache) == [made[2]]
    storage.delete(["0.tar"])
    assert read(cache, storage, made, 9_000, 1_000) == content[9_000:]


def test_what_was_used_longest_ago_makes_way(tmp_path: Path) -> None:
    storage, cache = (
        FolderStorage(tmp_path / "storage"),
        ShardCache(tmp_path / "cache", 3 * SIZE + 1),
    )
    made = [shard(storage, number) for number in range(5)]
    for number in (0, 1, 2, 0, 3, 0, 4):
        read(cache, storage, made[number], 0, 1)
        time.sleep(0.01)  # file systems count time in ticks
    assert files(cache) == sorted(made[number][2] for number in (0, 3, 4))


def test_a_shard_larger_than_the_cache_and_a_full_disk_are_read_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FolderStorage(tmp_path / "storage")
    made, content = shard(storage, 0), storage.read("0.tar")
    small = ShardCache(tmp_path / "small", SIZE - 1)
    assert read(small, storage, made, 5, 10) == content[5:15]
    assert not small.folder.exists()
    full = ShardCache(Path("/dev/full/cache"), 10 * SIZE)  # no folder can be made there
    assert read(full, storage, made, 5, 10) == content[5:15]
    assert "reading it from storage" in caplog.text

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert read(cache, storage, made, 5, 10) == content[5:15]
    assert "No space left on device" in caplog.text
    assert files(cache) == []


def test_a_shard_that_is_not_the_manifests_is_never_kept(storage: Storage, tmp_path: Path) -> None:
    cache, (key, size, sha256) = ShardCache(tmp_path / "cache", 10 * SIZE), shard(storage, 0)
    for content in (
        storage.read(key)[:-1],
        storage.read(key)[:-1] + b"?",
        storage.read(key) + b"?",
    ):
        storage.write(key, content)
        message = (
            rf"0\.tar is damaged: it has {len(content)} bytes and sha256 \w{{64}}, the manifest"
            rf" says 10000 bytes and {sha256}"
        )
        with pytest.raises(DamagedData, match=message):
            read(cache, storage, (key, size, sha256), 0, 10)
        assert files(cache) == []


def read_all(
    root: Path, folder: Path, made: list[tuple[str, int, str]], turns: int, seed: int
) -> None:
    """Read through the cache, as one of several processes.

    Exits with code 1 if it ever reads wrong bytes, or the cache grows too large.
    """
    storage, cache = FolderStorage(root), ShardCache(folder, 3 * SIZE)
    random = np.random.default_rng(seed)
    for _ in range(turns):
        key, size, sha256 = made[random.integers(len(made))]
        assert (
            hashlib.sha256(read(cache, storage, (key, size, sha256), 0, size)).hexdigest() == sha256
        )
        kept = [entry for entry in os.scandir(folder) if not entry.name.startswith("lock-")]
        assert len(kept) <= 3 + 1  # one may go and another come while we look


def test_many_processes_share_a_cache_and_one_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    storage, folder = FolderStorage(tmp_path / "storage"), tmp_path / "cache"
    made = [shard(storage, number) for number in range(6)]
    start = multiprocessing.get_context("fork").Process
    workers = [
        start(target=read_all, args=(storage.root, folder, made, 30, seed)) for seed in range(3)
    ]
    victim = start(target=read_all, args=(storage.root, folder, made, 10**6, 9))
    for process in [*workers, victim]:
        process.start()
    for process in workers:
        process.join(60)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    assert [process.exitcode for process in workers] == [0, 0, 0]
    (folder / f"{PARTIAL}{made[0][2]}").write_bytes(
        bytes(2 * SIZE)
    )  # and as if it had been killed in mid-fetch
    cache = ShardCache(folder, 3 * SIZE)
    for each in made:
        read(cache, storage, each, 0, 1)
    assert files(cache) == sorted(each[2] for each in made[-3:])


def test_threads_that_fetch_at_once_never_take_more_than_the_bound(tmp_path: Path) -> None:
    storage, cache = (
        FolderStorage(tmp_path / "storage"),
        ShardCache(tmp_path / "cache", int(1.5 * SIZE)),
    )
    made = [shard(storage, number) for number in range(3)]
    for _ in range(200):
        in_parallel(lambda each: read(cache, storage, each, 0, 100), made, 3, "reader")
        assert sum((cache.folder / name).stat().st_size for name in files(cache)) <= cache.max_bytes


def test_the_room_of_a_fetch_under_way_is_not_given_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, cache = (
        FolderStorage(tmp_path / "storage"),
        ShardCache(tmp_path / "cache", int(1.5 * SIZE)),
    )
    slow, other = shard(storage, 0), shard(storage, 1)
    cache.folder.mkdir()
    with cache._locked(slow[2]):
        (cache.folder / f"{PARTIAL}{slow[2]}").write_bytes(bytes(SIZE))
        if cache._lock_file(slow[2]) == cache._lock_file(other[2]):
            pytest.fail("choose other contents: these two share a lock")
        assert read(cache, storage, other, 0, 10) == storage.read("1.tar")[:10]
    assert "being fetched right now" in caplog.text
    assert files(cache) == [f"{PARTIAL}{slow[2]}"]


@pytest.mark.parametrize("written", [write, test_pixels.write])
def test_an_epoch_whose_data_is_on_this_machine_asks_the_storage_for_nothing(
    written: Callable[[Storage], DataSet], storage: Storage, tmp_path: Path
) -> None:
    """So that training outlasts an outage of the storage, validations included."""
    data, options = written(storage), ReadOptions(ShardCache(tmp_path / "cache", 10_000_000))

    def epoch() -> list[np.ndarray]:
        loader = EvalLoader(data, split="train", batch_size=9, options=options)
        return [batch.images.numpy() for batch in loader]

    first = epoch()
    storage.delete(storage.list(""))
    np.testing.assert_array_equal(np.concatenate(epoch()), np.concatenate(first))


def test_a_kept_index_that_was_damaged_is_read_again(tmp_path: Path) -> None:
    storage, cache = FolderStorage(tmp_path / "storage"), ShardCache(tmp_path / "cache", 10_000)
    some = write(storage).manifest.shards("train")[0]
    index = Index.load(storage, some, cache)
    kept = cache.folder / some.index_sha256
    intact = kept.read_bytes()
    kept.write_bytes(intact.replace(b"1", b"2"))
    assert Index.load(storage, some, cache).checksum == index.checksum
    assert kept.read_bytes() == intact


def test_the_configuration_names_a_cache(tmp_path: Path) -> None:
    assert open_cache(DatasetOptions(name="x")) is None
    assert open_cache(DatasetOptions(name="x", cache=str(tmp_path), cache_gb=0.5)) == ShardCache(
        tmp_path / "vlae-cache", 500_000_000
    )
    assert cache.NUM_LOCKS < 1000  # three digits in their names


def test_a_folder_that_can_hold_no_cache_is_refused_and_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "vlae-cache").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is for users other than root
    for folder, reason in (("file", "Not a directory"), ("taken", "Permission denied")):
        with pytest.raises(UserError) as refusal:
            open_cache(DatasetOptions(name="x", cache=str(tmp_path / folder)))
        assert str(refusal.value).startswith(f"dataset.cache={tmp_path / folder}: no files")
        assert f"({reason})" in str(refusal.value)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", no_space)
    assert open_cache(DatasetOptions(name="x", cache=str(tmp_path / "taken"))) is not None


# --- skipping -------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> DataSet:
    """The numbered images, with record 1 of shard 1 (samples 11 to 14) damaged, and shard 2 (sample
    19) missing.
    """
    storage = FolderStorage(tmp_path / "storage")
    data = write(storage)
    content = bytearray(storage.read("train/00001.tar"))
    content[3 * 512 + 4 * 512 + 100] ^= 1
    storage.write("train/00001.tar", bytes(content))
    storage.delete(["train/00002.tar"])
    return data


BAD = {11, 12, 13, 14, 19}


def test_skipping_is_off_unless_asked_for_and_has_a_bound(
    damaged: DataSet,
) -> None:
    for allowed, message in (
        (0, r"0000[12]\.tar"),
        (4, r"with it 5 samples cannot be read, and dataset\.max_skipped=4"),
    ):
        with pytest.raises(UserError, match=message):
            list(
                EvalLoader(
                    damaged, split="train", batch_size=8, options=ReadOptions(max_skipped=allowed)
                )
            )


def test_an_evaluation_leaves_out_what_it_skips_and_says_so(
    damaged: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    loader = EvalLoader(damaged, split="train", batch_size=8, options=ReadOptions(max_skipped=5))
    for _ in range(2):  # what was skipped before does not count again
        batches = list(loader)
        assert np.concatenate([batch.samples for batch in batches]).tolist() == [
            n for n in range(50) if n not in BAD
        ]
        for batch in batches:
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0].numpy(), batch.samples)
    assert loader.num_skipped == 5
    assert "skipped 4 samples" in caplog.text
    assert "at most 5): " in caplog.text


def test_training_replaces_what_it_skips_alike_on_any_number_of_ranks(
    damaged: DataSet,
) -> None:
    def epoch(rank: int, world_size: int, start_step: int = 0) -> list[list[int]]:
        loader = TrainLoader(
            damaged,
            seed=1,
            global_batch=8,
            num_streams=4,
            num_steps=12,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            group_bytes=24 * 4 * 18,
            options=ReadOptions(max_skipped=5),
        )
        found = []
        for batch in loader:
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0].numpy(), batch.samples)
            found.append(batch.samples.tolist())
        return found

    alone = epoch(0, 1)
    assert [len(samples) for samples in alone] == [8] * 12
    assert not BAD & {sample for samples in alone for sample in samples}
    for world_size in (2, 4):
        ranks = [epoch(rank, world_size) for rank in range(world_size)]
        assert [
            [sample for part in parts for sample in part] for parts in zip(*ranks, strict=True)
        ] == alone
    assert epoch(0, 1, start_step=5) == alone[5:]
