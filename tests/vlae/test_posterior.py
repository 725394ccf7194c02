"""The IAF posterior has the density of its samples, and is dual to the autoregressive prior."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vlae
from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow
from vlae.model import VLAE
from vlae.posterior import IAFPosterior
from vlae.prior import StandardNormal

Randomize = Callable[..., None]
Latents = int | tuple[int, int, int]

LATENTS = st.integers(1, 6) | st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
NORMAL = torch.distributions.Normal(0, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_posterior(
    randomize: Randomize,
    latents: Latents,
    depth: int,
    context: int = 0,
    mean_only: bool = False,
    batch: int = 3,
) -> IAFPosterior:
    size, positions = (
        (latents, 1) if isinstance(latents, int) else (math.prod(latents), math.prod(latents[1:]))
    )
    flow = AutoregressiveFlow(
        latents, depth, hidden=size + 6, mean_only=mean_only, context=context
    ).double()
    randomize(flow, seed=depth)
    base = DiagonalGaussian(normal(batch, size, seed=1), 0.5 * normal(batch, size, seed=2))
    return IAFPosterior(base, flow, normal(batch, context * positions, seed=3) if context else None)


@given(LATENTS, st.integers(1, 4), st.sampled_from([0, 3]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_the_density_of_a_sample_is_that_of_its_noise_by_change_of_variables(
    randomize: Randomize, latents: Latents, depth: int, context: int, mean_only: bool
) -> None:
    posterior = random_posterior(randomize, latents, depth, context, mean_only)
    noise = normal(*posterior.base.mean.shape, seed=4)
    z, terms = posterior.sample_with_log_prob(noise)
    assert terms.shape == z.shape == noise.shape
    torch.testing.assert_close(posterior.sample(noise), z, rtol=0, atol=0)
    jacobian = torch.autograd.functional.jacobian(posterior.sample, noise)
    for image in range(len(noise)):
        stretch = jacobian[image, :, image].slogdet().logabsdet
        expected = NORMAL.log_prob(noise[image]).sum() - stretch
        torch.testing.assert_close(terms[image].sum(), expected, rtol=1e-9, atol=1e-9)


@given(LATENTS, st.integers(1, 4), st.sampled_from([0, 3]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_the_log_prob_of_a_sample_is_the_one_it_was_drawn_with(
    randomize: Randomize, latents: Latents, depth: int, context: int, mean_only: bool
) -> None:
    posterior = random_posterior(randomize, latents, depth, context, mean_only)
    z, terms = posterior.sample_with_log_prob(normal(2, *posterior.base.mean.shape, seed=4))
    torch.testing.assert_close(posterior.log_prob(z), terms, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("latents", [4, (1, 2, 2)])
def test_drawing_several_codes_of_an_image_equals_drawing_each_alone(
    randomize: Randomize, latents: Latents
) -> None:
    posterior = random_posterior(randomize, latents, depth=2, context=3)
    noise = normal(5, 3, 4, seed=4)
    z, terms = posterior.sample_with_log_prob(noise)
    for sample in range(5):
        one, one_terms = posterior.sample_with_log_prob(noise[sample])
        torch.testing.assert_close(z[sample], one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms[sample], one_terms, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("latents", "depth"), [(1, 2), (2, 1), (2, 3), ((2, 1, 1), 2)])
def test_the_density_integrates_to_one(randomize: Randomize, latents: Latents, depth: int) -> None:
    posterior = random_posterior(randomize, latents, depth, context=2, batch=1)
    randomize(posterior.flow, seed=1, gain=0.7)  # smooth enough for the grid
    size = posterior.base.mean.shape[-1]
    with torch.no_grad():
        samples = posterior.sample(normal(20_000, 1, size, seed=4))[:, 0]
        low, high = samples.amin(0), samples.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
        axes = [
            torch.linspace(a, b, 401, dtype=torch.float64)
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        cell = torch.stack([axis[1] - axis[0] for axis in axes]).prod()
        grid = torch.cartesian_prod(*axes).reshape(-1, 1, size)
        mass = posterior.log_prob(grid).sum(-1).exp().sum() * cell
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_with_one_step_each_term_is_a_conditional_density_given_the_latents_before(
    randomize: Randomize,
) -> None:
    posterior = random_posterior(randomize, 3, depth=1, context=2, batch=1)
    others = normal(1, 3, seed=5)
    jacobian = torch.autograd.functional.jacobian(posterior.log_prob, others)[0, :, 0]
    assert not jacobian.triu(1).any()
    for latent in range(3):
        z = others.repeat(40_001, 1, 1)
        z[:, 0, latent] = torch.linspace(-400, 400, 40_001, dtype=torch.float64)
        with torch.no_grad():
            mass = posterior.log_prob(z)[:, 0, latent].exp().sum().item() * 0.02
        assert mass == pytest.approx(1, abs=1e-4)


def test_a_new_flow_leaves_the_gaussian_unchanged(randomize: Randomize) -> None:
    trained = random_posterior(randomize, 4, depth=3, context=2)
    posterior = IAFPosterior(
        trained.base, AutoregressiveFlow(4, 3, 8, context=2).double(), trained.context
    )
    noise = normal(3, 4, seed=4)
    for mine, gaussian in zip(
        posterior.sample_with_log_prob(noise), trained.base.sample_with_log_prob(noise), strict=True
    ):
        torch.testing.assert_close(mine, gaussian, rtol=0, atol=0)


@pytest.mark.parametrize("latents", [3, (2, 1, 2)])
def test_gradients_agree_with_finite_differences(randomize: Randomize, latents: Latents) -> None:
    posterior = random_posterior(randomize, latents, depth=2, context=1, batch=2)
    assert posterior.context is not None
    inputs = [
        posterior.base.mean,
        posterior.base.log_scale,
        posterior.context,
        normal(*posterior.base.mean.shape, seed=4),
    ]

    def terms(
        mean: Tensor, log_scale: Tensor, context: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = IAFPosterior(DiagonalGaussian(mean, log_scale), posterior.flow, context)
        return *made.sample_with_log_prob(noise), made.log_prob(noise)

    assert torch.autograd.gradcheck(terms, [value.requires_grad_() for value in inputs])


class FlowingEncoder(nn.Module):
    """An encoder of the flow's noise: another encoder's Gaussian over z, mapped by the flow."""

    def __init__(self, encoder: nn.Module, flow: AutoregressiveFlow) -> None:
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def forward(self, x: Tensor) -> IAFPosterior:
        return IAFPosterior(self.encoder(x), self.flow)


class FlowingDecoder(nn.Module):
    """A decoder of the flow's noise: another decoder of z, after the flow."""

    def __init__(self, decoder: nn.Module, flow: AutoregressiveFlow) -> None:
        super().__init__()
        self.decoder, self.flow = decoder, flow

    def log_prob(self, noise: Tensor, x: Tensor) -> Tensor:
        return self.decoder.log_prob(self.flow.sample(noise), x)  # type: ignore[operator]


@pytest.mark.parametrize("latents", [3, (3, 1, 1), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize(("depth", "mean_only"), [(1, False), (2, False), (3, True)])
def test_an_autoregressive_prior_on_z_and_an_iaf_posterior_on_its_noise_are_the_same_bound(
    randomize: Randomize,
    make_model: Callable[..., vlae.VLAE],
    latents: Latents,
    depth: int,
    mean_only: bool,
) -> None:
    size = latents if isinstance(latents, int) else math.prod(latents)
    model = make_model((1, 4, 4), "3x1", latents=size)
    flow = AutoregressiveFlow(latents, depth, 12, mean_only=mean_only).double()
    randomize(flow, seed=5)
    with_prior = VLAE(model.encoder, model.decoder, flow, size)
    with_posterior = VLAE(
        FlowingEncoder(model.encoder, flow),  # type: ignore[arg-type]
        FlowingDecoder(model.decoder, flow),  # type: ignore[arg-type]
        StandardNormal(),
        size,
    )
    x = (normal(6, 1, 4, 4) > 0).double()
    noise = normal(2, 6, size, seed=1)
    one, other = with_prior(x, noise), with_posterior(x, noise)
    assert (
        model.encoder(x).sample(noise) - flow.inverse(model.encoder(x).sample(noise))[0]
    ).abs().max() > 0.1
    for name in ("distortion", "rate", "elbo"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)
