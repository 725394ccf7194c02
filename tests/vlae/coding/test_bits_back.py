"""Bits-back coding: images come back bit for bit, and the stack grows by the bound."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlae
from vlae.coding import bits_back, codes
from vlae.coding.grid import STEP, pop_normal
from vlae.distributions import standard_normal_log_prob

MODELS: dict[str, dict[str, Any]] = {
    "N(0, I)": {"flow_depth": 0},
    "AF 1": {"flow_depth": 1},
    "AF 3": {"flow_depth": 3},
    "AF mean-only": {"flow_depth": 2, "flow_mean_only": True},
    "IAF": {"flow_depth": 0, "posterior_depth": 2},
    "AF and IAF": {"flow_depth": 2, "posterior_depth": 1},
    "maps": {"code": "maps", "flow_depth": 2, "latents": 2},
    "maps, IAF": {"code": "maps", "flow_depth": 1, "posterior_depth": 2, "latents": 1},
    "maps, N(0, I)": {"code": "maps", "flow_depth": 0, "latents": 1},
}
WINDOWS = ["0x0", "1x1", "3x0", "3x2", "full", "2x1-down2", "3x2-grey"]


@settings(max_examples=16, deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    window=st.sampled_from(WINDOWS),
    likelihood=st.sampled_from(["bernoulli", "logistic"]),
    channels=st.sampled_from([1, 3]),
    # Four pixels are the width of the window 2x1-down2.
    size=st.tuples(st.integers(4, 5), st.integers(4, 6)),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_images_and_the_stack_come_back_bit_for_bit(
    make_model: Callable[..., vlae.VLAE],
    make_stack: type,
    model: str,
    window: str,
    likelihood: str,
    channels: int,
    size: tuple[int, int],
    count: int,
    seed: int,
) -> None:
    channels = 3 if window.endswith("grey") else channels
    network = make_model(
        (channels, *size),
        window,
        seed=seed,
        dtype=torch.float32,
        likelihood=likelihood,
        **({"flow_hidden": 16} | MODELS[model]),
    )
    values = 2**network.decoder.likelihood.levels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, (count, channels, *size), generator=generator) / (values - 1)
    stack = make_stack(8_000, seed)
    before = stack.state
    bits_back.push(stack, network, x)
    assert stack.state != before
    assert torch.equal(bits_back.pull(stack, network, count), x)
    assert stack.state == before


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", ["0x0", "3x2"])
@pytest.mark.parametrize("count", [1, 2])
def test_images_in_any_memory_layout_come_back_bit_for_bit(
    make_model: Callable[..., vlae.VLAE], make_stack: type, channels: int, window: str, count: int
) -> None:
    """The strides of the images select no other operation in the encoder, in either direction."""
    network = make_model((channels, 5, 6), window, dtype=torch.float32, **MODELS["AF 1"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (count, 5, 6, channels), generator=generator).float()
    for images in (x.movedim(-1, 1), x.movedim(-1, 1).contiguous(), x.movedim(-1, 1)[:1]):
        stack = make_stack(8_000)
        before = stack.state
        bits_back.push(stack, network, images)
        assert torch.equal(bits_back.pull(stack, network, len(images)), images)
        assert stack.state == before


@pytest.mark.parametrize("name", ["N(0, I)", "AF 1", "AF 3", "AF mean-only", "maps"])
def test_a_code_costs_its_density_under_the_prior(
    make_model: Callable[..., vlae.VLAE], make_stack: type, name: str
) -> None:
    """-log2 p(z) - log2 of the grid's step for each latent, to a hundredth of a bit a latent."""
    network = make_model((1, 8, 8), "3x2", gain=0.5, dtype=torch.float32, **MODELS[name])
    stack = make_stack(20_000)
    with torch.no_grad():
        # Samples of the prior: codes that it predicts as well as it can.
        drawn = network.prior.sample(torch.randn(1200 // network.latents, network.latents))
        z = (torch.floor(drawn / STEP) + 0.5) * STEP
        before = stack.bits
        codes.push_prior(stack, network.prior, z)
        expected = -network.prior.log_prob(z).double().sum() / math.log(2)
    expected = expected - z.numel() * math.log2(STEP)
    assert (stack.bits - before) / z.numel() == pytest.approx(expected.item() / z.numel(), abs=0.01)


@pytest.mark.parametrize("name", ["N(0, I)", "IAF", "AF and IAF"])
def test_popped_codes_are_samples_of_the_posterior_at_its_density(
    make_model: Callable[..., vlae.VLAE], make_stack: type, name: str
) -> None:
    network = make_model((1, 6, 6), "3x2", gain=0.5, dtype=torch.float32, **MODELS[name])
    x = torch.randint(2, (1, 1, 6, 6)).float().expand(300, -1, -1, -1)
    stack = make_stack(40_000)
    before = stack.bits
    with torch.no_grad():
        posterior = network.encoder(x)
        z = codes.pop_posterior(stack, posterior)
        paid = before - stack.bits
        expected = -posterior.log_prob(z).double().sum() / math.log(2)
        samples = posterior.sample(torch.randn(300, network.latents))
    assert paid / z.numel() == pytest.approx(
        (expected - z.numel() * math.log2(STEP)).item() / z.numel(), abs=0.01
    )
    # Means and standard deviations agree within five standard errors.
    error = 5 * samples.std(0) / math.sqrt(300)
    assert ((z.mean(0) - samples.mean(0)).abs() < 2 * error).all()
    assert ((z.std(0) - samples.std(0)).abs() < 2 * error).all()


def test_images_cost_the_bound_of_the_code_that_was_popped(
    make_model: Callable[..., vlae.VLAE], make_stack: type
) -> None:
    network = make_model((1, 8, 8), "3x2", dtype=torch.float32, flow_depth=1)
    x = torch.randint(2, (32, 1, 8, 8)).float()
    stack = make_stack(20_000)
    with torch.no_grad():
        clone = make_stack(20_000)
        posterior = network.encoder(x)
        z = codes.pop_posterior(clone, posterior)
        distortion = -network.decoder(z, x).log_prob(x.permute(0, 2, 3, 1))
        rate = (posterior.log_prob(z) - network.prior.log_prob(z)).sum(-1)
    before = stack.bits
    bits_back.push(stack, network, x)
    expected = (distortion + rate).double().sum().item() / math.log(2)
    assert stack.bits - before == pytest.approx(expected, rel=0.002)


@given(count=st.integers(0, 3000), most=st.integers(1, 200))
def test_batches_hold_every_image_and_grow_from_one(count: int, most: int) -> None:
    sizes = bits_back.batch_sizes(count, most)
    assert sum(sizes) == count
    assert all(1 <= size <= most for size in sizes)
    assert all(size <= max(1, sum(sizes[:n]) // 3) for n, size in enumerate(sizes))


class Laplace(nn.Module):
    splits_over_latents = True


def test_a_prior_without_an_exact_code_is_refused_by_name(
    make_model: Callable[..., vlae.VLAE], make_stack: type
) -> None:
    network = make_model((1, 8, 8), "3x2", dtype=torch.float32)
    network.prior = Laplace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no exact code for the prior Laplace"):
        bits_back.push(make_stack(100), network, torch.zeros(1, 1, 8, 8))


def test_the_grid_reaches_as_fine_as_float32_does(make_stack: type) -> None:
    z = pop_normal(make_stack(20_000), torch.full((1000,), 3.0), torch.full((1000,), 2.0))
    numbers = z.double() / STEP - 0.5
    assert torch.equal(numbers, numbers.round())
    assert z.mean().item() == pytest.approx(3.0, abs=0.4)
    assert -standard_normal_log_prob((z - 3) / 2).mean().item() == pytest.approx(1.42, abs=0.2)
