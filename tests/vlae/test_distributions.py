"""The two distributions agree with torch's own, and stay finite where probabilities do not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlae.distributions import Bernoulli, DiagonalGaussian, standard_normal_log_prob

numbers = st.floats(-20, 20)


@given(numbers, st.floats(-6, 4), numbers)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_gaussian_log_prob_is_that_of_torch(mean: float, log_scale: float, z: float) -> None:
    mean_, log_scale_, z_ = (torch.tensor([value], dtype=torch.float64) for value in (mean, log_scale, z))
    expected = torch.distributions.Normal(mean_, log_scale_.exp()).log_prob(z_)
    torch.testing.assert_close(DiagonalGaussian(mean_, log_scale_).log_prob(z_), expected, rtol=1e-10, atol=1e-10)


def test_standard_normal_log_prob_is_that_of_torch() -> None:
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(standard_normal_log_prob(z), torch.distributions.Normal(0, 1).log_prob(z))


def test_a_gaussian_sample_has_the_mean_and_scale_of_the_distribution() -> None:
    gaussian = DiagonalGaussian(torch.tensor([3.0, -1.0]), torch.tensor([0.5, -2.0]))
    n = 200_000
    samples = gaussian.sample(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))
    scale = gaussian.log_scale.exp()
    assert ((samples.mean(0) - gaussian.mean).abs() < 5 * scale / math.sqrt(n)).all()
    assert ((samples.std(0) / scale - 1).abs() < 5 / math.sqrt(2 * n)).all()


def test_gaussian_log_prob_has_the_gradients_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mean, log_scale, z = inputs
    ours = torch.autograd.grad(DiagonalGaussian(mean, log_scale).log_prob(z).sum(), inputs)
    theirs = torch.autograd.grad(torch.distributions.Normal(mean, log_scale.exp()).log_prob(z).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


@given(st.lists(st.tuples(st.floats(-60, 60), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_bernoulli_log_prob_is_that_of_torch(pixels: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([logit for logit, _ in pixels], dtype=torch.float64).reshape(1, -1, 1, 1)
    x = torch.tensor([float(value) for _, value in pixels], dtype=torch.float64).reshape(1, -1, 1, 1)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, 100.0, 200.0, 1e4])
def test_extreme_logits_give_finite_log_probs_and_gradients(dtype: torch.dtype, logit: float) -> None:
    logits = torch.full((2, 1, 1, 1), logit, dtype=dtype, requires_grad=True)
    x = torch.tensor([0.0, 1.0], dtype=dtype).reshape(2, 1, 1, 1)
    log_prob = Bernoulli(logits).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert torch.isfinite(gradient).all()
    right, wrong = (log_prob[1], log_prob[0]) if logit > 0 else (log_prob[0], log_prob[1])
    assert right.abs() < 1e-40
    assert wrong.item() == pytest.approx(-abs(logit), rel=0.01)


def test_a_bernoulli_sum_runs_over_the_image_and_not_over_the_batch() -> None:
    logits = torch.randn(4, 3, 5, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.bernoulli(torch.full((3, 5, 6, 2), 0.5, dtype=torch.float64), generator=torch.Generator().manual_seed(1))
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x.expand(4, -1, -1, -1, -1)).sum((2, 3, 4))
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


def test_certain_pixels_are_never_drawn_otherwise() -> None:
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24]).reshape(3, 1, 1, 1)
    assert Bernoulli(torch.full((3, 1, 1, 1), 200.0)).sample(uniform).eq(1).all()
    assert Bernoulli(torch.full((3, 1, 1, 1), -200.0)).sample(uniform).eq(0).all()
