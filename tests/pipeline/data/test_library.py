"""``DataSet`` as a library: every image once, from any position, on any number of ranks."""

import copy
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.images import index
from pipeline.data import DataSet
from pipeline.data.loader import Batches, TrainLoader
from pipeline.data.order import default_streams
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from tests.pipeline.commands.test_index import config_for, put
from tests.pipeline.data.conftest import BATCH, STEPS, numbers


def drawn(batches: Batches) -> list[list[int]]:
    """The numbers of each batch of one pass; the labels must be theirs."""
    found = []
    for images, labels in batches:
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape[1:] == (3, 2, 3)
        assert labels.tolist() == [number % 10 for number in numbers(images)]
        found.append(numbers(images))
    return found


def test_a_loop_over_a_data_set_at_an_address_sees_every_image_once(numbered: DataSet) -> None:
    batches = DataSet.open(numbered.storage.url).batches(BATCH)
    first, second = drawn(batches), drawn(batches)
    assert len(batches) == STEPS == len(first) == len(second)
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [BATCH] * STEPS
        seen = Counter(number for batch in epoch for number in batch)
        assert len(seen) == 48
        assert set(seen.values()) == {1}
    assert first != second, "each epoch has another order"
    assert drawn(numbered.batches(BATCH, epochs=2)) == first + second
    assert drawn(numbered.batches(BATCH, seed=1)) != first


def test_a_loop_gives_the_batches_of_the_training_loader(local: DataSet) -> None:
    loader = TrainLoader(
        local, seed=3, global_batch=12, num_streams=12, num_steps=8, group_bytes=1000
    )
    expected = [numbers(batch.images) for batch in loader]
    assert drawn(local.batches(12, seed=3, epochs=2, group_bytes=1000)) == expected


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_stops_and_world_sizes_continue_exactly_once(
    local: DataSet, data: st.DataObject
) -> None:
    batch = data.draw(st.sampled_from([4, 6, 8, 12, 25]))
    streams = default_streams(batch)
    sizes = [size for size in range(1, streams + 1) if streams % size == 0]
    expected = drawn(local.batches(batch, epochs=2, seed=5))
    found: list[list[int]] = []
    state = None
    while len(found) < len(expected):
        world_size = data.draw(st.sampled_from(sizes))
        steps = data.draw(st.integers(1, len(expected) - len(found)))
        parts: list[list[list[int]]] = []
        states = []
        for rank in range(world_size):
            batches = local.batches(batch, epochs=2, seed=5, rank=rank, world_size=world_size)
            if state is not None:
                batches.load_state_dict(state)
            parts.append([numbers(images) for images, _ in islice(batches, steps)])
            states.append(batches.state_dict())
        assert all(each == states[0] for each in states)
        for step in zip(*parts, strict=True):
            assert {len(part) for part in step} == {batch // world_size}
            found.append([number for part in step for number in part])
        state = states[0]
    assert found == expected


def test_a_loop_that_was_left_early_goes_on_with_the_next_batch(local: DataSet) -> None:
    expected = drawn(local.batches(BATCH, epochs=2))
    batches, found = local.batches(BATCH), []
    for images, _ in batches:
        found.append(numbers(images))
        if len(found) == 4:
            break
    assert batches.state_dict()["step"] == 4
    rest = drawn(batches)
    assert len(rest) == STEPS - 4, "the pass ends where its epoch ends"
    assert found + rest + drawn(batches) == expected


def test_endless_batches_have_no_length(local: DataSet) -> None:
    batches = local.batches(BATCH, epochs=None)
    with pytest.raises(TypeError, match="epochs=None"):
        len(batches)
    expected = drawn(local.batches(BATCH, epochs=3))
    found = [numbers(images) for images, _ in islice(batches, 3 * STEPS)]
    assert found == expected


def test_batches_and_their_state_travel_between_processes(local: DataSet, tmp_path: Path) -> None:
    batches = local.batches(BATCH)
    next(iter(batches))
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = local.batches(BATCH)
    other.load_state_dict(state)
    assert drawn(copy.deepcopy(batches)) == drawn(other) == drawn(batches)


def test_every_image_of_a_split_comes_once_in_order(local: DataSet) -> None:
    for split, size in (("train", 50), ("valid", 9), ("test", 9)):
        for world_size in (1, 2, 3):
            found = []
            for rank in range(world_size):
                part = local.in_order(4, split=split, rank=rank, world_size=world_size)
                batches = [numbers(images) for images, _ in part]
                assert len(batches) == len(part)
                assert [numbers(images) for images, _ in part] == batches, "again from the start"
                found += [number for batch in batches for number in batch]
            assert found == list(range(size))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch": 0}, "batch=0 is impossible"),
        ({"batch": 8, "epochs": 0}, "epochs=0 is impossible"),
        ({"batch": 8, "streams": 3}, "batch=8 cannot be shared by streams=3; use a multiple of 3"),
        ({"batch": 51}, "batch of 51 is more than all 50 samples"),
        ({"batch": 8, "split": "vaild"}, "vaild"),
        ({"batch": 8, "rank": 0}, "give both"),
        ({"batch": 8, "rank": 2, "world_size": 2}, "do not name a rank"),
        ({"batch": 8, "rank": 0, "world_size": 3}, "3 ranks cannot share batch=8 equally.*a batch"
         " that is a multiple of 3"),
        ({"batch": 48, "rank": 0, "world_size": 48}, "or streams=48"),
    ],
)  # fmt: skip
def test_an_impossible_argument_is_refused_in_a_sentence(
    local: DataSet, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        local.batches(**arguments)


def test_a_state_of_another_order_is_refused(local: DataSet, tmp_path: Path) -> None:
    state = local.batches(BATCH, seed=1).state_dict()
    for changes, name in (
        ({}, "seed"),
        ({"seed": 1, "streams": 4}, "streams"),
        ({"seed": 1, "group_bytes": 100}, "group_bytes"),
        ({"seed": 1, "split": "valid"}, "split"),
    ):
        with pytest.raises(UserError, match=f"batches with {name}="):
            local.batches(BATCH, **changes).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this is no state"):
        local.batches(BATCH).load_state_dict({"step": 3})


def test_a_launched_process_without_its_group_is_refused(
    local: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for loader in (local.batches(BATCH), local.in_order(BATCH)):
        with pytest.raises(UserError, match=r"init_process_group\(\) first"):
            next(iter(loader))
    assert len(drawn(local.batches(BATCH, rank=0, world_size=1))) == STEPS


def test_an_address_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data set at .*vlae shard"):
        DataSet.open(str(tmp_path))


def test_the_library_needs_neither_ray_nor_hydra_nor_mlflow(local: DataSet) -> None:
    code = (
        "import sys; from pipeline.data import DataSet\n"
        "assert 'torch' not in sys.modules\n"
        f"assert len(list(DataSet.open({local.storage.url!r}).batches(8))) == 6\n"
        "print(sorted({'ray', 'hydra', 'mlflow', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("ray_cluster")
def test_other_peoples_tars_give_every_image_once_on_changing_ranks(storage: Storage) -> None:
    put(storage)
    config = config_for(storage, f"{storage.url}/shards")
    index.run(config)
    data = DataSet.open(str(config.dataset.url))
    expected = [numbers(images) for images, _ in data.batches(BATCH, epochs=2)]
    for epoch in (expected[:5], expected[5:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(40))
    found, state = list[list[int]](), data.batches(BATCH).state_dict()
    for world_size, steps in ((4, 3), (1, 4), (2, 3)):
        ranks = []
        for rank in range(world_size):
            batches = data.batches(BATCH, epochs=None, rank=rank, world_size=world_size)
            batches.load_state_dict(state)
            ranks.append([numbers(images) for images, _ in islice(batches, steps)])
        found += [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
        state = batches.state_dict()
    assert found == expected
