"""The diagonal Gaussian agrees with that of torch."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlae.distributions import DiagonalGaussian, standard_normal_log_prob

numbers = st.floats(-20, 20)


@given(numbers, st.floats(-6, 4), numbers)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_gaussian_log_prob_is_that_of_torch(mean: float, log_scale: float, z: float) -> None:
    mean_, log_scale_, z_ = (
        torch.tensor([value], dtype=torch.float64) for value in (mean, log_scale, z)
    )
    expected = torch.distributions.Normal(mean_, log_scale_.exp()).log_prob(z_)
    torch.testing.assert_close(
        DiagonalGaussian(mean_, log_scale_).log_prob(z_), expected, rtol=1e-10, atol=1e-10
    )


def test_standard_normal_log_prob_is_that_of_torch() -> None:
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(
        standard_normal_log_prob(z), torch.distributions.Normal(0, 1).log_prob(z)
    )


def test_a_gaussian_sample_has_the_mean_and_scale_of_the_distribution() -> None:
    gaussian = DiagonalGaussian(torch.tensor([3.0, -1.0]), torch.tensor([0.5, -2.0]))
    n = 200_000
    samples = gaussian.sample(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))
    scale = gaussian.log_scale.exp()
    assert ((samples.mean(0) - gaussian.mean).abs() < 5 * scale / math.sqrt(n)).all()
    assert ((samples.std(0) / scale - 1).abs() < 5 / math.sqrt(2 * n)).all()


def test_gaussian_log_prob_has_the_gradients_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    mean, log_scale, z = inputs
    ours = torch.autograd.grad(DiagonalGaussian(mean, log_scale).log_prob(z).sum(), inputs)
    theirs = torch.autograd.grad(
        torch.distributions.Normal(mean, log_scale.exp()).log_prob(z).sum(), inputs
    )
    torch.testing.assert_close(ours, theirs)
