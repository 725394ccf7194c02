"""Codes of which only the first latents are sent are codes of a model of their own."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vlae
from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow, mean_and_log_scale

MakeModel = Callable[..., vlae.VLAE]
PRIORS: dict[str, dict[str, Any]] = {
    "N(0, I)": {"flow_depth": 0},
    "AF": {"flow_depth": 1},
    "AF mean-only": {"flow_depth": 1, "flow_mean_only": True},
}
CELLS = 401
"""Points of a latent's axis, of which the integrals below are sums."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_normal(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, log_scale.exp()).log_prob(z)


def first_of_prior(model: vlae.VLAE) -> tuple[Tensor, Tensor]:
    """The mean and log scale of the first latent under the prior."""
    if not isinstance(model.prior, AutoregressiveFlow):
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    outputs = model.prior.steps[0](torch.zeros(1, model.latents, dtype=torch.float64))
    mean, log_scale = mean_and_log_scale(outputs)
    return mean[0, 0], log_scale[0, 0]


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_the_bound_of_one_latent_is_that_of_the_model_with_this_latent_alone(
    name: str, make_model: MakeModel, all_images: Callable[..., Tensor]
) -> None:
    """Every image of 2 x 2 pixels, and every value of the latent that matters.

    With p_1(x) = int p(z_1) p(x | z_1, 0) dz_1, the code length is -log p_1(x) +
    KL(q(z_1|x) || p_1(z_1|x)). All of it is summed here, without the model's bound.
    """
    model, x = make_model((1, 2, 2), "2x1", latents=3, **PRIORS[name]), all_images(1, 2, 2)
    axis = torch.linspace(-12, 12, CELLS, dtype=torch.float64)
    step = (axis[1] - axis[0]).item()
    z = torch.zeros(CELLS, 1, 3, dtype=torch.float64)
    z[:, 0, 0] = axis
    mean, log_scale = first_of_prior(model)
    log_prior = log_normal(axis, mean, log_scale)
    log_likelihood = model.decoder(z.expand(-1, len(x), -1), x).log_prob(x.permute(0, 2, 3, 1))
    log_joint = log_prior[:, None] + log_likelihood  # (CELLS, images)
    log_marginal = torch.logsumexp(log_joint, 0) + math.log(step)
    assert log_marginal.exp().sum().item() == pytest.approx(1, abs=1e-9)

    posterior = model.encoder(x)
    assert isinstance(posterior, DiagonalGaussian)
    log_q = log_normal(axis[:, None], posterior.mean[:, 0], posterior.log_scale[:, 0])
    divergence = (step * log_q.exp() * (log_q - (log_joint - log_marginal))).sum(0)
    rate = (step * log_q.exp() * (log_q - log_prior[:, None])).sum(0)

    # The model's bound at equidistant values of its first latent, weighted by their density.
    noise = torch.zeros(CELLS, len(x), 3, dtype=torch.float64)
    noise[..., 0] = (axis[:, None] - posterior.mean[:, 0]) * torch.exp(-posterior.log_scale[:, 0])
    bound = model(x, noise, 1)
    weight = step * log_q.exp()
    exact = log_marginal - divergence
    torch.testing.assert_close((weight * bound.elbo).sum(0), exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((weight * bound.rate).sum(0), rate, rtol=1e-7, atol=1e-7)
    assert (divergence > 0).all()


@pytest.mark.parametrize("name", PRIORS)
def test_with_all_latents_sent_it_is_the_ordinary_bound_bit_for_bit(
    name: str, make_model: MakeModel
) -> None:
    model = make_model((1, 4, 5), "3x1", latents=4, dtype=torch.float32, **PRIORS[name])
    x, noise = torch.bernoulli(torch.full((6, 1, 4, 5), 0.5)), normal(3, 6, 4).float()
    ordinary = model(x, noise)
    for sent in (4, torch.full((6,), 4)):
        bound = model(x, noise, sent)
        assert torch.equal(bound.distortion, ordinary.distortion)
        assert torch.equal(bound.rate_per_latent, ordinary.rate_per_latent)


@pytest.mark.parametrize("name", [*PRIORS, "IAF"])
def test_latents_that_are_not_sent_change_nothing_and_cost_nothing(
    name: str, make_model: MakeModel
) -> None:
    arguments = PRIORS.get(name, {"flow_depth": 0, "posterior_depth": 1})
    model = make_model((1, 3, 4), "3x1", latents=4, **arguments)
    x = torch.bernoulli(torch.full((5, 1, 3, 4), 0.5, dtype=torch.float64))
    noise = normal(5, 4)
    other = noise.clone()
    other[:, 2:] = normal(5, 2, seed=1)
    bound, same = model(x, noise, 2), model(x, other, 2)
    assert torch.equal(bound.elbo, same.elbo)
    assert (bound.rate_per_latent[:, 2:] == 0).all()
    assert torch.equal(bound.rate_per_latent[:, :2], model(x, noise).rate_per_latent[:, :2])
    assert not torch.equal(model(x, noise).distortion, model(x, other).distortion)
    # So the encoder learns nothing about them.
    bound.elbo.sum().backward()
    slopes = model.encoder.head.weight.grad.abs().sum(1).unflatten(0, (2, 4))
    assert (slopes[:, :2] > 0).all()
    if name != "IAF":  # in which they may move those that are sent, through the context
        assert (slopes[:, 2:] == 0).all()


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_the_rate_is_that_of_a_code_whose_other_latents_come_from_the_prior(
    name: str, make_model: MakeModel
) -> None:
    """log q(z_1, z_2|x) p(z_3, z_4 | z_1, z_2) - log p(z) does not depend on the drawn latents."""
    model = make_model((1, 3, 4), "3x1", latents=4, **PRIORS[name])
    x = torch.bernoulli(torch.full((5, 1, 3, 4), 0.5, dtype=torch.float64))
    noise = normal(5, 4)
    posterior = model.encoder(x)
    z = posterior.sample(noise)
    flow = model.prior if isinstance(model.prior, AutoregressiveFlow) else None
    for number in (2, 3):  # draw the others, one given those before it
        mean, log_scale = (
            (torch.zeros(5).double(), torch.zeros(5).double())
            if flow is None
            else (each[:, number] for each in mean_and_log_scale(flow.steps[0](z)))
        )
        z[:, number] = mean + log_scale.exp() * normal(5, seed=number)
    log_prior = model.prior.log_prob(z)
    log_code = posterior.log_prob(z)[:, :2].sum(1) + log_prior[:, 2:].sum(1)
    expected = log_code - log_prior.sum(1)
    torch.testing.assert_close(model(x, noise, 2).rate, expected, rtol=1e-10, atol=1e-10)


def test_each_image_may_send_another_number(make_model: MakeModel) -> None:
    model = make_model((1, 3, 4), "3x1", latents=4, flow_depth=1)
    x = torch.bernoulli(torch.full((5, 1, 3, 4), 0.5, dtype=torch.float64))
    noise, sent = normal(3, 5, 4), torch.tensor([0, 1, 2, 3, 4])
    together = model(x, noise, sent)
    for number in range(5):
        alone = model(x[number : number + 1], noise[:, number : number + 1], number)
        torch.testing.assert_close(alone.elbo[:, 0], together.elbo[:, number], rtol=0, atol=1e-10)
    rates = model.rate_per_latent(x, noise[0], sent)
    assert torch.equal(rates, together.rate_per_latent[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"flow_depth": 2},
        {"flow_depth": 0, "posterior_depth": 2},
        {"flow_depth": 1, "code": "maps", "latents": 1},
    ],
    ids=["deep flow", "deep posterior", "maps"],
)
def test_codes_that_cannot_be_cut_are_refused(
    arguments: dict[str, Any], make_model: MakeModel
) -> None:
    model = make_model((1, 4, 4), "3x1", **{"flow_hidden": 16} | arguments)
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="flow_depth and posterior_depth of 0 or 1"):
        model(x, normal(2, model.latents), 1)


@given(latents=st.integers(1, 300))
def test_one_code_is_sent_whole_and_the_other_is_cut_at_every_scale(latents: int) -> None:
    count = 4000
    whole, cut = vlae.draw_sent((torch.arange(count) + 0.5) / count, latents)
    assert whole.dtype == cut.dtype == torch.int64
    assert whole.tolist() == [latents] * count
    assert ((cut >= 1) & (cut <= max(1, latents - 1))).all()
    for power in range(latents.bit_length()):
        # At most 2^power - 1 latents are as likely as the logarithm of 2^power is long.
        share = (cut < 2**power).double().mean().item()
        expected = power * math.log(2) / math.log(latents) if latents > 1 else 0.0
        assert share == pytest.approx(expected, abs=2 / count)
