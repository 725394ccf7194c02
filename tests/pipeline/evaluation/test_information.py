"""The report does not depend on the batches, memory stays bounded, and JSON contains no NaN."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation import information
from pipeline.evaluation.information import Information
from vlae import Estimate
from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow
from vlae.information import mutual_information
from vlae.posterior import IAFPosterior

LATENTS, NUM_IMAGES = 6, 40
GENERATOR = torch.Generator().manual_seed(0)
MEAN = (
    torch.randn(NUM_IMAGES, LATENTS, generator=GENERATOR)
    * torch.tensor([2.0, 1.0, 0.5, 0.2, 0.02, 0.0])
    + 1
)
LOG_SCALE = 0.5 * torch.randn(NUM_IMAGES, LATENTS, generator=GENERATOR) - 0.5
RATES = torch.randn(NUM_IMAGES, LATENTS, generator=GENERATOR) + 1
NOISE = torch.randn(NUM_IMAGES, LATENTS, generator=GENERATOR)


def account(
    ends: Sequence[int], groups: int = 1, rate_splits: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report on the images above in batches that end at ``ends``: the whole and the latents."""
    information = Information(groups)
    for start, stop in zip([0, *ends], ends, strict=False):
        part = slice(start, stop)
        zeros = torch.zeros(stop - start)
        information.add(
            DiagonalGaussian(MEAN[part], LOG_SCALE[part]),
            NOISE[part],
            Estimate(zeros, RATES[part], zeros),
        )
    values = information.report(rate_splits)
    return values, values.pop("latents")


def kept(num_images: int) -> tuple[Tensor, Tensor]:
    """The expected information and rate of the first images."""
    first = slice(num_images)
    values = mutual_information(DiagonalGaussian(MEAN[first], LOG_SCALE[first]), NOISE[first])
    return values, RATES[first].double().sum(1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, NUM_IMAGES - 1), max_size=8, unique=True))
def test_the_report_does_not_depend_on_the_batches(ends: list[int]) -> None:
    whole, of_latents = account([NUM_IMAGES])
    values, lists = account([*sorted(ends), NUM_IMAGES])
    assert values == pytest.approx(whole, rel=1e-11, abs=1e-11)
    assert lists.keys() == of_latents.keys()
    for name, expected in of_latents.items():
        assert lists[name] == pytest.approx(expected, rel=1e-11, abs=1e-11), name


def test_the_figures_are_those_of_the_images() -> None:
    values, latents = account([NUM_IMAGES])
    mean, log_scale, rates = (
        MEAN.double().numpy(),
        LOG_SCALE.double().numpy(),
        RATES.double().numpy(),
    )
    np.testing.assert_allclose(latents["code_variance"], mean.var(0), rtol=1e-9, atol=1e-12)
    assert (
        values["active_units"] == 4
    )  # the spreads 2, 1, 0.5 and 0.2 are above 0.1, 0.02 and 0 are not
    capacities = 0.5 * np.log(mean.var(0) + np.exp(2 * log_scale).mean(0)) - log_scale.mean(0)
    np.testing.assert_allclose(latents["capacity_nats"], capacities, rtol=1e-9)
    assert values["capacity_nats"] == pytest.approx(capacities.sum())
    np.testing.assert_allclose(latents["rate_nats"], rates.mean(0))
    np.testing.assert_allclose(
        latents["rate_nats_se"], rates.std(0, ddof=1) / math.sqrt(NUM_IMAGES)
    )
    information, rate = kept(NUM_IMAGES)
    beyond = rate - information
    assert values["mutual_information_images"] == NUM_IMAGES
    assert values["mutual_information_nats"] == pytest.approx(information.mean().item())
    assert values["mutual_information_nats_se"] == pytest.approx(
        information.std().item() / math.sqrt(NUM_IMAGES)
    )
    assert values["mutual_information_nats"] <= math.log(NUM_IMAGES)
    assert values["marginal_kl_nats_se"] == pytest.approx(
        beyond.std().item() / math.sqrt(NUM_IMAGES)
    )
    assert values["mutual_information_nats"] + values["marginal_kl_nats"] == pytest.approx(
        rates.sum(1).mean()
    )
    for holder in (values, latents):
        for name in [name for name in holder if name.endswith("_bits")]:
            nats = np.array(holder[name.replace("_bits", "_nats")])
            np.testing.assert_allclose(holder[name], nats / math.log(2), rtol=1e-12)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_the_rate_of_a_group_is_that_of_its_neighbouring_latents(groups: int) -> None:
    _, latents = account([7, NUM_IMAGES], groups)
    parts = RATES.double().numpy().reshape(NUM_IMAGES, groups, -1).sum(2)
    np.testing.assert_allclose(latents["group_rate_nats"], parts.mean(0))
    np.testing.assert_allclose(
        latents["group_rate_nats_se"], parts.std(0, ddof=1) / math.sqrt(NUM_IMAGES)
    )
    assert sum(latents["group_rate_nats"]) == pytest.approx(sum(latents["rate_nats"]))


def test_an_iaf_posterior_has_no_figures_that_need_its_density() -> None:
    torch.manual_seed(0)
    flow = AutoregressiveFlow(LATENTS, 2, hidden=16)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    posterior, zeros = (
        IAFPosterior(DiagonalGaussian(MEAN, LOG_SCALE), flow),
        torch.zeros(NUM_IMAGES),
    )
    information = Information()
    with torch.no_grad():
        information.add(posterior, NOISE, Estimate(zeros, RATES, zeros))
    values = information.report(rate_splits=False)
    variance = posterior.code.detach().double().numpy().var(0)
    np.testing.assert_allclose(values["latents"].pop("code_variance"), variance, rtol=1e-9)
    assert values == {"active_units": int((variance > 0.01).sum()), "latents": {}}


def test_a_rate_that_does_not_split_over_latents_has_no_rate_per_latent() -> None:
    whole, parts = account([NUM_IMAGES], rate_splits=False)
    assert not [name for name in parts if "rate" in name]
    assert whole == account([NUM_IMAGES])[0]


@pytest.mark.parametrize(
    "ends", [[NUM_IMAGES], [5, 12, NUM_IMAGES], [12, NUM_IMAGES], [*range(1, NUM_IMAGES + 1)]]
)
def test_only_the_first_images_are_compared_with_each_other(
    ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(information, "MAX_IMAGES", 12)
    values, latents = account(ends)
    found, rate = kept(12)
    assert values["mutual_information_images"] == 12
    assert values["mutual_information_nats"] == pytest.approx(found.mean().item())
    assert values["marginal_kl_nats"] == pytest.approx((rate - found).mean().item())
    np.testing.assert_allclose(
        latents["code_variance"], MEAN.double().numpy().var(0), rtol=1e-9, atol=1e-12
    )


def test_a_single_image_has_no_errors_and_no_information() -> None:
    values, latents = account([1], groups=2)
    json.dumps([values, latents], allow_nan=False)
    assert values["mutual_information_nats"] == pytest.approx(0, abs=1e-12)
    assert values["mutual_information_nats_se"] is None
    assert latents["rate_nats_se"] == [None] * LATENTS
    assert latents["group_rate_nats_se"] == [None] * 2
    assert values["active_units"] == 0
    assert latents["capacity_nats"] == pytest.approx([0] * LATENTS, abs=1e-12)
