"""Checkpoints come back bit for bit, and damage is seen."""

import logging

import pytest
import torch
from torch import nn

import vlae
from pipeline import checkpoint
from pipeline.storage import Storage


class State:
    """A small model in training."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.ema = vlae.EMA(self.model, 0.9)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.step = 0

    def train(self) -> None:
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.model, self.step)

    def save(self, storage: Storage, keep: int = 2) -> None:
        checkpoint.save(storage, self.step, self.model, self.ema, self.optimizer, keep)

    def resume(self, storage: Storage) -> int:
        self.step = checkpoint.resume(storage, self.model, self.ema, self.optimizer)
        return self.step

    def tensors(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state_dict()["state"].values() for _, value in sorted(state.items())]
        return [*self.model.state_dict().values(), *self.ema.state_dict().values(), *moments]


def trained(storage: Storage, steps: int, keep: int = 2) -> State:
    state = State(0)
    for _ in range(steps):
        state.train()
        state.save(storage, keep)
    return state


def test_a_checkpoint_restores_weights_average_and_optimizer_bit_for_bit(storage: Storage) -> None:
    saved, restored = trained(storage, 3), State(1)
    assert restored.resume(storage) == 3
    assert all(torch.equal(a, b) for a, b in zip(saved.tensors(), restored.tensors(), strict=True))
    torch.manual_seed(5)
    saved.train()
    torch.manual_seed(5)
    restored.train()
    assert all(torch.equal(a, b) for a, b in zip(saved.tensors(), restored.tensors(), strict=True))


def test_without_a_checkpoint_a_run_starts_at_step_0(storage: Storage) -> None:
    assert State(0).resume(storage) == 0


def test_only_the_newest_are_kept(storage: Storage) -> None:
    trained(storage, 5, keep=2)
    assert [int(key.split("/")[1][:10]) for key in storage.list("checkpoints/")] == [4, 5]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:100] + b"?" + data[101:], lambda data: b""])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    storage: Storage, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    trained(storage, 2)
    newest = max(storage.list("checkpoints/"))
    assert callable(damage)
    storage.write(newest, damage(storage.read(newest)))
    with caplog.at_level(logging.WARNING):
        assert State(1).resume(storage) == 1
    assert newest in caplog.text


def test_other_objects_among_the_checkpoints_are_left_alone(storage: Storage) -> None:
    storage.write("checkpoints/notes.txt", b"mine")
    trained(storage, 4, keep=1)
    assert "checkpoints/notes.txt" in storage.list("checkpoints/")
    assert State(1).resume(storage) == 4
