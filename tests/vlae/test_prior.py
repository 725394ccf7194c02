"""The autoregressive flow is a normalized density, and its sampler draws from that density."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlae
from vlae.made import MADE
from vlae.prior import AutoregressiveFlow, StandardNormal

SIZES_AND_DEPTHS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (5, 1), (5, 4), (8, 3)]
Randomize = Callable[..., None]


def random_flow(randomize: Randomize, latents: int, depth: int, seed: int = 0) -> AutoregressiveFlow:
    flow = AutoregressiveFlow(latents, depth, hidden=4 * latents).double()
    randomize(flow, seed)
    return flow


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobians(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """d function / d point at each point: (points, *outputs, size)."""
    return torch.stack([torch.autograd.functional.jacobian(function, point) for point in points])


def allowed(size: int, reverse: bool) -> Tensor:
    """Whether output i may depend on input j."""
    earlier = torch.ones(size, size, dtype=torch.bool).tril(-1)
    return earlier.T if reverse else earlier


@given(st.integers(1, 7), st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_an_output_of_made_has_gradient_exactly_zero_from_itself_and_what_comes_after(
    randomize: Randomize, size: int, extra: int, outputs: int, layers: int, reverse: bool
) -> None:
    made = MADE(size, outputs, max(1, size - 1) + extra, layers, reverse=reverse).double()
    randomize(made, seed=extra)
    jacobian = jacobians(made, normal(4, size))
    assert jacobian.shape == (4, outputs, size, size)
    assert not jacobian[:, :, ~allowed(size, reverse)].any()


@given(st.integers(1, 7), st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_an_output_of_made_is_reached_by_all_that_comes_before(
    size: int, extra: int, outputs: int, layers: int, reverse: bool
) -> None:
    made = MADE(size, outputs, max(1, size - 1) + extra, layers, reverse=reverse).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.1)
    # With positive weights and inputs no ReLU is shut, and no two paths cancel.
    jacobian = jacobians(made, torch.ones(1, size, dtype=torch.float64))
    assert torch.equal(jacobian[0] > 0, allowed(size, reverse).expand(outputs, -1, -1))


@pytest.mark.parametrize(("size", "hidden"), [(4, 2), (16, 14), (32, 8)])
def test_too_few_hidden_units_for_every_dependency_are_an_error(size: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=str(hidden)):
        MADE(size, 2, hidden)


@pytest.mark.parametrize(("latents", "depth"), SIZES_AND_DEPTHS)
def test_the_inverse_undoes_sampling_and_sampling_the_inverse(randomize: Randomize, latents: int, depth: int) -> None:
    flow = random_flow(randomize, latents, depth)
    noise = normal(64, latents)
    assert (flow.sample(noise) - noise).abs().max() > 0.1, "the test is vacuous for a flow that is the identity"
    torch.testing.assert_close(flow.inverse(flow.sample(noise))[0], noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow.sample(flow.inverse(noise)[0]), noise, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("latents", "depth"), SIZES_AND_DEPTHS)
def test_the_log_determinant_is_that_of_the_jacobian_of_the_inverse(randomize: Randomize, latents: int, depth: int) -> None:
    flow = random_flow(randomize, latents, depth)
    z = normal(8, latents)
    by_autograd = jacobians(lambda point: flow.inverse(point)[0], z).slogdet().logabsdet
    torch.testing.assert_close(flow.inverse(z)[1].sum(-1), by_autograd, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("latents", "depth"), SIZES_AND_DEPTHS)
def test_the_density_is_that_of_its_own_sampler_by_change_of_variables(randomize: Randomize, latents: int, depth: int) -> None:
    flow = random_flow(randomize, latents, depth)
    noise = normal(8, latents)
    stretch = jacobians(flow.sample, noise).slogdet().logabsdet
    by_change_of_variables = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) - stretch
    torch.testing.assert_close(flow.log_prob(flow.sample(noise)).sum(-1), by_change_of_variables, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("latents", "depth"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_the_density_integrates_to_one(randomize: Randomize, latents: int, depth: int) -> None:
    flow = random_flow(randomize, latents, depth, seed=3)
    with torch.no_grad():
        samples = flow.sample(normal(20_000, latents))
        low, high = samples.amin(0), samples.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
        axes = [torch.linspace(a, b, 801, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        cell = torch.stack([axis[1] - axis[0] for axis in axes]).prod()
        grid = torch.cartesian_prod(*axes).reshape(-1, latents)
        mass = flow.log_prob(grid).sum(-1).exp().sum() * cell
    assert mass.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("latents", "depth"), SIZES_AND_DEPTHS)
def test_the_split_over_the_latents_sums_to_the_log_density(randomize: Randomize, latents: int, depth: int) -> None:
    flow = random_flow(randomize, latents, depth)
    z = normal(3, 5, latents)
    noise, log_det = flow.inverse(z)
    total = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) + log_det.sum(-1)
    assert flow.log_prob(z).shape == z.shape
    torch.testing.assert_close(flow.log_prob(z).sum(-1), total, rtol=1e-12, atol=1e-12)


def test_in_a_flow_of_one_step_each_term_is_a_conditional_density_given_the_latents_before(randomize: Randomize) -> None:
    flow = random_flow(randomize, latents=4, depth=1)
    jacobian = jacobians(flow.log_prob, normal(8, 4))
    assert not jacobian[:, torch.ones(4, 4, dtype=torch.bool).triu(1)].any()
    # Integrated over its own latent, each of them is 1 whatever the others are.
    others = normal(4, seed=1)
    for latent in range(4):
        z = others.repeat(40_001, 1)
        z[:, latent] = torch.linspace(-400, 400, 40_001, dtype=torch.float64)
        assert flow.log_prob(z)[:, latent].exp().sum().item() * 0.02 == pytest.approx(1, abs=1e-4)


def test_the_order_is_reversed_between_steps(randomize: Randomize) -> None:
    flow = random_flow(randomize, latents=4, depth=2)
    points = normal(16, 4)
    first, second = (jacobians(step, points) for step in flow.steps)
    assert torch.equal((first != 0).any((0, 1)), allowed(4, reverse=False))
    assert torch.equal((second != 0).any((0, 1)), allowed(4, reverse=True))
    # So two steps tie every latent to every other, which one cannot.
    inverse = jacobians(lambda point: flow.inverse(point)[0], points)
    assert (inverse != 0).any(0).all()


def test_a_new_flow_is_the_standard_normal(randomize: Randomize) -> None:
    z = normal(6, 5)
    for prior in (AutoregressiveFlow(5, 0, 8), AutoregressiveFlow(5, 3, 8).double()):
        torch.testing.assert_close(prior.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prior.sample(z), z, rtol=0, atol=0)


def test_a_flow_of_depth_0_is_built_as_the_standard_normal(small_arguments: Callable[..., dict[str, Any]]) -> None:
    prior = vlae.build(**small_arguments((1, 4, 4), "3x1", flow_depth=0)).prior
    assert isinstance(prior, StandardNormal)
    z = normal(6, 2)
    torch.testing.assert_close(prior.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z), rtol=1e-12, atol=1e-12)
    assert torch.equal(prior.sample(z), z)


def test_an_autoregressive_prior_on_z_is_an_inverse_autoregressive_posterior_on_its_noise(randomize: Randomize) -> None:
    flow = random_flow(randomize, latents=3, depth=2)
    z = normal(10, 3)
    log_q_of_z = normal(10, seed=1)
    noise, log_det = flow.inverse(z)
    # The density that q has for the noise, if it has this one for z; and the noise has a standard normal prior.
    log_q_of_noise = log_q_of_z - log_det.sum(-1)
    rate_in_noise = log_q_of_noise - torch.distributions.Normal(0, 1).log_prob(noise).sum(-1)
    torch.testing.assert_close(log_q_of_z - flow.log_prob(z).sum(-1), rate_in_noise, rtol=1e-12, atol=1e-12)


def test_the_density_is_finite_far_from_where_it_has_mass(randomize: Randomize) -> None:
    flow = random_flow(randomize, latents=4, depth=4)
    assert torch.isfinite(flow.log_prob(1e6 * normal(100, 4))).all()
    single = flow.float()
    assert torch.isfinite(single.log_prob(1e3 * normal(100, 4).float())).all()
