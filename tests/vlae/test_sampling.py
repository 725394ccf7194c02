"""Samplers draw from the model's distribution, and the fast and the naive one agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlae import VLAE, reconstruct, sample
from vlae.distributions import standard_normal_log_prob
from vlae.sampling import decode_naively, draw_pixels

MakeModel = Callable[..., VLAE]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def decoders(draw: st.DrawFn) -> tuple[tuple[int, int, int], str, dict[str, Any]]:
    """An image shape, a window that fits it, and the other options of a decoder."""
    channels, height, width = (
        draw(st.sampled_from([1, 1, 3])),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 8)),
    )
    down = draw(st.integers(1, max(1, min(3, height, width))))
    columns, rows = draw(st.integers(1, width // down)), draw(st.integers(0, height // down))
    text = draw(
        st.sampled_from(
            [
                "full",
                "0x0",
                f"{columns}x{rows}",
                f"{columns}x{rows}",
                f"{columns}x{rows}-down{down}",
            ]
        )
    )
    if channels == 3 and draw(st.booleans()):
        text += "-grey"
    options = {
        "likelihood": draw(st.sampled_from(["bernoulli", "logistic"])),
        "mixtures": draw(st.integers(1, 3)),
    }
    if "down" not in text and (text in ("full", "0x0") or (columns > 1 and rows > 0)):
        options["context_layers"] = draw(st.integers(0, 4))
    return (channels, height, width), text, options


@given(decoders(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_wavefronts_give_bit_for_bit_the_images_of_one_pixel_at_a_time(
    make_model: MakeModel,
    case: tuple[tuple[int, int, int], str, dict[str, Any]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    image_shape, text, options = case
    decoder = make_model(image_shape, text, seed=seed, dtype=dtype, **options).decoder
    z = torch.randn(5, 2, generator=generator(seed), dtype=dtype)
    uniform = torch.rand(
        5,
        decoder.likelihood.num_uniforms,
        *image_shape[1:],
        generator=generator(seed + 1),
        dtype=dtype,
    )
    fast, slow = draw_pixels(decoder, z, uniform), decode_naively(decoder, z, uniform)
    assert fast.shape == (5, *image_shape)
    assert fast.dtype == slow.dtype == dtype
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("text", ["1x1", "2x3", "7x4", "8x5", "5x0", "1x5", "full", "0x0"])
def test_both_samplers_agree_on_an_image_that_the_encoder_halves(
    make_model: MakeModel, text: str
) -> None:
    decoder = make_model((1, 14, 13), text, gain=0.8, dtype=torch.float32).decoder
    z, uniform = (
        torch.randn(8, 2, generator=generator()),
        torch.rand(8, 1, 14, 13, generator=generator(1)),
    )
    images = draw_pixels(decoder, z, uniform)
    assert torch.equal(images, decode_naively(decoder, z, uniform))
    # The decoder's probabilities for the finished image reproduce the same pixels.
    probability = torch.sigmoid(decoder(z, images).logits).permute(0, 3, 1, 2)
    assert torch.equal(images, (uniform < probability).float())
    assert 0.1 < images.mean() < 0.9, "the test is vacuous if images have one colour"


def assert_drawn_from(images: Tensor, probability: Tensor) -> None:
    """Check the counts of images against the probabilities of all images.

    ``probability`` is in the order of ``all_images``. No count may deviate by more than five
    standard deviations plus 5, which allows for rare images; nor may chi-square, by five.
    """
    bits = images.flatten(1).long()
    numbers = (bits << torch.arange(bits.shape[1] - 1, -1, -1)).sum(1)
    counts = torch.bincount(numbers, minlength=len(probability)).double()
    expected = len(images) * probability
    assert expected.sum().item() == pytest.approx(len(images), rel=1e-3)
    assert ((counts - expected).abs() < 5 * (expected * (1 - probability)).sqrt() + 5).all()
    common = expected > 20
    assert common.sum() >= 8, "the test is vacuous if only few images are likely"
    chi_square, freedom = ((counts - expected).square() / expected)[common].sum(), common.sum()
    assert chi_square < freedom + 5 * (2 * freedom).sqrt()


@pytest.mark.parametrize(
    ("image_shape", "text"),
    [((1, 2, 3), text) for text in ("0x0", "1x1", "2x1", "3x2", "3x0", "full")]
    + [((3, 1, 2), "2x0"), ((3, 2, 1), "full")],
)
def test_images_given_a_code_are_drawn_with_their_probabilities(
    make_model: MakeModel,
    all_images: Callable[..., Tensor],
    image_shape: tuple[int, int, int],
    text: str,
) -> None:
    decoder = make_model(image_shape, text, seed=2).decoder
    z = torch.randn(1, 2, generator=generator(), dtype=torch.float64)
    x = all_images(*image_shape)
    n = 20_000
    with torch.no_grad():
        probability = decoder(z, x).log_prob(x.permute(0, 2, 3, 1)).exp()
    uniform = torch.rand(n, *image_shape, generator=generator(1), dtype=torch.float64)
    assert_drawn_from(draw_pixels(decoder, z.expand(n, -1), uniform), probability)


def test_samples_of_the_model_have_its_probabilities(
    make_model: MakeModel, all_images: Callable[..., Tensor]
) -> None:
    model, x = (
        make_model((1, 2, 2), "2x1", latents=1, dtype=torch.float32, seed=4),
        all_images(1, 2, 2).float(),
    )
    with torch.no_grad():
        z = torch.linspace(-30, 30, 6001)[:, None, None]
        log_joint = model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1)) + model.prior.log_prob(
            z
        ).sum(-1)
        probability = log_joint.double().exp().sum(0) * 0.01
    assert_drawn_from(sample(model, 20_000, generator()), probability)


def test_reconstructions_are_drawn_from_the_decoder_at_codes_from_the_posterior(
    make_model: MakeModel, all_images: Callable[..., Tensor]
) -> None:
    model, x = (
        make_model((1, 2, 2), "2x1", latents=1, dtype=torch.float32, seed=4),
        all_images(1, 2, 2).float(),
    )
    original = x[6:7]
    with torch.no_grad():
        noise = torch.linspace(-8, 8, 1601)[:, None, None]
        z = model.encoder(original).sample(noise)
        log_prob = model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1)) + standard_normal_log_prob(
            noise
        ).sum(-1)
        probability = log_prob.double().exp().sum(0) * 0.01
    assert_drawn_from(
        reconstruct(model, original.expand(20_000, -1, -1, -1), generator()), probability
    )


@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 6, 4)])
@pytest.mark.parametrize("depth", [0, 2])
def test_samples_and_reconstructions_are_binary_images_determined_by_the_generator(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str, depth: int
) -> None:
    model = make_model(image_shape, text, dtype=torch.float32, flow_depth=depth)
    x = torch.bernoulli(torch.full((6, *image_shape), 0.5), generator=generator())
    for draw in (
        lambda seed: sample(model, 6, generator(seed)),
        lambda seed: reconstruct(model, x, generator(seed)),
    ):
        images = draw(0)
        assert images.shape == (6, *image_shape)
        assert images.dtype == torch.float32
        assert not images.requires_grad
        assert set(images.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(images, draw(0))
        assert not torch.equal(images, draw(1))


def test_drawing_leaves_the_global_generator_alone(make_model: MakeModel) -> None:
    model = make_model((1, 5, 7), "4x2", dtype=torch.float32)
    before = torch.get_rng_state()
    sample(model, 3, generator())
    reconstruct(model, torch.zeros(3, 1, 5, 7), generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
def test_a_model_in_double_precision_draws_images(make_model: MakeModel, text: str) -> None:
    model = make_model((1, 5, 7), text)
    assert sample(model, 3, generator()).shape == (3, 1, 5, 7)
    assert reconstruct(model, torch.zeros(3, 1, 5, 7, dtype=torch.float64), generator()).shape == (
        3,
        1,
        5,
        7,
    )


@pytest.mark.parametrize(
    "text",
    ["0x0", "4x2", "full"],
)
def test_images_are_drawn_under_autocast(make_model: MakeModel, text: str) -> None:
    model = make_model((1, 5, 7), text, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        images = sample(model, 3, generator())
    assert images.shape == (3, 1, 5, 7)
    assert set(images.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic"])
def test_half_precision_draws_no_pixels_that_are_all_but_impossible(
    make_model: MakeModel, likelihood: str, dtype: torch.dtype
) -> None:
    model = make_model((1, 16, 16), "3x2", likelihood=likelihood).to(dtype)
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        # Bernoulli: a pixel is black once in e^12 times. Logistic: all components have the mean 0
        # and the scale e^-5, so that a pixel is above 160 once in 10^16 times.
        model.decoder.head.bias.fill_(12.0 if likelihood == "bernoulli" else 0.0)
        if likelihood == "logistic":
            model.decoder.head.bias[10:15] = -5.0
    images = sample(model, 64, generator())
    x = torch.zeros(64, 1, 16, 16, dtype=dtype)
    for drawn in (images, reconstruct(model, x, generator())):
        assert drawn.dtype == torch.float32
        if likelihood == "bernoulli":
            assert (drawn == 0).sum() <= 2
        else:
            assert 255 * drawn.min() > 90
            assert 255 * drawn.max() < 160


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (3, 1, 5, 8), (3, 2, 5, 7), (3, 5, 7)])
def test_noise_of_another_shape_or_in_half_precision_is_refused(
    make_model: MakeModel, shape: tuple[int, ...]
) -> None:
    decoder = make_model((1, 5, 7), "4x2").decoder
    z = torch.zeros(3, 2).double()
    with pytest.raises(ValueError, match="uniform is"):
        draw_pixels(decoder, z, torch.rand(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"uniform is torch\.bfloat16"):
        draw_pixels(decoder, z, torch.rand(3, 1, 5, 7).bfloat16())
