"""The depth of the flow selects the prior, which says whether its log density splits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vlae
from vlae.flow import AutoregressiveFlow
from vlae.prior import StandardNormal


def test_a_flow_of_depth_0_is_built_as_the_standard_normal(
    small_arguments: Callable[..., dict[str, Any]],
) -> None:
    prior = vlae.build(**small_arguments((1, 4, 4), "3x1", flow_depth=0)).prior
    assert isinstance(prior, StandardNormal)
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        prior.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(prior.sample(z), z)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_inverse_gives_the_noise_back_with_which_z_was_drawn_and_its_density(
    small_arguments: Callable[..., dict[str, Any]], depth: int
) -> None:
    prior = vlae.build(**small_arguments((1, 4, 4), "3x1", flow_depth=depth)).double().prior
    noise = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = prior.sample(noise)
    found, log_det = prior.inverse(z)
    torch.testing.assert_close(found, noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.distributions.Normal(0, 1).log_prob(found).sum(-1) + log_det.sum(-1),
        prior.log_prob(z).sum(-1),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_a_flow_of_any_other_depth_is_built_as_that_many_steps(
    small_arguments: Callable[..., dict[str, Any]], depth: int
) -> None:
    prior = vlae.build(**small_arguments((1, 4, 4), "3x1", flow_depth=depth)).prior
    assert isinstance(prior, AutoregressiveFlow)
    assert len(prior.steps) == depth


@pytest.mark.parametrize(
    ("flow_depth", "posterior_depth", "splits"),
    [
        (0, 0, True),
        (1, 0, True),
        (0, 1, True),
        (1, 1, True),
        (2, 0, False),
        (0, 2, False),
        (1, 3, False),
    ],
)
def test_the_rate_splits_over_latents_if_no_flow_has_more_than_one_step(
    make_model: Callable[..., vlae.VLAE], flow_depth: int, posterior_depth: int, splits: bool
) -> None:
    model = make_model((1, 4, 4), "3x1", flow_depth=flow_depth, posterior_depth=posterior_depth)
    posterior = model.encoder(torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    assert model.prior.splits_over_latents == (flow_depth <= 1)
    assert posterior.splits_over_latents == model.encoder.splits_over_latents
    assert posterior.splits_over_latents == (posterior_depth <= 1)
    assert model.rate_splits == splits
