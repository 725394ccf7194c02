"""A module whose weights lie in one tensor is the same module, and one step on that tensor is a step on each of them."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vlae
from vlae import VLAE, flatten


def pair(make_model: Callable[..., VLAE], window: str) -> tuple[VLAE, VLAE, nn.Parameter]:
    """A model, a copy of it that is flattened, and the copy's weights."""
    model = make_model((1, 7, 6), window)
    other = copy.deepcopy(model)
    return model, other, flatten(other)


def loss(model: VLAE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, *model.image_shape, generator=generator, dtype=torch.float64).round()
    return -model(
        x, torch.randn(4, model.latents, generator=generator, dtype=torch.float64)
    ).elbo.mean()


@pytest.mark.parametrize("window", ["0x0", "4x2", "full"])
def test_nothing_changes_for_the_module(make_model: Callable[..., VLAE], window: str) -> None:
    model, other, flat = pair(make_model, window)
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(one, two)
        for one, two in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
    )
    for each in (model, other):
        loss(each).backward()
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        assert one.is_leaf
        assert one.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)
    norms = [torch.nn.utils.clip_grad_norm_(weights, 1e9) for weights in (flat, model.parameters())]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("algorithm", [torch.optim.Adam, torch.optim.Adamax])
def test_steps_on_the_one_tensor_are_steps_on_each(
    make_model: Callable[..., VLAE], algorithm: type[torch.optim.Optimizer]
) -> None:
    model, other, flat = pair(make_model, "4x2")
    optimizers = [algorithm(weights, lr=0.01) for weights in (model.parameters(), [flat])]  # type: ignore[call-arg]
    for _ in range(10):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            loss(each).backward()
            optimizer.step()
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    used = sum(parameter.numel() for parameter in other.parameters())
    assert flat.count_nonzero() <= used  # what lies between the weights is zero still


def test_weights_that_are_loaded_are_those_of_the_tensor(make_model: Callable[..., VLAE]) -> None:
    model, other, flat = pair(make_model, "0x0")
    other.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    total = torch.stack([parameter.detach().sum() for parameter in other.parameters()]).sum()
    torch.testing.assert_close(flat.detach().sum(), total)


def test_a_flattened_model_is_saved_as_any_other(tmp_path: Path) -> None:
    model = vlae.build(image_shape=(1, 7, 6), window="2x1", latents=3)
    sizes = []
    for number in range(2):
        vlae.save(model, tmp_path / str(number))
        loaded = vlae.load(tmp_path / str(number))
        assert all(
            torch.equal(value, model.state_dict()[name])
            for name, value in loaded.state_dict().items()
        )
        sizes.append((tmp_path / str(number) / "model.safetensors").stat().st_size)
        flatten(model)
    assert sizes[0] == sizes[1]
