"""Checkpoints restore a run bit for bit, from the newest valid one, and nothing is unpickled."""

import logging
import math
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor

import vlae
from pipeline.commands import load
from pipeline.config.options import to_dict
from pipeline.config.run import Algorithm
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.training import checkpoint, optimizer


class Training:
    """A VLAE trained on noise, with every part that a run's state can have."""

    def __init__(self, seed: int, algorithm: Algorithm = Algorithm.adam) -> None:
        torch.manual_seed(seed)
        config = load("train", ["model=tiny", "model.flow_hidden=16", f"optim={algorithm.value}"])
        self.model = vlae.build(image_shape=(1, 6, 5), **to_dict(config)["model"])
        self.weights = vlae.flatten(self.model)
        self.ema = vlae.EMA(self.model, 0.9)
        self.optimizer = optimizer.make(config.optim, self.weights, self.model.hidden_weights())
        self.guard, self.soft = optimizer.Guard(torch.device("cpu")), vlae.SoftFreeBits(3.0)
        self.parts: dict[str, checkpoint.Stateful] = {
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "guard": self.guard,
            "free_bits": self.soft,
        }
        self.step = 0

    def advance(self, storage: Storage, steps: int, keep: int = 100) -> None:
        """Take steps, each on its own noise, and save a checkpoint after each."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            x = torch.rand(4, 1, 6, 5, generator=generator).round()
            noise = torch.randn(4, self.model.latents, generator=generator)
            self.optimizer.zero_grad(set_to_none=False)
            bound = self.model(x, noise)
            (-bound.elbo.mean()).backward()
            bad = torch.tensor(math.nan if self.step == 1 else 0.0)
            self.guard.step(self.optimizer, bad)
            self.soft.update(bound.rate.mean().detach())
            self.step += 1
            self.ema.update(self.weights, self.step)
            checkpoint.save(storage, self.step, checkpoint.snapshot(self.parts), keep)

    def resume(self, storage: Storage) -> int:
        self.step = checkpoint.resume(storage, self.parts)
        return self.step

    def state(self) -> dict[str, Tensor]:
        state = {
            f"{part} {name}": value
            for part, each in self.parts.items()
            if part != "optimizer"
            for name, value in each.state_dict().items()
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer {index} {name}": value for name, value in values.items()}
        return {name: value.clone() for name, value in state.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def newest(storage: Storage, number: int = 0) -> str:
    return sorted(storage.list("checkpoints/"), reverse=True)[number]


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_whole_state_is_restored_bit_for_bit(storage: Storage, algorithm: Algorithm) -> None:
    whole, resumed = Training(0, algorithm), Training(1, algorithm)
    whole.advance(storage, 3)
    assert resumed.resume(storage) == 3
    assert_same(resumed.state(), whole.state())
    assert any(
        name.startswith("optimizer") and value.any() for name, value in resumed.state().items()
    )
    assert resumed.guard.read() == (1, 0)
    assert resumed.soft.steps == 3
    whole.advance(storage, 2)
    resumed.advance(storage, 2)
    assert_same(resumed.state(), whole.state())


def test_without_a_checkpoint_a_run_starts_at_step_0(storage: Storage) -> None:
    assert Training(0).resume(storage) == 0


def test_only_the_newest_checkpoints_are_kept(storage: Storage) -> None:
    Training(0).advance(storage, 5, keep=2)
    assert [int(key.split("/")[1][:10]) for key in storage.list("checkpoints/")] == [4, 5]


def test_the_same_state_makes_the_same_object(storage: Storage) -> None:
    training = Training(0)
    training.advance(storage, 3, keep=2)
    before = storage.sizes()
    checkpoint.save(storage, 3, checkpoint.snapshot(training.parts), 2)
    assert storage.sizes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_not_saved(storage: Storage, value: float) -> None:
    training = Training(0)
    training.advance(storage, 2)
    before = storage.sizes()
    with torch.no_grad():
        training.model.decoder.get_parameter(
            next(name for name, _ in training.model.decoder.named_parameters())
        ).fill_(value)
    with pytest.raises(
        UserError,
        match=r"model/decoder\S+ is not finite after step 3.*; lower optim\.learning_rate$",
    ):
        checkpoint.save(storage, 3, checkpoint.snapshot(training.parts), 2)
    assert storage.sizes() == before


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:100] + b"?" + data[101:], lambda data: b""],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    storage: Storage, damage: Callable[[bytes], bytes]
) -> None:
    Training(0).advance(storage, 2)
    storage.write(newest(storage), damage(storage.read(newest(storage))))
    assert Training(1).resume(storage) == 1


def test_damaged_checkpoints_are_skipped_until_one_is_valid(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    training, other = Training(0), Training(1)
    training.advance(storage, 1)
    first = training.state()
    training.advance(storage, 3)
    content = storage.read(newest(storage))
    storage.write(newest(storage), content[: len(content) // 2])
    storage.write(newest(storage, 1), b"")
    storage.write(newest(storage, 2), content)  # a whole checkpoint, but of another step
    with caplog.at_level(logging.WARNING):
        assert other.resume(storage) == 1
    assert_same(other.state(), first)
    warned = [
        record.getMessage()
        for record in caplog.records
        if record.name == "pipeline.training.checkpoint"
    ]
    assert len(warned) == 3
    for number, sentence in enumerate(warned):
        assert f"{storage.url}/{newest(storage, number)} is damaged" in sentence


@pytest.mark.parametrize("byte", [0, 8, -1], ids=["length", "header", "last weight"])
def test_one_flipped_bit_anywhere_is_detected(storage: Storage, byte: int) -> None:
    training = Training(0)
    training.advance(storage, 2)
    content = bytearray(storage.read(newest(storage)))
    content[byte] ^= 1
    storage.write(newest(storage), bytes(content))
    assert Training(1).resume(storage) == 1


def test_if_all_are_damaged_the_run_starts_over_and_its_state_is_unchanged(
    storage: Storage,
) -> None:
    training, other = Training(0), Training(1)
    training.advance(storage, 2)
    before = other.state()
    for key in storage.list("checkpoints/"):
        storage.write(key, storage.read(key)[:-1])
    assert other.resume(storage) == 0
    assert_same(other.state(), before)


def test_after_damage_the_checkpoint_just_written_is_kept(storage: Storage) -> None:
    training = Training(0)
    training.advance(storage, 3)
    for key in storage.list("checkpoints/")[1:]:
        storage.write(key, b"")
    resumed = Training(1)
    assert resumed.resume(storage) == 1
    resumed.advance(storage, 1, keep=1)
    assert Training(2).resume(storage) == 2


def test_a_checkpoint_of_an_optimizer_of_other_tensors_is_refused_by_name(storage: Storage) -> None:
    before, after = Training(0), Training(0)
    before.optimizer = torch.optim.Adam(
        before.model.parameters(), fused=True
    )  # with a state for each weight
    before.parts["optimizer"] = before.optimizer
    before.advance(storage, 1)
    [key] = storage.list("checkpoints/")
    with pytest.raises(
        UserError,
        match=(
            rf"^cannot resume from checkpoint {re.escape(storage.url)}/{key}: an earlier"
            r" version"
        ),
    ):
        after.resume(storage)


def test_other_objects_are_neither_read_nor_deleted(storage: Storage) -> None:
    foreign = [
        "checkpoints/notes.txt",
        "checkpoints/9999999999.safetensors",
        f"checkpoints/9999999999-{'0' * 64}.safetensors.bak",
        f"checkpoints/old/9999999999-{'0' * 64}.safetensors",
        f"checkpoints/99999-{'0' * 64}.safetensors",
        "checkpoints2/notes",
    ]
    for key in foreign:
        storage.write(key, b"not ours")
    training, other = Training(0), Training(1)
    training.advance(storage, 4, keep=1)
    assert other.resume(storage) == 4
    for key in foreign:
        assert storage.read(key) == b"not ours"
    assert len(storage.list()) == len(foreign) + 1


# --- pickles --------------------------------------------------------------------------------------

_FOUND: list[tuple[int, str]] = []
_HOOKED: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _FOUND.append((threading.get_ident(), ".".join(map(str, arguments))))


@contextmanager
def unpickled() -> Iterator[list[str]]:
    """Names of what this thread unpickles in the block.

    An audit hook cannot be removed, so all tests share one.
    """
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    names: list[str] = []
    before = len(_FOUND)
    yield names
    names += [name for thread, name in _FOUND[before:] if thread == threading.get_ident()]


def test_nothing_is_unpickled(storage: Storage) -> None:
    with unpickled() as names:
        pickle.loads(pickle.dumps(PurePosixPath("x")))  # noqa: S301  (to see that the hook sees it)
    assert names == ["pathlib.PurePosixPath"]
    training = Training(0)
    with unpickled() as names:
        training.advance(storage, 1)
        assert Training(1).resume(storage) == 1
    assert names == []
