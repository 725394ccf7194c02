"""Information agrees with closed forms, with quadrature, and with its inequalities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlae import Bound, estimate
from vlae.distributions import DiagonalGaussian, standard_normal_log_prob
from vlae.information import capacity, mutual_information

SLOPES = [2.0, 0.5, 0.0, 1.0]
"""The slope of each latent of ``Channel``."""

INFORMATION = [0.5 * math.log(1 + slope**2) for slope in SLOPES]
"""The exact I(x; z_i) of each latent of ``Channel``, in nats."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def capacity_of(posterior: DiagonalGaussian) -> Tensor:
    """The capacity from the moments over these images: (latents,)."""
    mean, log_scale = posterior.mean, posterior.log_scale
    return capacity(mean.var(0, correction=0), torch.exp(2 * log_scale).mean(0), log_scale.mean(0))


def posteriors(num_images: int, latents: int, seed: int) -> DiagonalGaussian:
    """Posteriors that differ in mean and scale, some latents much more than others."""
    strength = torch.logspace(-1, 1, latents, dtype=torch.float64)
    mean = strength * normal(num_images, latents, seed=seed) + 3
    return DiagonalGaussian(mean, 0.7 * normal(num_images, latents, seed=seed + 1) - 0.5)


class Channel(nn.Module):
    """x ~ N(0, I), q(z|x) = N(slope x, 1), and the prior N(0, spread^2).

    Its rates and information are known in closed form. It has the interface of a VLAE, for images
    of shape (batch, 1, 1, latents). It has no decoder: its distortion is 0.
    """

    def __init__(self, spread: Tensor) -> None:
        super().__init__()
        self.slope, self.spread = torch.tensor(SLOPES, dtype=torch.float64), spread

    def encoder(self, x: Tensor) -> DiagonalGaussian:
        mean = self.slope * x.flatten(1)
        return DiagonalGaussian(mean, torch.zeros_like(mean))

    def forward(self, x: Tensor, noise: Tensor) -> Bound:
        z, log_posterior = self.encoder(x).sample_with_log_prob(noise)
        return Bound(
            torch.zeros(z.shape[:-1]),
            log_posterior - standard_normal_log_prob(z / self.spread) + self.spread.log(),
        )

    def marginal_kl(self) -> Tensor:
        """KL(q(z) || p(z)) of each latent, where q(z) = N(0, slope^2 + 1)."""
        ratio = (self.slope.square() + 1) / self.spread.square()
        return 0.5 * (ratio - 1 - ratio.log())


@pytest.mark.parametrize(
    "spread", [[math.hypot(slope, 1) for slope in SLOPES], [1.0] * 4, [3.0, 1.0, 0.5, 2.0]]
)
def test_rates_capacities_and_information_of_a_gaussian_channel_are_exact(
    spread: list[float],
) -> None:
    model = Channel(torch.tensor(spread, dtype=torch.float64))
    num_images = 4000
    x, noise = normal(num_images, 1, 1, len(SLOPES)), normal(8, num_images, len(SLOPES), seed=1)
    posterior = model.encoder(x)
    rates = estimate(model, x, noise, max_pairs=2**16).rate_per_latent
    exact = torch.tensor(INFORMATION, dtype=torch.float64)

    error = rates.std(0) / num_images**0.5
    # The error is 0 for a slope of 0; 1e-9 is for rounding.
    assert ((rates.mean(0) - exact - model.marginal_kl()).abs() < 4 * error + 1e-9).all()
    assert ((capacity_of(posterior) - exact).abs() < 4 / num_images**0.5).all()

    information = mutual_information(posterior, noise[0])
    error = information.std() / num_images**0.5
    # The bias is negligible: there are far more images than exp(I).
    assert abs(information.mean() - exact.sum()) < 4 * error
    beyond = rates.sum(1) - information
    assert abs(beyond.mean() - model.marginal_kl().sum()) < 4 * beyond.std() / num_images**0.5


def test_the_estimate_for_three_images_is_unbiased() -> None:
    posterior = DiagonalGaussian(
        torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64),
        torch.tensor([[0.0], [-1.0], [0.5]], dtype=torch.float64),
    )
    z = torch.linspace(-12, 16, 20_001, dtype=torch.float64)[:, None]
    by_image = DiagonalGaussian(posterior.mean.T, posterior.log_scale.T)
    log_densities = by_image.log_prob(z)  # (points, images)
    log_marginal = torch.logsumexp(log_densities, 1) - math.log(3)
    integrand = (log_densities.exp() * (log_densities - log_marginal[:, None])).mean(1)
    exact = integrand.sum() * (z[1] - z[0])
    terms = [mutual_information(posterior, noise) for noise in normal(600, 3, 1)]
    draws = torch.stack(terms).mean(1)
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5
    assert exact < capacity_of(posterior).item()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000), st.floats(-3, 6))
def test_no_term_exceeds_the_log_of_the_number_of_images(
    num_images: int, latents: int, seed: int, log_distance: float
) -> None:
    posterior = posteriors(num_images, latents, seed)
    apart = DiagonalGaussian(posterior.mean * math.exp(log_distance), posterior.log_scale)
    values = mutual_information(apart, normal(num_images, latents, seed=seed + 2))
    assert values.shape == (num_images,)
    assert (values <= math.log(num_images)).all()


def test_distinct_posteriors_hold_log_n_nats_and_equal_ones_none() -> None:
    noise, log_scale = normal(50, 3), torch.zeros(50, 3, dtype=torch.float64)
    apart = DiagonalGaussian(
        100 * torch.arange(50, dtype=torch.float64)[:, None].expand(50, 3), log_scale
    )
    torch.testing.assert_close(
        mutual_information(apart, noise), torch.full((50,), math.log(50), dtype=torch.float64)
    )
    equal = DiagonalGaussian(torch.full_like(log_scale, 7.0), log_scale)
    torch.testing.assert_close(
        mutual_information(equal, noise), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        capacity_of(equal), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("log_scale", [-5.0, 0.0])
def test_the_estimate_equals_its_definition_for_any_number_of_rows_and_any_order(
    offset: float, log_scale: float
) -> None:
    posterior, noise = posteriors(30, 4, seed=5), normal(30, 4, seed=9)
    posterior = DiagonalGaussian(
        posterior.mean + offset, posterior.log_scale.clamp(max=0) + log_scale
    )
    z = posterior.sample(noise)
    log_densities = posterior.log_prob(z[:, None]).sum(-1)  # (code, image)
    expected = log_densities.diagonal() - torch.logsumexp(log_densities, 1) + math.log(30)
    for rows in (1, 7, 30, 1000):
        torch.testing.assert_close(
            mutual_information(posterior, noise, rows), expected, rtol=1e-6, atol=1e-6
        )
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = mutual_information(
        DiagonalGaussian(posterior.mean[order], posterior.log_scale[order]), noise[order]
    )
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 1000))
def test_the_information_of_the_code_is_below_the_sum_of_the_capacities(
    num_images: int, latents: int, seed: int
) -> None:
    posterior = posteriors(num_images, latents, seed)
    noise = normal(40, num_images, latents, seed=seed + 2)
    draws = torch.stack([mutual_information(posterior, each) for each in noise]).mean(1)
    capacities = capacity_of(posterior)
    assert (capacities > 0).all()
    assert draws.mean() < capacities.sum() + 4 * draws.std() / len(draws) ** 0.5


def test_the_capacity_is_the_least_rate_under_a_gaussian_prior() -> None:
    posterior = posteriors(20, 3, seed=3)

    def rate(center: Tensor, spread: Tensor) -> Tensor:
        """The mean over images of KL(q(z_i|x) || N(center, spread^2)): (latents,)."""
        prior = torch.distributions.Normal(center, spread)
        return torch.distributions.kl_divergence(
            torch.distributions.Normal(posterior.mean, posterior.log_scale.exp()), prior
        ).mean(0)

    center = posterior.mean.mean(0)
    spread = (
        posterior.mean.var(0, correction=0) + torch.exp(2 * posterior.log_scale).mean(0)
    ).sqrt()
    torch.testing.assert_close(capacity_of(posterior), rate(center, spread))
    for shift in (-0.1, 0.1):
        assert (rate(center + shift, spread) > capacity_of(posterior)).all()
        assert (rate(center, spread * math.exp(shift)) > capacity_of(posterior)).all()
