"""The likelihoods are normalized, agree with independent derivations, and stay finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlae.likelihood import Bernoulli, LogisticMixture, LogisticMixtureLikelihood

VALUES = torch.arange(256, dtype=torch.float64) / 255


def random_mixture(
    channels: int, mixtures: int, seed: int = 0, spread: float = 1.0, copies: int = 1
) -> LogisticMixture:
    """The distribution of a 1 x 1 image, repeated ``copies`` times along the batch."""
    likelihood = LogisticMixtureLikelihood(channels, mixtures)
    generator = torch.Generator().manual_seed(seed)
    parameters = spread * torch.randn(
        1, 1, likelihood.num_parameters, generator=generator, dtype=torch.float64
    )
    # Scales of about a tenth of the range.
    parameters[..., mixtures * (1 + channels) : mixtures * (1 + 2 * channels)] -= 2
    return likelihood(parameters.expand(copies, 1, 1, -1))


def pixels(*channels: Tensor) -> Tensor:
    """(n,) for each channel, or a single number -> (n, 1, 1, channels)."""
    return torch.stack(torch.broadcast_tensors(*channels), -1).reshape(-1, 1, 1, len(channels))


@given(st.integers(1, 6), st.floats(0.1, 30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_the_256_probabilities_of_a_grey_pixel_sum_to_one(
    mixtures: int, spread: float, seed: int
) -> None:
    log_prob = random_mixture(1, mixtures, seed, spread).log_prob(pixels(VALUES))
    assert log_prob.shape == (256,)
    assert torch.isfinite(log_prob).all()
    torch.testing.assert_close(
        log_prob.exp().sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("seed", range(3))
def test_each_channel_of_a_colour_pixel_is_normalized_given_the_channels_before(seed: int) -> None:
    mixture = random_mixture(3, 4, seed)

    def shorter(channels: int) -> LogisticMixture:
        """The marginal distribution of the first channels."""
        part = slice(0, channels)
        return LogisticMixture(
            mixture.logits,
            mixture.means[..., part, :],
            mixture.log_scales[..., part, :],
            mixture.coefficients[..., part, part, :],
        )

    red, green = VALUES[37], VALUES[201]
    given_both = mixture.log_prob(pixels(red, green, VALUES)).exp().sum()
    torch.testing.assert_close(
        given_both, shorter(2).log_prob(pixels(red, green)).exp().squeeze(), rtol=1e-10, atol=0
    )
    given_red = shorter(2).log_prob(pixels(red, VALUES)).exp().sum()
    torch.testing.assert_close(
        given_red, shorter(1).log_prob(pixels(red)).exp().squeeze(), rtol=1e-10, atol=0
    )
    # The distribution of green depends on red.
    other = shorter(2).log_prob(pixels(VALUES[200], VALUES)).log_softmax(0)
    assert (other - shorter(2).log_prob(pixels(red, VALUES)).log_softmax(0)).abs().max() > 0.1


def test_the_values_of_a_pixel_have_the_mass_between_their_midpoints() -> None:
    mean, scale = 0.3, 0.05
    log_scale = torch.tensor(scale).log().item()
    shaped = ((0.0, (1,)), (mean, (1, 1)), (log_scale, (1, 1)), (0.0, (1, 1, 1)))
    values = LogisticMixture(
        *(torch.full((1, 1, *shape), value, dtype=torch.float64) for value, shape in shaped)
    )
    midpoints, end = (2 * torch.arange(255) + 1) / 255 - 1, torch.tensor([torch.inf])
    edges = torch.cat([-end, midpoints, end]).double()
    mass = torch.sigmoid((edges - mean) / scale).diff()
    torch.testing.assert_close(values.log_prob(pixels(VALUES)).exp(), mass, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_parameters_give_finite_log_probs_and_gradients(
    dtype: torch.dtype, value: float, channels: int
) -> None:
    likelihood = LogisticMixtureLikelihood(channels, 3)
    for position in range(0, likelihood.num_parameters, 3):
        parameters = torch.zeros(1, 1, likelihood.num_parameters, dtype=dtype)
        parameters[..., position] = value
        parameters.requires_grad_()
        x = pixels(*[VALUES[[0, 1, 127, 254, 255]].to(dtype)] * channels)
        log_prob = likelihood(parameters).log_prob(x)
        (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(gradient).all()
        assert (log_prob <= 0).all()


def test_the_gradients_of_the_log_prob_agree_with_finite_differences() -> None:
    likelihood = LogisticMixtureLikelihood(3, 2)
    parameters = torch.randn(
        2,
        1,
        1,
        likelihood.num_parameters,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    x = pixels(*VALUES[torch.tensor([[0, 90], [255, 3], [17, 200]])])
    assert torch.autograd.gradcheck(
        lambda p: likelihood(p).log_prob(x), parameters.requires_grad_()
    )


@pytest.mark.parametrize(("channels", "mixtures"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_samples_are_as_frequent_as_their_probability(channels: int, mixtures: int) -> None:
    n, bins = 100_000, 16
    mixture = random_mixture(channels, mixtures, seed=5, copies=n)
    uniform = torch.rand(
        n, 1, 1, 1 + channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x = mixture.sample(uniform)
    assert x.shape == (n, 1, 1, channels)
    values = (x[:, 0, 0] * 255).round()
    torch.testing.assert_close(x[:, 0, 0] * 255, values, rtol=0, atol=1e-9)
    one = random_mixture(channels, mixtures, seed=5)
    # All values, or pairs of values, counted in bins: 16 for each channel.
    every = (
        pixels(*torch.meshgrid(*[VALUES] * channels, indexing="ij"))
        if channels == 2
        else pixels(VALUES)
    )
    every = every.reshape(-1, 1, 1, channels)
    place = bins ** torch.arange(channels)
    probability = torch.zeros(bins**channels, dtype=torch.float64)
    probability.index_add_(
        0, ((every[:, 0, 0] * 255).round().long() // bins) @ place, one.log_prob(every).exp()
    )
    counts = torch.bincount((values.long() // bins) @ place, minlength=bins**channels)
    assert (
        (counts - n * probability).abs() < 5 * (n * probability * (1 - probability)).sqrt() + 5
    ).all()
    assert (probability > 0.01).sum() > 5, "the test is vacuous if only few values are likely"


@given(st.lists(st.tuples(st.floats(-60, 60), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_bernoulli_log_prob_is_that_of_torch(pixels: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([logit for logit, _ in pixels], dtype=torch.float64).reshape(1, -1, 1, 1)
    x = torch.tensor([float(value) for _, value in pixels], dtype=torch.float64).reshape(
        1, -1, 1, 1
    )
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, 100.0, 200.0, 1e4])
def test_extreme_logits_give_finite_log_probs_and_gradients(
    dtype: torch.dtype, logit: float
) -> None:
    logits = torch.full((2, 1, 1, 1), logit, dtype=dtype, requires_grad=True)
    x = torch.tensor([0.0, 1.0], dtype=dtype).reshape(2, 1, 1, 1)
    log_prob = Bernoulli(logits).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert torch.isfinite(gradient).all()
    right, wrong = (log_prob[1], log_prob[0]) if logit > 0 else (log_prob[0], log_prob[1])
    assert right.abs() < 1e-40
    assert wrong.item() == pytest.approx(-abs(logit), rel=0.01)


def test_a_bernoulli_log_prob_sums_over_the_image_and_not_over_the_batch() -> None:
    logits = torch.randn(
        4, 3, 5, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x = torch.bernoulli(
        torch.full((3, 5, 6, 2), 0.5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(1),
    )
    expected = (
        torch.distributions.Bernoulli(logits=logits)
        .log_prob(x.expand(4, -1, -1, -1, -1))
        .sum((2, 3, 4))
    )
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected)


def test_bernoulli_samples_have_the_probabilities_of_the_logits() -> None:
    n = 200_000
    logits = torch.tensor([-5.0, -1.0, 0.0, 0.3, 2.0, 6.0]).reshape(1, 6, 1, 1)
    uniform = torch.rand(n, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = Bernoulli(logits).sample(uniform)
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    probability = torch.sigmoid(logits)[0]
    tolerance = 5 * (probability * (1 - probability) / n).sqrt()
    assert ((samples.mean(0) - probability).abs() < tolerance).all()


def test_a_certain_pixel_is_never_drawn_with_the_other_value() -> None:
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24]).reshape(3, 1, 1, 1)
    assert Bernoulli(torch.full((3, 1, 1, 1), 200.0)).sample(uniform).eq(1).all()
    assert Bernoulli(torch.full((3, 1, 1, 1), -200.0)).sample(uniform).eq(0).all()
