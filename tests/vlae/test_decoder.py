"""The decoder is a distribution over images, and each of its pixels sees the declared window and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlae import VLAE, Window
from vlae.context import WindowContext
from vlae.decoder import Decoder

SHAPES = [(1, 5, 7), (1, 7, 5), (3, 5, 7)]
WINDOWS = ["0x0", "1x1", "2x1", "3x1", "4x2", "5x2", "5x3", "4x4", "3x0", "2x0", "5x0", "1x5", "2x5", "5x5", "full"]
MORE_FULL_SHAPES = [(1, 1, 1), (1, 1, 9), (1, 9, 1), (1, 2, 2), (1, 3, 10), (1, 10, 3), (1, 8, 8), (3, 4, 5)]
MakeModel = Callable[..., VLAE]


def seen_by_each_pixel(decoder: Decoder, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whether an input has any gradient to a logit: (channel, row, column) of the logit, then those of the input.

    A ReLU may be shut for one input, so gradients are taken at many.
    """
    num_points = 32
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(num_points, decoder.unfold.in_features, generator=generator, dtype=dtype)
    x = torch.rand(num_points, *decoder.image_shape, generator=generator, dtype=dtype, requires_grad=True)
    logits = decoder(z, x).logits.permute(3, 1, 2, 0)
    seen = torch.zeros(*decoder.image_shape, *decoder.image_shape, dtype=torch.bool)
    if not logits.requires_grad or decoder.context is None:
        gradients = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0]
        assert gradients is None or not gradients.any()
        return seen
    for output in torch.cartesian_prod(*(torch.arange(size) for size in decoder.image_shape)).reshape(-1, 3).tolist():
        (gradient,) = torch.autograd.grad(logits[*output].sum(), x, retain_graph=True)
        seen[*output] = (gradient != 0).any(0)
    return seen


def declared(window: Window, image_shape: tuple[int, int, int]) -> Tensor:
    """The same, as the window declares it: its pixels clipped to the image, all channels of them."""
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
    + [((1, 5, 7), "7x4"), ((1, 5, 7), "7x5"), ((1, 9, 11), "7x4"), ((1, 16, 13), "5x2"), ((1, 16, 13), "full")]
    + [(shape, "full") for shape in MORE_FULL_SHAPES],
)
def test_the_receptive_field_of_every_pixel_is_exactly_the_window(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    decoder = make_model(image_shape, text).decoder
    assert torch.equal(seen_by_each_pixel(decoder), declared(Window.parse(text), image_shape))


@pytest.mark.parametrize("text", ["2x1", "3x2", "5x2", "full"])
def test_the_receptive_field_is_the_window_in_single_precision_too(make_model: MakeModel, text: str) -> None:
    decoder = make_model((1, 6, 7), text, dtype=torch.float32).decoder
    assert torch.equal(seen_by_each_pixel(decoder, torch.float32), declared(Window.parse(text), (1, 6, 7)))


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (1, 33, 20), (3, 6, 40)])
def test_the_last_pixel_of_a_full_window_sees_every_other(make_model: MakeModel, image_shape: tuple[int, int, int]) -> None:
    decoder = make_model(image_shape, "full").decoder
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, *image_shape, generator=generator, dtype=torch.float64, requires_grad=True)
    z = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(decoder(z, x).logits[:, -1, -1].sum(), x)
    seen = (gradient != 0).any(0)
    assert seen.flatten(1)[:, :-1].all()
    assert not seen[:, -1, -1].any()


@pytest.mark.parametrize("text", ["3x2", "full"])
def test_later_pixels_do_not_change_a_logit_by_a_single_bit(make_model: MakeModel, text: str) -> None:
    model = make_model((1, 6, 7), text, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(16, 2, generator=generator), torch.bernoulli(torch.full((16, 1, 6, 7), 0.5), generator=generator)
    logits = model.decoder(z, x).logits
    for pixel in range(6 * 7):
        others = x.clone()
        others.flatten(1)[:, pixel:] = 1 - others.flatten(1)[:, pixel:]
        assert torch.equal(model.decoder(z, others).logits.flatten(1)[:, pixel], logits.flatten(1)[:, pixel])


@pytest.mark.parametrize("image_shape", [(3, 5, 4), (1, 13, 14)])
@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
def test_every_pixel_depends_on_every_latent(make_model: MakeModel, image_shape: tuple[int, int, int], text: str) -> None:
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
    make_model: MakeModel, all_images: Callable[..., Tensor], image_shape: tuple[int, int, int], text: str
) -> None:
    model = make_model(image_shape, text)
    x = all_images(*image_shape)
    z = torch.randn(4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_prob = model.decoder(z, x).log_prob(x.permute(0, 2, 3, 1))
    assert log_prob.shape == (4, len(x))
    assert log_prob.std() > 0.1, "the test is vacuous where all images are equally likely"
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 6, 4)])
@pytest.mark.parametrize("text", ["1x1", "4x2", "3x3", "3x0", "1x4", "4x4"])
def test_the_context_of_some_pixels_is_that_of_the_whole_image_there(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    context = make_model(image_shape, text).decoder.context
    assert isinstance(context, WindowContext)
    _, height, width = image_shape
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, *image_shape, generator=generator, dtype=torch.float64)
    row, column = torch.randint(height, (20,), generator=generator), torch.randint(width, (20,), generator=generator)
    torch.testing.assert_close(context.at(context.pad(x), row, column), context(x)[:, row, column], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["0x0", "4x2", "full"])
@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 14, 13)])
def test_several_codes_of_an_image_are_decoded_as_one_by_one(
    make_model: MakeModel, image_shape: tuple[int, int, int], text: str
) -> None:
    model = make_model(image_shape, text)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    x = torch.bernoulli(torch.full((4, *image_shape), 0.5, dtype=torch.float64), generator=generator)
    together = model(x, noise)
    assert together.distortion.shape == together.rate.shape == together.elbo.shape == (3, 4)
    for sample in range(3):
        alone = model(x, noise[sample])
        torch.testing.assert_close(together.distortion[sample], alone.distortion, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.rate_per_latent[sample], alone.rate_per_latent, rtol=1e-12, atol=1e-12)
    deeper = model.decoder(noise.unflatten(0, (3, 1)), x)
    torch.testing.assert_close(deeper.logits[:, 0], model.decoder(noise, x).logits, rtol=1e-12, atol=1e-12)
