"""The autoregressive flow has a normalized density, and its sampler draws from it."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlae.flow import AutoregressiveFlow

Randomize = Callable[..., None]
Latents = int | tuple[int, int, int]

MAPS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
LATENTS = st.integers(1, 8) | MAPS
KINDS: list[tuple[Latents, int, bool]] = [
    (1, 1, False),
    (1, 3, False),
    (2, 2, False),
    (2, 1, True),
    (3, 2, True),
    (5, 1, False),
    (5, 4, False),
    (8, 3, False),
    ((1, 1, 1), 2, False),
    ((1, 3, 2), 1, False),
    ((2, 2, 2), 3, False),
    ((3, 1, 2), 2, True),
]
"""Latents, depth, and whether the flow is mean-only."""


def random_flow(
    randomize: Randomize,
    latents: Latents,
    depth: int,
    mean_only: bool = False,
    *,
    seed: int = 0,
    extra: int = 12,
    **keywords: int,
) -> AutoregressiveFlow:
    fewest = latents if isinstance(latents, int) else latents[0]
    flow = AutoregressiveFlow(
        latents, depth, hidden=fewest + extra, mean_only=mean_only, **keywords
    ).double()
    randomize(flow, seed)
    return flow


def length(latents: Latents) -> int:
    return latents if isinstance(latents, int) else math.prod(latents)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobians(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """d function / d point at each point: (points, *outputs, size)."""
    return torch.stack([torch.autograd.functional.jacobian(function, point) for point in points])


def before(positions: int, channels: int = 1) -> Tensor:
    """Whether element j of the flat vector comes before element i: (size, size)."""
    channel, position = (
        grid.flatten()
        for grid in torch.meshgrid(torch.arange(channels), torch.arange(positions), indexing="ij")
    )
    number = position * channels + channel
    return number[:, None] > number


@given(
    LATENTS,
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 16),
    st.integers(1, 3),
    st.sampled_from([0, 2]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_inverse_and_sample_undo_each_other(
    randomize: Randomize,
    latents: Latents,
    depth: int,
    mean_only: bool,
    extra: int,
    layers: int,
    context: int,
) -> None:
    flow = random_flow(
        randomize,
        latents,
        depth,
        mean_only,
        seed=extra,
        extra=extra,
        layers=layers,
        context=context,
    )
    said = None
    if context:
        said = normal(
            6, context if isinstance(latents, int) else context * latents[1] * latents[2], seed=1
        )
    noise = normal(6, length(latents))
    assert (flow.sample(noise, said) - noise).abs().max() > 0.01, (
        "the test is vacuous for a flow that is the identity"
    )
    torch.testing.assert_close(
        flow.inverse(flow.sample(noise, said), said)[0], noise, rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(
        flow.sample(flow.inverse(noise, said)[0], said), noise, rtol=1e-8, atol=1e-8
    )
    one_by_one = torch.cat(
        [flow.sample(noise[i : i + 1], None if said is None else said[i : i + 1]) for i in range(6)]
    )
    torch.testing.assert_close(flow.sample(noise, said), one_by_one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("latents", "depth", "mean_only"), KINDS)
def test_the_log_determinant_is_that_of_the_inverse_by_autograd(
    randomize: Randomize, latents: Latents, depth: int, mean_only: bool
) -> None:
    flow = random_flow(randomize, latents, depth, mean_only)
    z = normal(8, length(latents))
    by_autograd = jacobians(lambda point: flow.inverse(point)[0], z).slogdet().logabsdet
    torch.testing.assert_close(flow.inverse(z)[1].sum(-1), by_autograd, rtol=1e-9, atol=1e-9)


def test_a_mean_only_flow_preserves_volume(randomize: Randomize) -> None:
    flow = random_flow(randomize, 5, 3, mean_only=True)
    assert torch.equal(flow.inverse(normal(8, 5))[1], torch.zeros(8, 5, dtype=torch.float64))


@pytest.mark.parametrize(("latents", "depth", "mean_only"), KINDS)
def test_the_density_is_that_of_the_sampler_by_change_of_variables(
    randomize: Randomize, latents: Latents, depth: int, mean_only: bool
) -> None:
    flow = random_flow(randomize, latents, depth, mean_only)
    noise = normal(8, length(latents))
    stretch = jacobians(flow.sample, noise).slogdet().logabsdet
    by_change_of_variables = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) - stretch
    torch.testing.assert_close(
        flow.log_prob(flow.sample(noise)).sum(-1), by_change_of_variables, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("latents", "depth", "mean_only"),
    [
        (1, 1, False),
        (1, 3, False),
        (2, 1, False),
        (2, 2, True),
        (2, 3, False),
        ((2, 1, 1), 1, False),
        ((1, 1, 2), 2, False),
    ],
)
def test_the_density_integrates_to_one(
    randomize: Randomize, latents: Latents, depth: int, mean_only: bool
) -> None:
    flow = random_flow(randomize, latents, depth, mean_only, seed=3, extra=6)
    with torch.no_grad():
        samples = flow.sample(normal(20_000, length(latents)))
        low, high = samples.amin(0), samples.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
        axes = [
            torch.linspace(a, b, 501, dtype=torch.float64)
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        cell = torch.stack([axis[1] - axis[0] for axis in axes]).prod()
        grid = torch.cartesian_prod(*axes).reshape(-1, length(latents))
        mass = flow.log_prob(grid).sum(-1).exp().sum() * cell
    assert mass.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("latents", "depth", "mean_only"), KINDS)
def test_the_split_over_the_latents_sums_to_the_log_density(
    randomize: Randomize, latents: Latents, depth: int, mean_only: bool
) -> None:
    flow = random_flow(randomize, latents, depth, mean_only)
    z = normal(3, 5, length(latents))
    noise, log_det = flow.inverse(z)
    total = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) + log_det.sum(-1)
    assert flow.log_prob(z).shape == z.shape
    torch.testing.assert_close(flow.log_prob(z).sum(-1), total, rtol=1e-12, atol=1e-12)


def test_in_a_flow_of_one_step_each_term_is_a_conditional_density_given_the_latents_before(
    randomize: Randomize,
) -> None:
    flow = random_flow(randomize, latents=4, depth=1)
    jacobian = jacobians(flow.log_prob, normal(8, 4))
    assert not jacobian[:, torch.ones(4, 4, dtype=torch.bool).triu(1)].any()
    # Each term integrates to 1 over its own latent, for any values of the others.
    others = normal(4, seed=1)
    for latent in range(4):
        z = others.repeat(40_001, 1)
        z[:, latent] = torch.linspace(-400, 400, 40_001, dtype=torch.float64)
        assert flow.log_prob(z)[:, latent].exp().sum().item() * 0.02 == pytest.approx(1, abs=1e-4)


def only(flow: AutoregressiveFlow, number: int) -> AutoregressiveFlow:
    """The flow with all other steps set to the identity."""
    flow = copy.deepcopy(flow)
    for other, step in enumerate(flow.steps):
        if other != number:
            torch.nn.init.zeros_(step.head.weight)
    return flow


@pytest.mark.parametrize(("channels", "positions"), [(1, 4), (2, 3)])
def test_the_order_is_reversed_between_steps(
    randomize: Randomize, channels: int, positions: int
) -> None:
    size = channels * positions
    flow = random_flow(randomize, size if channels == 1 else (channels, 1, positions), depth=2)
    points, own, earlier = (
        normal(16, size),
        torch.eye(size, dtype=torch.bool),
        before(positions, channels),
    )

    def ties(flow: AutoregressiveFlow) -> Tensor:
        """Which z reaches which noise."""
        return (jacobians(lambda point: flow.inverse(point)[0], points) != 0).any(0)

    assert torch.equal(ties(only(flow, 0)), earlier | own)
    assert torch.equal(ties(only(flow, 1)), earlier.T | own)
    assert ties(flow).all(), "two steps tie every latent to every other, which one cannot"


def test_context_maps_have_the_orientation_of_the_latent_maps_in_every_step(
    randomize: Randomize,
) -> None:
    flow = random_flow(randomize, (2, 2, 2), depth=2, context=3)
    points, maps, own = normal(8, 8), normal(8, 12, seed=1), torch.eye(4, dtype=torch.bool)

    def reached(flow: AutoregressiveFlow) -> Tensor:
        """Which position's context reaches which position's noise, over all channels: (4, 4)."""
        jacobian = torch.cat(
            [jacobians(lambda said, z=z: flow.inverse(z, said)[0], maps) for z in points]
        )
        return (jacobian != 0).any(0).unflatten(0, (2, 4)).unflatten(-1, (3, 4)).any(2).any(0)

    assert torch.equal(reached(only(flow, 0)), before(4) | own)
    assert torch.equal(reached(only(flow, 1)), before(4).T | own)


def test_an_unexpected_or_missing_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="context=0"):
        AutoregressiveFlow(3, 1, 4).inverse(torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="context=5"):
        AutoregressiveFlow(3, 1, 4, context=5).sample(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("latents", "depth", "mean_only"), [(3, 2, False), (3, 1, True), ((2, 1, 2), 2, False)]
)
def test_gradients_agree_with_finite_differences(
    randomize: Randomize, latents: Latents, depth: int, mean_only: bool
) -> None:
    flow = random_flow(randomize, latents, depth, mean_only, extra=2)
    point = normal(2, length(latents)).requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, point)
    assert torch.autograd.gradcheck(flow.sample, point)
    assert torch.autograd.gradcheck(lambda *_: flow.log_prob(point), list(flow.parameters()))


def test_a_new_flow_is_the_standard_normal(randomize: Randomize) -> None:
    z = normal(6, 5)
    for prior in (AutoregressiveFlow(5, 0, 8), AutoregressiveFlow(5, 3, 8).double()):
        torch.testing.assert_close(
            prior.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(prior.sample(z), z, rtol=0, atol=0)


def test_the_density_is_finite_far_from_its_mass(randomize: Randomize) -> None:
    flow = random_flow(randomize, latents=4, depth=4)
    assert torch.isfinite(flow.log_prob(1e6 * normal(100, 4))).all()
    single = flow.float()
    assert torch.isfinite(single.log_prob(1e3 * normal(100, 4).float())).all()
