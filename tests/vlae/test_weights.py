"""Flattened weights are those of the same module, and the average follows its recursion."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vlae
from vlae import EMA, VLAE, flatten


@pytest.mark.parametrize(
    ("widths", "flows"),
    [
        ({}, ("prior.",)),
        ({"posterior_depth": 2}, ("prior.", "encoder.flow.")),
        ({"context_layers": 2, "image_blocks": 1}, ("prior.",)),
    ],
)
def test_hidden_weights_are_those_between_the_image_and_the_pixels(
    make_model: Callable[..., VLAE], widths: dict[str, int], flows: tuple[str, ...]
) -> None:
    model = make_model((1, 7, 6), "4x2", **widths)
    hidden = {id(weight) for weight in model.hidden_weights()}
    others = {
        name
        for name, weight in model.named_parameters()
        if id(weight) not in hidden and weight.dim() > 1 and not name.startswith(flows)
    }
    assert others == {"encoder.layers.0.weight", "decoder.head.weight"}
    assert {weight.dim() for weight in model.hidden_weights()} == {2, 4}
    assert not any(
        id(weight) in hidden for name, weight in model.named_parameters() if name.startswith(flows)
    )


# --- weights in one tensor ---


def pair(make_model: Callable[..., VLAE], window: str) -> tuple[VLAE, VLAE, nn.Parameter]:
    """A model, a flattened copy of it, and the tensor with the copy's weights."""
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
def test_flattening_does_not_change_the_module(
    make_model: Callable[..., VLAE], window: str
) -> None:
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
def test_an_optimizer_step_on_the_tensor_is_a_step_on_every_weight(
    make_model: Callable[..., VLAE], algorithm: type[torch.optim.Optimizer]
) -> None:
    model, other, flat = pair(make_model, "4x2")
    both = (model.parameters(), [flat])
    optimizers = [algorithm(weights, lr=0.01) for weights in both]  # type: ignore[call-arg]
    for _ in range(10):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            loss(each).backward()
            optimizer.step()
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    used = sum(parameter.numel() for parameter in other.parameters())
    assert flat.count_nonzero() <= used  # the padding between the weights is still zero


def test_loaded_weights_reach_the_tensor(make_model: Callable[..., VLAE]) -> None:
    model, other, flat = pair(make_model, "0x0")
    other.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    total = torch.stack([parameter.detach().sum() for parameter in other.parameters()]).sum()
    torch.testing.assert_close(flat.detach().sum(), total)


def test_a_flattened_model_is_saved_like_any_other(tmp_path: Path) -> None:
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


def zero_module(model: VLAE, flat: nn.Parameter) -> None:
    model.zero_grad()


def zero_optimizer(model: VLAE, flat: nn.Parameter) -> None:
    torch.optim.SGD([flat]).zero_grad()


def zero_one(model: VLAE, flat: nn.Parameter) -> None:
    list(model.parameters())[-1].grad = None


def cast(model: VLAE, flat: nn.Parameter) -> None:
    model.float().double()


@pytest.mark.parametrize("undo", [zero_module, zero_optimizer, zero_one, cast])
def test_training_that_would_miss_the_tensor_is_an_error(
    make_model: Callable[..., VLAE], undo: Callable[[VLAE, nn.Parameter], None]
) -> None:
    model = make_model((1, 7, 6), "3x2")
    flat = flatten(model)
    loss(model).backward()
    undo(model, flat)
    with pytest.raises(RuntimeError, match="would not be trained"):
        loss(model).backward()


def test_a_module_is_trained_as_usual_once_its_tensor_is_gone(
    make_model: Callable[..., VLAE],
) -> None:
    model = make_model((1, 7, 6), "3x2")
    flat = flatten(model)
    again = flatten(model)
    del flat
    loss(model).backward()
    assert again.grad is not None
    assert again.grad.count_nonzero()
    del again
    model.zero_grad()
    loss(model).backward()


def test_the_averaged_model_can_be_trained_further(make_model: Callable[..., VLAE]) -> None:
    tuned = EMA(make_model((1, 7, 6), "3x2"), 0.9).module.requires_grad_()
    loss(tuned).backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())


# --- moving average ---


def trajectory(num_steps: int) -> list[dict[str, Tensor]]:
    """The weights of a model before training and after each step."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (2, 3), "bias": (2,)}
    return [
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        for _ in range(num_steps + 1)
    ]


def averaged(weights: list[dict[str, Tensor]], decay: float) -> tuple[EMA[nn.Linear], nn.Linear]:
    module = nn.Linear(3, 2).double()
    module.load_state_dict(weights[0])
    flat, ema = flatten(module), EMA(module, decay)
    for step, value in enumerate(weights[1:], start=1):
        module.load_state_dict(value)
        ema.update(flat, step)
    return ema, module


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 40])
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(
    decay: float, num_steps: int
) -> None:
    weights = trajectory(num_steps)
    # A step's share is what it took in, (1 - decay_t), times what every later step left of it.
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, num_steps + 1)]
    shares = torch.tensor([1.0, *(1 - value for value in decays)], dtype=torch.float64)
    kept = torch.tensor([1.0, *decays], dtype=torch.float64)
    shares = torch.stack([share * kept[step + 1 :].prod() for step, share in enumerate(shares)])
    assert shares.sum().item() == pytest.approx(1)
    ema, _ = averaged(weights, decay)
    for name, value in ema.state_dict().items():
        expected = sum(share * step[name] for share, step in zip(shares, weights, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_weights_that_stand_still_are_their_own_average() -> None:
    ema, module = averaged([trajectory(0)[0]] * 5, 0.99)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], value, rtol=0, atol=1e-15)


def test_updating_leaves_the_model_and_its_gradients_alone() -> None:
    weights = trajectory(3)
    ema, module = averaged(weights, 0.9)
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[-1][name])
    assert all(not value.requires_grad for value in ema.state_dict().values())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_restored_average_continues_bit_for_bit() -> None:
    weights = trajectory(20)
    unbroken, _ = averaged(weights, 0.9)
    before, _ = averaged(weights[:11], 0.9)
    saved = {name: value.clone() for name, value in before.state_dict().items()}
    restored = EMA(nn.Linear(3, 2).double(), 0.9)
    restored.load_state_dict(saved)
    module = nn.Linear(3, 2).double()
    flat = flatten(module)
    for step in range(11, 21):
        module.load_state_dict(weights[step])
        restored.update(flat, step)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def test_an_average_loads_into_the_model_by_its_own_names() -> None:
    ema, module = averaged(trajectory(5), 0.9)
    module.load_state_dict(ema.state_dict())
    assert torch.equal(module.weight, ema.state_dict()["weight"])


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"weight": torch.zeros(2, 3)}, "bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, "size|shape"),
        # Shapes that would broadcast are wrong too.
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(1)}, "size|shape"),
        ({"weight": torch.zeros(()), "bias": torch.zeros(2)}, "size|shape"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "surplus": torch.zeros(2)},
            "surplus",
        ),
    ],
)
def test_weights_of_another_model_are_refused(weights: dict[str, Tensor], named: str) -> None:
    with pytest.raises((KeyError, RuntimeError), match=named):
        EMA(nn.Linear(3, 2), 0.9).load_state_dict(weights)
