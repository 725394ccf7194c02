"""Hard free bits put a floor under each group's rate; soft free bits steer the rate to a target."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlae
from vlae import Bound, SoftFreeBits, group_rates, training_loss

INTERVAL, FACTOR = SoftFreeBits.INTERVAL, SoftFreeBits.FACTOR


def a_bound(batch: int, latents: int) -> Bound:
    generator = torch.Generator().manual_seed(latents)
    rates = torch.randn(batch, latents, dtype=torch.float64, generator=generator) + 1
    return Bound(
        torch.randn(batch, dtype=torch.float64, generator=generator).requires_grad_(),
        rates.requires_grad_(),
    )


# --- groups ---


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.floats(0, 20), st.floats(0.01, 1)
)
def test_every_group_has_an_equal_share_of_the_floor(
    batch: int, groups: int, size: int, free_nats: float, weight: float
) -> None:
    bound = a_bound(batch, groups * size)
    rates = group_rates(bound.rate_per_latent, groups).detach()
    assert rates.tolist() == pytest.approx(
        [
            bound.rate_per_latent[:, first : first + size].sum(1).mean().item()
            for first in range(0, groups * size, size)
        ]
    )
    loss = training_loss(bound, rates, free_nats, weight)
    expected = sum(max(free_nats / groups, rate) for rate in rates.tolist())
    assert loss.item() == pytest.approx(bound.distortion.mean().item() + weight * expected)
    of_distortion, of_rates = torch.autograd.grad(loss, list(bound))
    torch.testing.assert_close(of_distortion, torch.full_like(of_distortion, 1 / batch))
    active = (rates >= free_nats / groups).repeat_interleave(size)
    torch.testing.assert_close(of_rates, (active.double() * weight / batch).expand_as(of_rates))


def test_one_group_is_the_whole_code() -> None:
    bound = a_bound(7, 6)
    rates = group_rates(bound.rate_per_latent, 1)
    torch.testing.assert_close(rates, bound.rate.mean()[None])
    for free_nats in (0.0, 100.0):
        together = training_loss(bound, bound.rate.mean().detach(), free_nats, 0.5)
        assert torch.equal(training_loss(bound, rates.detach(), free_nats, 0.5), together)


# --- soft free bits ---


def after(soft: SoftFreeBits, rate: float, steps: int) -> float:
    for _ in range(steps):
        soft.update(torch.tensor(rate))
    return soft.gamma.item()


def test_gamma_changes_by_ten_percent_at_a_time_and_never_exceeds_one() -> None:
    soft = SoftFreeBits(target=10.0)
    assert after(soft, 50.0, 5 * INTERVAL) == 1
    soft = SoftFreeBits(target=10.0)
    assert after(soft, 5.0, INTERVAL - 1) == 1
    assert after(soft, 5.0, 1) == pytest.approx(1 / FACTOR)
    assert after(soft, 5.0, 2 * INTERVAL) == pytest.approx(FACTOR**-3)
    # The averaged rate takes several intervals to rise above the target.
    weights = [after(soft, 30.0, INTERVAL) for _ in range(6)]
    assert weights == sorted(weights)
    assert weights[-1] == 1


@pytest.mark.parametrize(
    ("rate", "changes"), [(9.9, True), (10.1, False), (10.4, False), (10.6, True)]
)
def test_gamma_is_constant_between_the_target_and_five_percent_above(
    rate: float, changes: bool
) -> None:
    soft = SoftFreeBits(target=10.0)
    after(soft, 0.0, 10 * INTERVAL)
    after(soft, rate, 12 * INTERVAL)
    settled = soft.gamma.item()
    assert (after(soft, rate, 2 * INTERVAL) != settled) == changes


def test_a_rate_that_is_not_finite_changes_nothing() -> None:
    soft = SoftFreeBits(target=10.0)
    after(soft, 3.0, INTERVAL + INTERVAL // 2)
    before = soft.state_dict()
    for bad in (math.nan, math.inf, -math.inf):
        after(soft, bad, INTERVAL)
    assert all(torch.equal(value, before[name]) for name, value in soft.state_dict().items())


def test_restored_soft_free_bits_continue_bit_for_bit() -> None:
    rates = torch.rand(10 * INTERVAL, generator=torch.Generator().manual_seed(0)) * 15
    whole, restored = SoftFreeBits(10.0), SoftFreeBits(10.0)
    for number, rate in enumerate(rates):
        if number == len(rates) // 3:
            restored.load_state_dict(
                {name: value.clone() for name, value in whole.state_dict().items()}
            )
        if number >= len(rates) // 3:
            restored.update(rate)
        whole.update(rate)
        if number >= len(rates) // 3:
            assert torch.equal(whole.gamma, restored.gamma)
    assert whole.gamma < 1


def test_an_update_reads_no_value_from_the_device() -> None:
    soft = SoftFreeBits(10.0, torch.device("meta"))  # tensors on meta have no values to read
    for _ in range(INTERVAL):
        soft.update(torch.empty((), device="meta"))
    assert soft.gamma.device.type == "meta"


SIZE = 6


def bars(count: int, generator: torch.Generator) -> Tensor:
    """Images, (count, 1, 6, 6), of a white bar, upright or lying, with a few pixels flipped."""
    images = torch.zeros(count, SIZE, SIZE)
    places = torch.randint(SIZE, (count,), generator=generator)
    images[torch.arange(count), places] = 1
    upright = torch.rand(count, generator=generator) < 0.5
    images[upright] = images[upright].mT
    flipped = torch.rand(images.shape, generator=generator) < 0.03
    return (images + flipped).remainder(2)[:, None]


def test_soft_free_bits_raise_the_rate_of_a_model_to_the_target() -> None:
    target = 3.5
    torch.manual_seed(0)
    model = vlae.build(
        image_shape=(1, SIZE, SIZE), window="3x1", latents=4, flow_depth=0, encoder_channels=8,
        decoder_channels=8, decoder_maps=4, decoder_features=16, decoder_blocks=1,
    )  # fmt: skip
    optimizer, soft = (
        torch.optim.Adam(model.parameters(), lr=3e-3, fused=True),
        SoftFreeBits(target),
    )
    generator, rates = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        bound = model(bars(16, generator), torch.randn(16, 4, generator=generator))
        rate = bound.rate.mean().detach()
        optimizer.zero_grad()
        training_loss(bound, rate, 0.0, soft.gamma).backward()
        optimizer.step()
        soft.update(rate)
        rates.append(rate.item())
    assert sum(rates[-300:]) / 300 == pytest.approx(target, rel=0.1)
    assert 0 < soft.gamma < 1, "the test is vacuous if the model would choose that rate anyway"


# --- several codes of an image ---


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.floats(0, 4))
def test_the_loss_of_several_codes_is_the_mean_of_the_losses_of_each(
    samples: int, batch: int, groups: int, free_nats: float
) -> None:
    each = [a_bound(batch, 2 * groups) for _ in range(samples)]
    together = Bound(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    rates = group_rates(together.rate_per_latent, groups).detach()
    expected = torch.stack([training_loss(bound, rates, free_nats, 0.5) for bound in each]).mean()
    torch.testing.assert_close(training_loss(together, rates, free_nats, 0.5), expected)
    whole = training_loss(together, together.rate.mean().detach(), 0.0, 1.0)
    torch.testing.assert_close(whole, -together.elbo.mean())


@pytest.mark.parametrize("shape", [(4,), (0,), (3, 1), (2, 3)])
def test_rates_that_are_not_those_of_equal_groups_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mean_rates has the shape"):
        training_loss(a_bound(5, 6), torch.zeros(shape), 1.0, 1.0)


def test_soft_free_bits_take_the_rate_of_the_whole_code_only() -> None:
    with pytest.raises(ValueError, match="mean_rate has the shape"):
        SoftFreeBits(1.0).update(torch.ones(3))
