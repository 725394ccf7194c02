"""The bounds hold in models with a known log p(x), and the training loss has the right gradient."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlae import VLAE, Bound, estimate, training_loss
from vlae.distributions import DiagonalGaussian, standard_normal_log_prob

MakeModel = Callable[..., VLAE]


class LinearGaussian(nn.Module):
    """z ~ N(0, 1), x|z ~ N(slope z, scale^2).

    The posterior is the exact one, or the exact one shifted and stretched. The model has the
    interface of a VLAE, for images of shape (batch, 1, 1, size) with one latent for each pixel.
    """

    def __init__(self, shift: float, stretch: float) -> None:
        super().__init__()
        self.slope, self.scale = 1.5, 0.7
        self.shift, self.stretch = shift, stretch

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        precision = 1 + (self.slope / self.scale) ** 2
        mean = self.slope * x / self.scale**2 / precision
        log_scale = torch.full_like(mean, -0.5 * math.log(precision))
        return DiagonalGaussian(mean + self.shift, log_scale + math.log(self.stretch))

    def forward(self, x: Tensor, noise: Tensor) -> Bound:
        x = x.flatten(1)
        posterior = self.posterior(x)
        z = posterior.sample(noise)
        likelihood = DiagonalGaussian(self.slope * z, torch.full_like(z, math.log(self.scale)))
        return Bound(
            -likelihood.log_prob(x).sum(-1), posterior.log_prob(z) - standard_normal_log_prob(z)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), which is N(0, slope^2 + scale^2)."""
        scale = torch.tensor(math.hypot(self.slope, self.scale), dtype=x.dtype)
        return torch.distributions.Normal(torch.zeros_like(scale), scale).log_prob(x).sum((1, 2, 3))

    def exact_elbo(self, x: Tensor) -> Tensor:
        """log p(x) - KL(q(z|x) || p(z|x))."""
        exact, posterior = (
            LinearGaussian(0, 1).posterior(x.flatten(1)),
            self.posterior(x.flatten(1)),
        )
        normals = [
            torch.distributions.Normal(each.mean, each.log_scale.exp())
            for each in (posterior, exact)
        ]
        return self.log_prob(x) - torch.distributions.kl_divergence(*normals).sum(-1)


WRONG = [(0.3, 1.0), (0.0, 1.5), (0.0, 0.6), (-0.2, 1.3)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_with_the_exact_posterior_every_sample_gives_the_exact_log_prob() -> None:
    model, x = LinearGaussian(shift=0, stretch=1), normal(5, 1, 1, 3)
    noise = normal(12, 5, 3, seed=1)
    exact = model.log_prob(x)
    torch.testing.assert_close(model(x, noise).elbo, exact.expand(12, 5), rtol=1e-12, atol=1e-12)
    for k in (1, 2, 12):
        torch.testing.assert_close(
            estimate(model, x, noise[:k]).iwae, exact, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("shift", "stretch"), WRONG)
def test_iwae_grows_from_the_elbo_to_the_exact_log_prob_as_k_grows(
    shift: float, stretch: float
) -> None:
    model, x = LinearGaussian(shift, stretch), normal(4, 1, 1, 2)
    num_samples = 2**16
    noise = normal(num_samples, 4, 2, seed=1)
    exact = model.log_prob(x)
    bounds = []
    for k in (1, 4, 16, 64):
        # Many estimates with k samples each, from the same noise: (estimates, batch).
        batch = x.repeat(num_samples // k, 1, 1, 1)
        estimates = estimate(
            model, batch, noise.unflatten(0, (k, -1)).flatten(1, 2), max_pairs=2**20
        ).iwae.unflatten(0, (-1, 4))
        standard_error = estimates.std(0) / len(estimates) ** 0.5
        assert (estimates.mean(0) < exact + 5 * standard_error).all()
        bounds.append(estimates.mean(0))
        if k == 1:
            assert ((bounds[0] - model.exact_elbo(x)).abs() < 5 * standard_error).all()
    # By Jensen's inequality the mean over parts of the noise is below the bound from all of it,
    # for any noise.
    for smaller, larger in itertools.pairwise(bounds):
        assert (smaller < larger).all()
    assert (bounds[0] < exact - 0.05).all()
    torch.testing.assert_close(estimate(model, x, noise).iwae, exact, rtol=0, atol=0.05)


def test_parts_of_the_samples_give_a_lower_mean_than_all_of_them(
    make_model: MakeModel,
) -> None:
    model = make_model((1, 3, 4), "3x1")
    x = torch.bernoulli(
        torch.full((6, 1, 3, 4), 0.5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    noise = normal(64, 6, 2)
    previous = model(x, noise).elbo.mean(0)
    for k in (2, 4, 8, 16, 32, 64):
        bound = torch.stack([estimate(model, x, part).iwae for part in noise.split(k)]).mean(0)
        assert (bound > previous).all()
        previous = bound


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 40, 10_000])
def test_an_estimate_does_not_depend_on_how_the_samples_are_split_over_passes(
    make_model: MakeModel, rows: int
) -> None:
    model = make_model((1, 3, 4), "3x1")
    x = torch.bernoulli(
        torch.full((6, 1, 3, 4), 0.5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    noise = normal(11, 6, 2)
    bounds = [model(x, each) for each in noise]
    estimated = estimate(model, x, noise, max_pairs=rows)
    expected = {
        "distortion": torch.stack([bound.distortion for bound in bounds]).mean(0),
        "rate": torch.stack([bound.rate for bound in bounds]).mean(0),
        "elbo": torch.stack([bound.elbo for bound in bounds]).mean(0),
        "iwae": torch.stack([bound.elbo for bound in bounds]).exp().mean(0).log(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(estimated, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(11,), (4, 7), (1,) * 11, (10, 1)])
def test_noise_may_come_in_parts(make_model: MakeModel, sizes: tuple[int, ...]) -> None:
    model = make_model((1, 3, 4), "3x1")
    x = torch.bernoulli(torch.full((6, 1, 3, 4), 0.5, dtype=torch.float64))
    noise = normal(11, 6, 2)
    whole, parts = estimate(model, x, noise), estimate(model, x, iter(noise.split(sizes)))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no sample"):
        estimate(LinearGaussian(shift=0.3, stretch=1.2), normal(6, 1, 1, 2), iter(()))


def test_sums_over_many_samples_are_in_double_precision() -> None:
    """In single precision, a sum of 2^24 ones and more stays where it is."""

    def model(x: torch.Tensor, noise: torch.Tensor) -> Bound:
        ones = torch.ones(noise.shape[:2])
        return Bound(300 * ones, ones[..., None] * 0.1)

    x, part = torch.zeros(1, 1, 1, 1), torch.zeros(1 << 16, 1, 1)
    found = estimate(model, x, (part for _ in range(64)), max_pairs=1 << 16)
    for value, expected in ((found.distortion, 300), (found.iwae, -300.1), (found.elbo, -300.1)):
        assert value.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rows", [1, 4, 6, 20])
def test_no_pass_evaluates_more_pairs_than_allowed(rows: int) -> None:
    model, pairs = LinearGaussian(shift=0.3, stretch=1.2), []
    model.register_forward_hook(
        lambda module, inputs, bound: pairs.append(bound.distortion.numel())
    )
    estimate(model, normal(6, 1, 1, 2), normal(11, 6, 2), max_pairs=rows)
    assert sum(pairs) == 11 * 6
    assert max(pairs) <= rows


def test_noise_without_its_axis_of_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="noise"):
        estimate(LinearGaussian(shift=0.3, stretch=1.2), normal(6, 1, 1, 2), normal(6, 2))


def test_iwae_does_not_overflow_where_probabilities_do() -> None:
    model, x = LinearGaussian(shift=0.3, stretch=1.2), 1e3 * normal(3, 1, 1, 2)
    noise = normal(8, 3, 2)
    assert not model(x, noise).elbo.exp().any()
    assert torch.isfinite(estimate(model, x, noise).iwae).all()


@pytest.mark.parametrize("text", ["0x0", "2x1", "full"])
@pytest.mark.parametrize(("latents", "depth"), [(1, 0), (1, 2), (2, 2)])
def test_the_bounds_of_a_vlae_are_below_its_log_prob_by_quadrature(
    make_model: MakeModel, all_images: Callable[..., Tensor], text: str, latents: int, depth: int
) -> None:
    model = make_model(
        (1, 2, 2), text, latents=latents, flow_depth=depth, decoder_features=8, gain=0.9, seed=5
    )
    x = all_images(1, 2, 2)
    with torch.no_grad():
        # The integral of p(x|z) p(z) over the z where the prior has mass.
        prior_samples = model.prior.sample(normal(10_000, latents))
        low, high = prior_samples.amin(0) - 3, prior_samples.amax(0) + 3
        points = 4001 if latents == 1 else 161
        axes = [
            torch.linspace(a, b, points, dtype=torch.float64)
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        log_cell = sum(math.log(axis[1] - axis[0]) for axis in axes)
        z = torch.cartesian_prod(*axes).reshape(-1, 1, latents)
        log_prior = model.prior.log_prob(z).sum(-1)
        log_joint = torch.cat(
            [
                model.decoder(part, x).log_prob(x.permute(0, 2, 3, 1)) + log_prior_part
                for part, log_prior_part in zip(z.split(2000), log_prior.split(2000), strict=True)
            ]
        )
        log_prob = torch.logsumexp(log_joint, 0) + log_cell
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=2e-3)

        # KL(q(z|x) || p(z|x)), the gap of the ELBO.
        log_posterior = model.encoder(x).log_prob(z).sum(-1)
        gap = (log_posterior.exp() * (log_posterior - log_joint + log_prob)).sum(0) * math.exp(
            log_cell
        )

        noise = normal(4096, len(x), latents, seed=1)
        elbos = model(x, noise).elbo
        standard_error = elbos.std(0) / len(elbos) ** 0.5
        assert ((elbos.mean(0) - (log_prob - gap)).abs() < 5 * standard_error + 5e-3).all()
        assert (elbos.mean(0) < log_prob).all()
        assert (gap > 0.01).all(), "the test is vacuous if the posterior is exact"
        iwae_64 = torch.stack(
            [estimate(model, x, part, max_pairs=2**14).iwae for part in noise.split(64)]
        )
        assert (iwae_64.mean(0) < log_prob + 5 * iwae_64.std(0) / len(iwae_64) ** 0.5).all()
        assert (elbos.mean(0) < iwae_64.mean(0)).all()


def test_expected_bounds_grow_with_k_up_to_the_log_prob_by_quadrature_over_the_noise(
    make_model: MakeModel, all_images: Callable[..., Tensor]
) -> None:
    model = make_model((1, 1, 3), "2x0", latents=1, flow_depth=1)
    x = all_images(1, 1, 3)
    with torch.no_grad():
        z = torch.linspace(-40, 40, 16_001, dtype=torch.float64)[:, None, None]
        log_joint = model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1)) + model.prior.log_prob(
            z
        ).sum(-1)
        log_prob = torch.logsumexp(log_joint, 0) + math.log(80 / 16_000)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)

        noise = torch.linspace(-8, 8, 161, dtype=torch.float64)
        weight = (standard_normal_log_prob(noise) + math.log(0.1)).exp()
        elbo = model(x, noise[:, None, None].expand(-1, len(x), 1)).elbo.T  # (batch, noise)
        expected = [elbo @ weight]
        # With two and three samples, the integral is over a square and a cube of noise.
        two = torch.logaddexp(elbo[:, :, None], elbo[:, None, :])
        expected.append((two - math.log(2)) @ weight @ weight)
        three = (
            torch.logaddexp(pair[..., None], single) for pair, single in zip(two, elbo, strict=True)
        )
        expected.append(
            torch.stack([(each - math.log(3)) @ weight @ weight @ weight for each in three])
        )
        expected.append(log_prob)
    for looser, tighter in itertools.pairwise(expected):
        assert (looser < tighter).all()


def test_rate_elbo_and_distortion_agree_with_their_definitions(make_model: MakeModel) -> None:
    model = make_model((1, 3, 4), "3x1")
    x = torch.bernoulli(
        torch.full((6, 1, 3, 4), 0.5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    noise = normal(6, 2)
    bound = model(x, noise)
    posterior = model.encoder(x)
    z = posterior.mean + posterior.log_scale.exp() * noise
    log_q = (
        torch.distributions.Normal(posterior.mean, posterior.log_scale.exp()).log_prob(z).sum(-1)
    )
    torch.testing.assert_close(bound.rate, log_q - model.prior.log_prob(z).sum(-1))
    torch.testing.assert_close(
        bound.distortion, -model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1))
    )
    torch.testing.assert_close(bound.elbo, -(bound.rate + bound.distortion))
    torch.testing.assert_close(bound.rate, bound.rate_per_latent.sum(-1))


def a_bound(batch: int = 6, latents: int = 3) -> Bound:
    return Bound(normal(batch).requires_grad_(), normal(batch, latents, seed=1).requires_grad_())


def test_without_free_bits_the_loss_is_the_negative_elbo() -> None:
    bound = a_bound()
    loss = training_loss(bound, bound.rate.mean().detach(), free_nats=-math.inf, rate_weight=1.0)
    torch.testing.assert_close(loss, -bound.elbo.mean())


@pytest.mark.parametrize("rate_weight", [1.0, 0.25, 0.0])
@pytest.mark.parametrize(("mean_rate", "active"), [(4.99, True), (5.0, False), (5.01, False)])
def test_free_bits_remove_the_rate_gradient_below_the_floor_and_keep_it_above(
    rate_weight: float, mean_rate: float, active: bool
) -> None:
    bound = a_bound()
    loss = training_loss(bound, torch.tensor(mean_rate), free_nats=5.0, rate_weight=rate_weight)
    of_distortion, of_rate = torch.autograd.grad(loss, list(bound))
    torch.testing.assert_close(of_distortion, torch.full_like(of_distortion, 1 / 6))
    torch.testing.assert_close(
        of_rate, torch.full_like(of_rate, 0.0 if active else rate_weight / 6)
    )
    floored = 5.0 if active else bound.rate.mean()
    torch.testing.assert_close(loss, bound.distortion.mean() + rate_weight * floored)


@pytest.mark.parametrize("active", [True, False])
def test_the_gradient_of_a_batch_is_the_mean_of_the_gradients_of_its_halves(
    make_model: MakeModel, active: bool
) -> None:
    model = make_model((1, 5, 6), "3x2")
    x = torch.bernoulli(
        torch.full((8, 1, 5, 6), 0.5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    noise = normal(8, 2)
    rate = model(x, noise).rate.detach()
    # The larger rates are all in one half, so the halves alone would be on different sides of the
    # floor.
    order = rate.argsort()
    x, noise, mean_rate = x[order], noise[order], rate.mean()
    free_nats = mean_rate.item() + (0.01 if active else -0.01)
    assert rate[order][:4].mean() < free_nats < rate[order][4:].mean()

    def gradients(part: slice) -> list[Tensor]:
        loss = training_loss(model(x[part], noise[part]), mean_rate, free_nats, rate_weight=0.7)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    whole, first, second = (gradients(part) for part in (slice(0, 8), slice(0, 4), slice(4, 8)))
    for of_whole, *of_halves in zip(whole, first, second, strict=True):
        torch.testing.assert_close(sum(of_halves) / 2, of_whole, rtol=1e-10, atol=1e-12)
    assert any(of_whole.any() for of_whole in whole)


def test_every_parameter_of_a_model_is_trained(make_model: MakeModel) -> None:
    for text in ("0x0", "3x2", "full"):
        model = make_model((1, 14, 15), text)
        x = torch.bernoulli(
            torch.full((16, 1, 14, 15), 0.5, dtype=torch.float64),
            generator=torch.Generator().manual_seed(0),
        )
        bound = model(x, normal(16, 2))
        training_loss(
            bound, bound.rate.mean().detach(), free_nats=-math.inf, rate_weight=1.0
        ).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("images", "noise"),
    [
        ((4, 1, 7, 6), (1, 2)),
        ((4, 1, 7, 6), (4, 1)),
        ((4, 1, 7, 6), (2,)),
        ((4, 1, 7, 6), (4, 2, 4, 2)),
        ((4, 1, 7, 6), (3, 1, 2)),
        ((4, 1, 7, 6), (4, 3)),
        ((4, 1, 8, 6), (4, 2)),
        ((4, 3, 7, 6), (4, 2)),
        ((4, 7, 6), (4, 2)),
    ],
)
def test_images_and_noise_that_would_broadcast_are_refused(
    make_model: Callable[..., VLAE], images: tuple[int, ...], noise: tuple[int, ...]
) -> None:
    model = make_model((1, 7, 6), "3x2")
    arguments = (torch.zeros(images).double(), torch.zeros(noise).double())
    with pytest.raises(ValueError, match=r"(noise has|images have) the shape"):
        model(*arguments)
    with pytest.raises(ValueError, match=r"(noise has|images have) the shape"):
        model.rate_per_latent(*arguments)
