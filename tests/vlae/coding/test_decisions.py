"""Binary decisions have the probabilities of the distributions that they stand for."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlae.coding.decisions import PRECISION, Decide, Known, digits, quantize
from vlae.coding.grid import STEP, _Normal, pop_normal, push_normal
from vlae.likelihood import BernoulliLikelihood, Likelihood, LogisticMixtureLikelihood


def log_probability(
    draw: Callable[[Decide], torch.Tensor], known: Known, rows: int
) -> torch.Tensor:
    """The log probability of known decisions, in nats, for each of ``rows``."""
    total = torch.zeros(rows, dtype=torch.float64)

    def decide(probability: torch.Tensor) -> torch.Tensor:
        bits = known(probability)
        chosen = torch.where(bits.bool(), probability, 1 - probability)
        total.add_(chosen.log().view(rows, -1).sum(-1))
        return bits

    draw(decide)
    return total


LIKELIHOODS: dict[str, tuple[Likelihood, int]] = {
    "bernoulli": (BernoulliLikelihood(3), 2),
    "grey": (LogisticMixtureLikelihood(1, 4), 256),
    "rgb": (LogisticMixtureLikelihood(3, 4), 256),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_decisions_on_a_pixel_have_the_probability_of_its_likelihood(name: str) -> None:
    likelihood, values = LIKELIHOODS[name]
    channels = 1 if name == "grey" else 3
    parameters = torch.randn(500, likelihood.num_parameters, dtype=torch.float64)
    x = torch.randint(values, (500, channels)) / (values - 1)
    x[:2] = torch.tensor([[0.0], [1.0]])  # the ends, which take the tails
    distribution = likelihood(parameters)
    found = log_probability(distribution.draw, Known(likelihood.digits(x)), 500)
    # log_prob sums over an image: here each pixel is one.
    expected = likelihood(parameters[:, None, None]).log_prob(x[:, None, None].double())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_pixel_is_drawn_back_from_its_digits(name: str) -> None:
    likelihood, values = LIKELIHOODS[name]
    channels = 1 if name == "grey" else 3
    x = torch.randint(values, (2, 50, channels)) / (values - 1)
    drawn = likelihood(torch.randn(2, 50, likelihood.num_parameters)).draw(
        Known(likelihood.digits(x))
    )
    assert torch.equal(drawn, x)


@pytest.mark.parametrize("name", ["bernoulli", "grey"])
def test_the_mode_is_the_most_probable_value(name: str) -> None:
    likelihood, values = LIKELIHOODS[name]
    if name == "bernoulli":
        likelihood = BernoulliLikelihood(1)
    parameters = torch.randn(40, likelihood.num_parameters, dtype=torch.float64)
    x = (torch.arange(values) / (values - 1)).double()
    logs = torch.stack(
        [
            likelihood(parameters[:, None, None]).log_prob(value.expand(40, 1, 1, 1))
            for value in x.unbind()
        ],
        -1,
    )
    assert torch.equal(likelihood(parameters).mode()[:, 0], x[logs.argmax(-1)])


def test_decisions_on_a_latent_have_the_mass_of_its_cell() -> None:
    mean = torch.tensor([0.0, 0.3, -5.0, 100.0, 0.1], dtype=torch.float64)
    scale = torch.tensor([1.0, 0.01, 0.2, 20.0, 3 * STEP], dtype=torch.float64)
    normal = _Normal.of(mean, scale)
    numbers = torch.floor((mean + scale * torch.randn(400, 5)) / STEP).long()
    for row in numbers:
        found = log_probability(normal.draw, Known(normal.digits(row)), 5)
        low, high = ((row + end) * STEP for end in (0, 1))
        law = torch.distributions.Normal(mean, scale)
        torch.testing.assert_close(found.exp(), law.cdf(high) - law.cdf(low), rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    mean=st.floats(-1e4, 1e4),
    scale=st.floats(1e-6, 1e4),
    z=st.integers(-(1 << 30), 1 << 30),
)
def test_any_latent_comes_back_however_improbable(
    make_stack: type, mean: float, scale: float, z: int
) -> None:
    stack = make_stack(200)
    before = stack.state
    # Such numbers are exact in float32 if they are not far from zero.
    value = torch.tensor([(z % (1 << 22) - (1 << 21) + 0.5) * STEP])
    given_mean, given_scale = torch.tensor([mean]), torch.tensor([scale])
    push_normal(stack, value, given_mean, given_scale)
    assert torch.equal(pop_normal(stack, given_mean, given_scale), value)
    assert stack.state == before


def test_probabilities_are_never_certain() -> None:
    found = quantize(torch.tensor([0.0, 1.0, 0.5, math.nan, 1e-30], dtype=torch.float64))
    top = 1 << PRECISION
    assert found.tolist() == [1, top - 1, top // 2, top // 2, 1]


def test_digits_begin_with_the_most_significant() -> None:
    assert [bit.item() for bit in digits(torch.tensor(6), 4)] == [0, 1, 1, 0]
