"""The decoder is a distribution over images, and each pixel sees exactly the declared window."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlae import VLAE, Window
from vlae.networks.decoder import Decoder

SHAPES = [(1, 5, 7), (1, 7, 5), (3, 5, 7)]
WINDOWS = [
    "2x1-down2",
    "1x2-down2",
    "1x1-down3",
    "0x0",
    "1x1",
    "2x1",
    "3x1",
    "4x2",
    "5x2",
    "5x3",
    "4x4",
    "3x0",
    "2x0",
    "5x0",
    "1x5",
    "2x5",
    "5x5",
    "full",
]
STACKED = [
    ("2x1", 1),
    ("3x1", 2),
    ("4x2", 1),
    ("4x2", 2),
    ("4x2", 5),
    ("5x3", 2),
    ("7x4", 3),
    ("3x4", 6),
    ("5x5", 4),
]
GREY = ["3x1-grey", "4x2-grey", "1x1-down2-grey", "full-grey"]
MORE_FULL_SHAPES = [
    (1, 1, 1),
    (1, 1, 9),
    (1, 9, 1),
    (1, 2, 2),
    (1, 3, 10),
    (1, 10, 3),
    (1, 8, 8),
    (3, 4, 5),
]
MakeModel = Callable[..., VLAE]


def seen_by_each_pixel(decoder: Decoder, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whether a logit has a gradient with respect to an input pixel.

    Dimensions: (channel, row, column) of the logit, then of the input. Gradients are taken at many
    inputs, since a ReLU may be zero at a single one.
    """
    num_points = 32
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(num_points, decoder.unfold.in_features, generator=generator, dtype=dtype)
    x = torch.rand(
        num_points, *decoder.image_shape, generator=generator, dtype=dtype, requires_grad=True
    )
    logits = decoder(z, x).logits.permute(3, 1, 2, 0)
    seen = torch.zeros(*decoder.image_shape, *decoder.image_shape, dtype=torch.bool)
    if not logits.requires_grad or decoder.context is None:
        gradients = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0]
        assert gradients is None or not gradients.any()
        return seen
    for output in (
        torch.cartesian_prod(*(torch.arange(size) for size in decoder.image_shape))
        .reshape(-1, 3)
        .tolist()
    ):
        (gradient,) = torch.autograd.grad(logits[*output].sum(), x, retain_graph=True)
        seen[*output] = (gradient != 0).any(0)
    return seen


def declared(window: Window, image_shape: tuple[int, int, int]) -> Tensor:
    """The same from the declared window: all channels of its pixels within the image."""
    channels, height, width = image_shape
    declared = torch.zeros(height, width, height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            if window.full:
                declared[row, column].view(-1)[: row * width + column] = True
                continue
            for down, right in window.offsets:
                if 0 <= row + down < height and 0 <= column + right < width:
                    declared[row, column, row + down, column + right] = True
    return declared[None, :, :, None].expand(channels, -1, -1, channels, -1, -1)


@pytest.mark.parametrize(
    ("image_shape", "text"),
    [(shape, text) for shape in SHAPES for text in WINDOWS]
    + [
        ((1, 5, 7), "7x4"),
        ((1, 5, 7), "7x5"),
        ((1, 9, 11), "7x4"),
        ((1, 16, 13), "5x2"),
        ((1, 16, 13), "full"),
    ]
    + [(shape, "full") for shape in MORE_FULL_SHAPES],
)
def test_the_receptive_field_of_every_pixel_is_exactly_the_window(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    decoder = make_model(image_shape, text).decoder
    assert torch.equal(seen_by_each_pixel(decoder), declared(Window.parse(text), image_shape))


@pytest.mark.parametrize("image_shape", [(1, 7, 9), (3, 6, 7)])
@pytest.mark.parametrize(("text", "layers"), STACKED)
def test_the_receptive_field_of_stacked_layers_is_exactly_the_window(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str, layers: int
) -> None:
    decoder = make_model(image_shape, text, context_layers=layers, decoder_features=24).decoder
    assert torch.equal(seen_by_each_pixel(decoder), declared(Window.parse(text), image_shape))


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("text", GREY)
def test_a_grey_window_has_the_same_pixels_and_sees_only_the_luminance(
    make_model: MakeModel, text: str, layers: int
) -> None:
    if layers and "down" in text:
        return  # a down-sampled window cannot be stacked
    decoder = make_model((3, 6, 7), text, context_layers=layers, decoder_features=24).decoder
    assert torch.equal(seen_by_each_pixel(decoder), declared(Window.parse(text), (3, 6, 7)))
    generator = torch.Generator().manual_seed(0)
    z, x = (
        torch.randn(8, 2, generator=generator).double(),
        torch.rand(8, 3, 6, 7, generator=generator, dtype=torch.float64),
    )
    luminance = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    # Two directions of colour that preserve the luminance, and one that does not.
    for shift, same in (
        ([0.587, -0.299, 0.0], True),
        ([0.0, 0.114, -0.587], True),
        ([0.1, 0.1, 0.1], False),
    ):
        moved = x + 0.1 * torch.tensor(shift, dtype=torch.float64)[:, None, None]
        assert (
            torch.allclose(
                torch.einsum("nchw,c->nhw", moved - x, luminance), torch.zeros(1).double()
            )
            == same
        )
        assert (
            torch.allclose(decoder(z, moved).logits, decoder(z, x).logits, rtol=1e-10, atol=1e-10)
            == same
        )


@pytest.mark.parametrize("text", ["2x1-down2", "1x2-down2", "2x1-down3"])
def test_a_down_sampled_window_sees_only_the_means_of_its_cells(
    make_model: MakeModel, text: str
) -> None:
    decoder, window = make_model((1, 9, 10), text).decoder, Window.parse(text)
    generator = torch.Generator().manual_seed(0)
    z, x = (
        torch.randn(4, 2, generator=generator).double(),
        torch.rand(4, 1, 9, 10, generator=generator, dtype=torch.float64),
    )
    row, column = 8, 5
    logit = decoder(z, x).logits[:, row, column]
    for cell in range(max(window.cells) + 1):
        offsets = [
            offset
            for offset, number in zip(window.offsets, window.cells, strict=True)
            if number == cell
        ]
        (first_row, first_column), (last_row, last_column) = offsets[0], offsets[-1]
        shuffled = x.clone()
        shuffled[:, :, row + first_row, column + first_column] += 0.25
        assert not torch.allclose(decoder(z, shuffled).logits[:, row, column], logit)
        shuffled[:, :, row + last_row, column + last_column] -= 0.25
        torch.testing.assert_close(
            decoder(z, shuffled).logits[:, row, column], logit, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("window", ["1x2", "3x0", "2x2-down2"])
def test_a_window_that_cannot_be_stacked_is_an_error_that_names_it(
    make_model: MakeModel, window: str
) -> None:
    with pytest.raises(ValueError, match=window):
        make_model((1, 6, 7), window, context_layers=2)


def test_a_grey_window_on_grey_images_is_an_error(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"3x1-grey.*1 channels"):
        make_model((1, 6, 7), "3x1-grey")


@pytest.mark.parametrize("text", ["2x1", "3x2", "5x2", "full"])
def test_the_receptive_field_is_the_window_in_single_precision(
    make_model: MakeModel, text: str
) -> None:
    decoder = make_model((1, 6, 7), text, dtype=torch.float32).decoder
    assert torch.equal(
        seen_by_each_pixel(decoder, torch.float32), declared(Window.parse(text), (1, 6, 7))
    )


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (1, 33, 20), (3, 6, 40)])
def test_the_last_pixel_of_a_full_window_sees_every_other_pixel(
    make_model: MakeModel, image_shape: tuple[int, int, int]
) -> None:
    decoder = make_model(image_shape, "full").decoder
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, *image_shape, generator=generator, dtype=torch.float64, requires_grad=True)
    z = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(decoder(z, x).logits[:, -1, -1].sum(), x)
    seen = (gradient != 0).any(0)
    assert seen.flatten(1)[:, :-1].all()
    assert not seen[:, -1, -1].any()


@pytest.mark.parametrize("text", ["3x2", "full"])
def test_later_pixels_do_not_change_a_logit_by_a_single_bit(
    make_model: MakeModel, text: str
) -> None:
    model = make_model((1, 6, 7), text, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    z, x = (
        torch.randn(16, 2, generator=generator),
        torch.bernoulli(torch.full((16, 1, 6, 7), 0.5), generator=generator),
    )
    logits = model.decoder(z, x).logits
    for pixel in range(6 * 7):
        others = x.clone()
        others.flatten(1)[:, pixel:] = 1 - others.flatten(1)[:, pixel:]
        assert torch.equal(
            model.decoder(z, others).logits.flatten(1)[:, pixel], logits.flatten(1)[:, pixel]
        )


@pytest.mark.parametrize("image_shape", [(3, 5, 4), (1, 13, 14)])
@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
def test_every_pixel_depends_on_every_latent(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    decoder = make_model(image_shape, text, latents=3).decoder
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, *image_shape, generator=generator, dtype=torch.float64)
    z = torch.randn(32, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    for logits in decoder(z, x).logits.flatten(1).unbind(1):
        (gradient,) = torch.autograd.grad(logits.sum(), z, retain_graph=True)
        assert gradient.any(0).all()


@pytest.mark.parametrize(
    ("image_shape", "text"),
    [((1, 2, 3), text) for text in ("0x0", "1x1", "2x1", "3x1", "3x2", "3x0", "full")]
    + [((1, 3, 3), text) for text in ("0x0", "2x2", "3x3", "full")]
    + [((3, 1, 3), text) for text in ("0x0", "2x0", "3x1", "full")]
    + [((1, 1, 1), "full"), ((1, 8, 1), "1x2"), ((1, 1, 8), "4x0")],
)
def test_probabilities_of_all_images_sum_to_one(
    make_model: MakeModel,
    all_images: Callable[..., Tensor],
    image_shape: tuple[int, int, int],
    text: str,
) -> None:
    model = make_model(image_shape, text)
    x = all_images(*image_shape)
    z = torch.randn(4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_prob = model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1))
    assert log_prob.shape == (4, len(x))
    assert log_prob.std() > 0.1, "the test is vacuous where all images are equally likely"
    torch.testing.assert_close(
        log_prob.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 14, 13)])
def test_decoding_several_codes_of_an_image_equals_decoding_each_alone(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    model = make_model(image_shape, text)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    x = torch.bernoulli(
        torch.full((4, *image_shape), 0.5, dtype=torch.float64), generator=generator
    )
    together = model(x, noise)
    assert together.distortion.shape == together.rate.shape == together.elbo.shape == (3, 4)
    for sample in range(3):
        alone = model(x, noise[sample])
        torch.testing.assert_close(
            together.distortion[sample], alone.distortion, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            together.rate_per_latent[sample], alone.rate_per_latent, rtol=1e-12, atol=1e-12
        )
    deeper = model.decoder(noise.unflatten(0, (3, 1)), x)
    torch.testing.assert_close(
        deeper.logits[:, 0], model.decoder(noise, x).logits, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("codes", [1, 3, 100])
def test_a_few_codes_at_a_time_give_the_densities_of_all(
    codes: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_model((1, 5, 7), "3x1").decoder
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(7, 2, 2, generator=generator, dtype=torch.float64)
    x = torch.bernoulli(torch.full((2, 1, 5, 7), 0.5, dtype=torch.float64), generator=generator)
    expected = decoder(z, x).log_prob(x.permute(0, 2, 3, 1))
    assert torch.equal(decoder.log_prob(z, x), expected)  # with gradients: all at once
    monkeypatch.setattr("vlae.networks.decoder.CACHE_BYTES", codes * 2 * 35 * 16 * 8)
    seen = list[int]()
    decoder.per_pixel.register_forward_hook(lambda module, given, h: seen.append(len(h)))
    with torch.no_grad():
        torch.testing.assert_close(decoder.log_prob(z, x), expected, rtol=1e-12, atol=1e-12)
    assert sum(seen) == 7
    assert max(seen) == min(codes, 7)
