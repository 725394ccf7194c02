"""The loader gives every sample once, the same batches for any number of ranks and from any step,
and detects damage.
"""

import gc
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from pipeline import noise
from pipeline.background import one_ahead
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.batch import Batch, binarize
from pipeline.data.images import BadImage, array
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.records import Shard
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage
from tests.pipeline.conftest import write

GLOBAL_BATCH, NUM_STREAMS, IMAGE_BYTES = 8, 4, 18
STEPS_PER_EPOCH = 6
"""Of 50 samples."""


def train(data: DataSet, **changes: Any) -> list[Batch]:
    """All batches of a run: two epochs and a bit, groups of 3 batches."""
    arguments = {
        "seed": 1,
        "global_batch": GLOBAL_BATCH,
        "num_streams": NUM_STREAMS,
        "num_steps": 2 * STEPS_PER_EPOCH + 2,
        "group_bytes": 6 * NUM_STREAMS * IMAGE_BYTES,
    }
    return list(TrainLoader(data, **(arguments | changes)))


def check_content(batch: Batch) -> None:
    """The images and labels are those of the samples that the batch names."""
    numbers = torch.from_numpy(batch.samples)
    expected = (numbers[:, None] + torch.arange(18)) % 256
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    torch.testing.assert_close(batch.images, expected.to(torch.uint8).view(-1, 3, 2, 3))
    torch.testing.assert_close(batch.labels, numbers % 10)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.step == other.step
    for name in ("images", "labels", "samples", "positions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def joined(parts: list[Batch]) -> Batch:
    """A global batch from those of all ranks."""
    tensors = [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels")]
    arrays = [
        np.concatenate([getattr(part, name) for part in parts]) for name in ("samples", "positions")
    ]
    return Batch(parts[0].step, tensors[0], tensors[1], arrays[0], arrays[1])


def test_an_epoch_gives_every_sample_once_but_for_the_tail(numbered: DataSet) -> None:
    batches = train(numbered)
    assert [batch.step for batch in batches] == list(range(14))
    for batch in batches:
        check_content(batch)
        assert batch.positions.tolist() == list(range(batch.step * 8, batch.step * 8 + 8))
    orders = []
    for epoch in (0, 1):
        samples = np.concatenate(
            [b.samples for b in batches[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]]
        )
        assert len(samples) == len(set(samples)) == 48
        assert set(samples) <= set(range(50))
        orders.append(samples.tolist())
    assert orders[0] != orders[1]


def test_ranks_share_the_same_global_batches(numbered: DataSet) -> None:
    alone = train(numbered)
    for world_size in (2, 3, 4):
        ranks = [train(numbered, rank=rank, world_size=world_size) for rank in range(world_size)]
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert_equal(joined(parts), whole)


def test_resuming_at_any_step_gives_the_rest_of_the_run(tmp_path: Path) -> None:
    numbered = write(FolderStorage(tmp_path))
    for rank in (0, 1):
        whole = train(numbered, rank=rank, world_size=2)
        for start_step in range(len(whole) + 1):
            rest = train(numbered, rank=rank, world_size=2, start_step=start_step)
            for expected, got in zip(whole[start_step:], rest, strict=True):
                assert_equal(expected, got)


def test_resuming_reads_each_open_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = write(FolderStorage(tmp_path))
    ranges: list[str] = []
    stream = FolderStorage.stream

    def counted(
        self: FolderStorage, key: str, start: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        if key.endswith(".tar"):
            ranges.append(key)
        return stream(self, key, start, length)

    monkeypatch.setattr(FolderStorage, "stream", counted)
    assert (
        len(
            train(
                numbered,
                start_step=10,
                num_steps=11,
                num_streams=1,
                global_batch=4,
                group_bytes=10**6,
            )
        )
        == 1
    )
    # The group is the whole epoch of 48 samples in 5 shards; the circle may enter one of them in
    # the middle and end in it.
    assert len(ranges) <= 6
    assert len(set(ranges)) == 5


def test_evaluation_gives_every_sample_once_in_order(numbered: DataSet) -> None:
    for world_size in (1, 2, 3):
        loaders = [
            EvalLoader(numbered, split="train", batch_size=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches = [batch for loader in loaders for batch in loader]
        for batch in batches:
            check_content(batch)
            assert len(batch.samples) <= 4
        assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(50))
        assert sum(loader.num_samples for loader in loaders) == 50


def test_evaluation_of_the_first_so_many(numbered: DataSet) -> None:
    batches = list(EvalLoader(numbered, split="train", batch_size=8, num_images=11))
    assert [len(batch.images) for batch in batches] == [8, 3]
    assert (
        sum(
            len(b.images) for b in EvalLoader(numbered, split="valid", batch_size=8, num_images=100)
        )
        == 9
    )


def test_more_ranks_than_images_leave_some_without(numbered: DataSet) -> None:
    counts = [
        len(
            list(
                EvalLoader(
                    numbered,
                    split="valid",
                    batch_size=4,
                    rank=rank,
                    world_size=4,
                    num_images=2,
                )
            )
        )
        for rank in range(4)
    ]
    assert sorted(counts) == [0, 0, 1, 1]


def test_a_stock_reader_sees_the_same_images_in_the_same_order(tmp_path: Path) -> None:
    numbered = write(FolderStorage(tmp_path))
    urls = [str(tmp_path / shard.name) for shard in numbered.manifest.shards("train")]
    stock = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode()
        .to_tuple("images.npy", "labels.npy")
    )
    images, labels = (np.concatenate(column) for column in zip(*stock, strict=True))
    ours = list(EvalLoader(numbered, split="train", batch_size=8))
    np.testing.assert_array_equal(images, np.concatenate([batch.images for batch in ours]))
    np.testing.assert_array_equal(labels, np.concatenate([batch.labels for batch in ours]))


# --- damage ---------------------------------------------------------------------------------------


def damaged(numbered: DataSet) -> Shard:
    return numbered.manifest.shards("train")[3]


def test_an_altered_record_is_named(storage: Storage, numbered: DataSet) -> None:
    shard = damaged(numbered)
    content = bytearray(storage.read(shard.name))
    content[5000] ^= 1
    storage.write(shard.name, bytes(content))
    message = (
        rf"{storage.url}/train/00003\.tar is damaged: record 2 .* has checksum [0-9a-f]{{32}}, its"
        r" index says [0-9a-f]{32}"
    )
    with pytest.raises(UserError, match=message):
        train(numbered)
    with pytest.raises(UserError, match=message):
        list(EvalLoader(numbered, split="train", batch_size=8))


def test_a_truncated_shard_is_named_even_when_cut_between_members(
    storage: Storage, numbered: DataSet
) -> None:
    shard = damaged(numbered)
    storage.write(shard.name, storage.read(shard.name)[: 512 * 8])
    with pytest.raises(
        UserError,
        match=(
            r"train/00003\.tar is cut short: bytes [0-9]+ to [0-9]+ were wanted, but it has only"
            r" 4096"
        ),
    ):
        train(numbered)


def test_a_missing_shard_is_named(storage: Storage, numbered: DataSet) -> None:
    storage.delete([damaged(numbered).name])
    with pytest.raises(
        UserError,
        match=r"no .*/train/00003\.tar, though the manifest .* lists it \([0-9]+ bytes\); delete",
    ):
        train(numbered)


def test_nothing_is_unpickled() -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage, match="would have to be unpickled"):
        array(pickled.getvalue())


# --- misuse ---------------------------------------------------------------------------------------


def test_impossible_requests_are_refused_at_once(numbered: DataSet) -> None:
    with pytest.raises(UserError, match="5 ranks cannot share 4 streams"):
        train(numbered, world_size=5)
    with pytest.raises(
        UserError,
        match=(
            r"a global batch of 64 is more than all 50 samples; choose another train\.global_batch"
        ),
    ):
        train(numbered, global_batch=64)


# --- threads --------------------------------------------------------------------------------------


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_consumer_that_stops_early_leaves_no_thread(numbered: DataSet) -> None:
    loader = TrainLoader(
        numbered, seed=0, global_batch=8, num_streams=4, num_steps=10**9, group_bytes=1
    )
    for batch in loader:
        if batch.step == 20:
            break
    gc.collect()
    for thread in loader_threads():
        thread.join(5)
    assert loader_threads() == []


def test_one_ahead_makes_the_next_while_this_is_in_use_and_no_more() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    for number in one_ahead(items()):
        deadline = time.monotonic() + 5
        while len(made) < min(number + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(min(number + 2, 5)))
    assert list(one_ahead(iter(()))) == []


def test_an_error_in_the_background_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("shard 3")

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="shard 3"):
        next(ahead)


# --- binarization ---------------------------------------------------------------------------------


def grey_batch(value: int, samples: list[int], positions: list[int]) -> Batch:
    images = torch.full((len(samples), 1, 28, 28), value, dtype=torch.uint8)
    return Batch(
        0,
        images,
        torch.zeros(len(samples), dtype=torch.int64),
        np.array(samples),
        np.array(positions),
    )


def test_images_that_are_not_binarized_keep_their_values() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    batch = Batch(0, images, torch.zeros(1, dtype=torch.int64), np.array([0]), np.array([0]))
    x = binarize(batch, Binarization.none, seed=3)
    assert x.dtype == torch.float32
    assert torch.equal((x * 255).round().to(torch.uint8), images)


def test_a_pixel_is_white_with_the_probability_of_its_grey_value() -> None:
    for mode in (Binarization.dynamic, Binarization.static):
        for value in (0, 1, 100, 254, 255):
            x = binarize(grey_batch(value, list(range(400)), list(range(400))), mode, seed=3)
            assert x.dtype == torch.float32
            assert set(x.unique().tolist()) <= {0.0, 1.0}
            p = value / 255
            assert abs(x.mean().item() - p) <= 5 * np.sqrt(p * (1 - p) / x.numel())


def test_dynamic_draws_by_position_and_static_by_sample() -> None:
    first, second = grey_batch(128, [7, 8], [0, 1]), grey_batch(128, [8, 7], [2, 3])
    static = [
        binarize(batch, Binarization.static, seed) for batch, seed in ((first, 1), (second, 2))
    ]
    assert torch.equal(static[0], static[1].flip(0))
    dynamic = [binarize(batch, Binarization.dynamic, 1) for batch in (first, second)]
    assert not torch.equal(dynamic[0], dynamic[1].flip(0))
    assert torch.equal(dynamic[0], binarize(first, Binarization.dynamic, 1))
    assert not torch.equal(dynamic[0], binarize(first, Binarization.dynamic, 2))
    expected = noise.uniform((1, noise.Purpose.BINARIZATION), first.positions, 784) < 128 / 255
    np.testing.assert_array_equal(dynamic[0].flatten(1).numpy(), expected)
