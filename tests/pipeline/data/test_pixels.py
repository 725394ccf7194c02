"""Pixels of image files are decoded once on a machine, whatever happens to the cache."""

import hashlib
import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data import DataSet, images, tar
from pipeline.data.cache import ShardCache
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import ReadOptions
from pipeline.data.records import Index, Shard, checksum
from pipeline.errors import DamagedData
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage

SIZES = (40, 23, 17)
PIXEL_BYTES = 3 * 16 * 16


def jpeg(number: int) -> bytes:
    """A smooth picture, different for each number."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((64 + 8 * (number % 3), 64), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write(storage: Storage, **options: Any) -> DataSet:
    """Shards of JPEG files, as others write them, with their manifest."""
    shards, first = [], 0
    for count in SIZES:
        file = io.BytesIO()
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for number in range(first, first + count):
                writer.write({"__key__": f"{number:09d}", "jpg": jpeg(number), "txt": b"caption"})
        content = file.getvalue()
        found = [
            member
            for member in tar.members(io.BytesIO(content), len(content))
            if member.name.endswith("jpg")
        ]
        index = Index.to_bytes(
            [member.offset for member in found],
            [member.size for member in found],
            [checksum(member.content) for member in found],
            labels=list(range(first, first + count)),
        )
        name = f"train/{len(shards):05d}"
        storage.write(f"{name}.tar", content)
        storage.write(f"{name}.index.json", index)
        digests = [hashlib.sha256(each).hexdigest() for each in (content, index)]
        shards.append(
            Shard(f"{name}.tar", len(content), digests[0], count, f"{name}.index.json", digests[1])
        )
        first += count
    stated = {"fit": "crop", "encoding": "image", **options}
    shape = stated.pop("image_shape", (3, 16, 16))
    manifest = Manifest("photographs", shape, sum(SIZES), 1, {"train": tuple(shards)}, **stated)
    return DataSet(storage, manifest)


def epoch(data: DataSet, cache: ShardCache | None) -> tuple[np.ndarray, np.ndarray]:
    batches = list(EvalLoader(data, split="train", batch_size=9, options=ReadOptions(cache)))
    return (
        np.concatenate([batch.images.numpy() for batch in batches]),
        np.concatenate([batch.labels.numpy() for batch in batches]),
    )


def expected(size: tuple[int, int] = (16, 16), fit: images.Fit = "crop") -> np.ndarray:
    decoded = [images.decode(jpeg(number), 3, size, fit) for number in range(sum(SIZES))]
    return np.stack(decoded).transpose(0, 3, 1, 2)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return write(FolderStorage(tmp_path / "storage"))


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**6)


def pixel_files(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.pixels"))


def test_a_later_epoch_reads_no_shard(data: DataSet, cache: ShardCache) -> None:
    whole = epoch(data, None)
    np.testing.assert_array_equal(whole[0], expected())
    for _ in range(2):
        found = epoch(data, cache)
        np.testing.assert_array_equal(found[0], whole[0])
        np.testing.assert_array_equal(found[1], np.arange(sum(SIZES)))
        data.storage.delete([shard.name for shard in data.manifest.shards("train")])
    assert len(pixel_files(cache)) == len(SIZES)


def test_shuffled_parts_of_shards_fill_the_cache_bit_by_bit(
    data: DataSet, cache: ShardCache
) -> None:
    def batches(cache: ShardCache | None, rank: int) -> list[tuple[list[int], bytes]]:
        loader = TrainLoader(
            data,
            seed=3,
            global_batch=8,
            num_streams=4,
            num_steps=25,
            rank=rank,
            world_size=2,
            group_bytes=PIXEL_BYTES * 24,
            options=ReadOptions(cache),
        )
        return [(batch.samples.tolist(), batch.images.numpy().tobytes()) for batch in loader]

    for rank in (0, 1):
        assert batches(cache, rank) == batches(None, rank)


@pytest.mark.parametrize("damage", ["pixels", "checksums", "cut", "longer", "zeros"])
def test_damage_is_found_and_decoded_again(data: DataSet, cache: ShardCache, damage: str) -> None:
    first, _ = epoch(data, cache)
    path = pixel_files(cache)[0]
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "cut":
        del content[-5:]
    elif damage == "longer":
        content += b"?"
    elif damage == "zeros":
        content[: len(content) // 2] = bytes(len(content) // 2)
    else:
        content[-1000 if damage == "pixels" else 3] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(epoch(data, cache)[0], first)
    assert path.read_bytes() == whole


def test_damaged_files_are_not_kept_and_named(data: DataSet, cache: ShardCache) -> None:
    shard = data.manifest.shards("train")[1]
    whole = data.storage.read(shard.name)
    content = bytearray(whole)
    content[int(Index.load(data.storage, shard).offset[7]) + 300] ^= 1
    data.storage.write(shard.name, bytes(content))
    for _ in range(2):
        with pytest.raises(DamagedData, match=r"00001\.tar is damaged: record 7 "):
            epoch(data, cache)
    data.storage.write(shard.name, whole)
    np.testing.assert_array_equal(epoch(data, cache)[0], expected())


def test_other_ways_of_decoding_are_other_files(
    data: DataSet, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch(data, cache)
    sized = write(data.storage, image_shape=(3, 16, 24))
    np.testing.assert_array_equal(epoch(sized, cache)[0], expected((16, 24)))
    fitted = write(data.storage, fit="stretch")
    np.testing.assert_array_equal(epoch(fitted, cache)[0], expected(fit="stretch"))
    assert len(pixel_files(cache)) == 3 * len(SIZES)
    monkeypatch.setattr(images, "library", lambda: "another version")
    epoch(data, cache)
    assert len(pixel_files(cache)) == 4 * len(SIZES)


def test_pixels_that_do_not_all_fit_leave_the_cache_to_shards(
    data: DataSet, tmp_path: Path
) -> None:
    large = write(data.storage, image_shape=(3, 64, 64))
    cache = ShardCache(tmp_path / "cache", sum(SIZES) * 3 * 64 * 64)  # without checksums
    np.testing.assert_array_equal(epoch(large, cache)[0], expected((64, 64)))
    assert not pixel_files(cache)
    kept = {path.name for path in cache.folder.iterdir() if len(path.name) == 64}
    shards = large.manifest.shards("train")
    assert kept == {digest for shard in shards for digest in (shard.sha256, shard.index_sha256)}


def test_the_bound_holds_for_several_data_sets(data: DataSet, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", int(sum(SIZES) * (PIXEL_BYTES + 16) * 1.5))
    for fit in ("crop", "pad", "stretch", "crop"):
        epoch(write(data.storage, fit=fit), cache)
        assert sum(path.stat().st_size for path in pixel_files(cache)) <= cache.max_bytes
    np.testing.assert_array_equal(epoch(data, cache)[0], expected())


def read_often(data: DataSet, cache: ShardCache, whole: np.ndarray, seed: int) -> None:
    """Read parts through the cache, as one of several processes. Exits with 1 if one is wrong."""
    random = np.random.default_rng(seed)
    for _ in range(10):
        rank = int(random.integers(5))
        loader = EvalLoader(
            data, split="train", batch_size=4, rank=rank, world_size=5, options=ReadOptions(cache)
        )
        for batch in loader:
            np.testing.assert_array_equal(batch.images.numpy(), whole[batch.samples])
        if random.integers(3) == 0:
            for path in cache.folder.glob("*.pixels"):
                path.unlink(missing_ok=True)  # as if evicted by a third process


def test_processes_share_the_pixels_while_they_are_made_and_evicted(
    data: DataSet, cache: ShardCache
) -> None:
    start = multiprocessing.get_context("spawn").Process
    workers = [start(target=read_often, args=(data, cache, expected(), seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    np.testing.assert_array_equal(epoch(data, cache)[0], expected())


def test_a_full_disk_keeps_nothing_and_harms_nothing(
    data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(Path("/dev/full/cache"), 10**6)  # no folder can be made there
    np.testing.assert_array_equal(epoch(data, cache)[0], expected())
    assert "they will be decoded again" in caplog.text
