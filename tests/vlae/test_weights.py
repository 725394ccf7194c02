"""The moving average of the weights is the one that its recursion defines."""

import pytest
import torch
from torch import Tensor, nn

from vlae import EMA, flatten


def trajectory(num_steps: int) -> list[dict[str, Tensor]]:
    """The weights of a model before training and after each step."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (2, 3), "bias": (2,)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
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
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(decay: float, num_steps: int) -> None:
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
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "surplus": torch.zeros(2)}, "surplus"),
    ],
)
def test_weights_of_another_model_are_refused(weights: dict[str, Tensor], named: str) -> None:
    with pytest.raises((KeyError, RuntimeError), match=named):
        EMA(nn.Linear(3, 2), 0.9).load_state_dict(weights)
