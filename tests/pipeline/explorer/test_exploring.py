"""What the explorer shows is what the model says: drawings, moved latents, walks and bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.batch import Batch
from pipeline.explorer.exploring import SAMPLES, Explored, between, scale
from pipeline.noise import Purpose, normal, uniform
from pipeline.runs import OpenedModel
from tests.pipeline.explorer import served
from vlae.sampling import draw_pixels

VARIANTS = {
    **served.TWO,
    "plain": ["model.flow_depth=0"],
    "iaf": ["model.flow_depth=0", "model.posterior_depth=2"],
    "maps": ["model.code=maps", "model.latents=2", "model.flow_depth=2"],
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenedModel]:
    root = tmp_path_factory.mktemp("root")
    found = served.models(root, served.write_strokes(root), VARIANTS)
    return dict(zip(VARIANTS, found, strict=True))


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, opened: dict[str, OpenedModel]) -> Explored:
    return Explored(opened[request.param])


def images(count: int = 2) -> torch.Tensor:
    """Random images of strokes' shape, as models see them."""
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(count, 1, 8, 8, generator=generator) < 0.4).float()


def test_a_drawing_is_a_code_of_the_posterior_and_pixels_given_it(model: Explored) -> None:
    x = images(1)
    noise = torch.from_numpy(normal((3, Purpose.CODE), np.arange(5), model.network.latents))
    pixels = torch.from_numpy(uniform((3, Purpose.REDRAWING), np.arange(5), 64)).view(5, 1, 8, 8)
    with torch.no_grad():
        z = model.encode(x.expand(5, -1, -1, -1)).sample(noise)
    expected = draw_pixels(model.network.decoder, z, pixels)
    drawn = model.redraw(x, 3, 5, {})
    assert torch.equal(drawn, expected)
    assert torch.equal(model.redraw(x, 3, 2, {}), drawn[:2]), "more drawings leave the first alone"
    assert not torch.equal(model.redraw(x, 4, 5, {}), drawn)


def test_moving_all_latents_to_another_images_code_draws_that_image(model: Explored) -> None:
    x, y = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    codes = [model._codes(each, 1, 1)[0] for each in (x, y)]
    moved = dict(enumerate((codes[1] - codes[0]).tolist()))
    assert not torch.equal(model.redraw(x, 1, 1, {}), model.redraw(y, 1, 1, {}))
    assert torch.equal(model.redraw(x, 1, 1, moved), model.redraw(y, 1, 1, {}))


def test_a_walk_begins_and_ends_with_the_first_drawing_of_either_image(model: Explored) -> None:
    x, y = images().split(1)
    walked = model.walk(x, y, 2, 5)
    assert walked.shape == (5, 1, 8, 8)
    assert torch.equal(walked[:1], model.redraw(x, 2, 1, {}))
    assert torch.equal(walked[-1:], model.redraw(y, 2, 1, {}))
    assert torch.equal(model.walk(y, x, 2, 5)[[0, -1]], walked[[-1, 0]])


def test_the_bits_are_the_models_bound(model: Explored) -> None:
    x = images(1)
    bits = model.measure(x)
    noise = torch.randn(4000, 1, model.network.latents, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bound = model.network(x, noise)
    for found, terms in (
        (bits.rate, bound.rate),
        (bits.distortion, bound.distortion),
        (bits.code_length, -bound.elbo),
    ):
        expected = terms.double() / math.log(2)
        error = expected.std().item() / math.sqrt(SAMPLES)
        assert abs(found.value - expected.mean().item()) < 5 * error + 1e-6
    total = bits.rate.value + bits.distortion.value
    assert bits.code_length.value == pytest.approx(total, rel=1e-5)


def test_under_a_normal_prior_the_rate_is_the_gaussians_divergence(
    opened: dict[str, OpenedModel],
) -> None:
    model, x = Explored(opened["plain"]), images(1)
    posterior = model.encode(x)
    mean, deviation = posterior.code.double(), scale(posterior)
    assert deviation is not None
    variance = deviation.double().square()
    nats = 0.5 * (mean.square() + variance - 1 - variance.log()).sum().item()
    rate = model.measure(x).rate
    assert rate.error is not None
    assert abs(rate.value - nats / math.log(2)) < 5 * rate.error


def test_an_image_looks_the_same_whenever_it_is_seen(opened: dict[str, OpenedModel]) -> None:
    model = Explored(opened["near"])
    numbers = np.arange(6)
    grey = torch.full((6, 1, 8, 8), 128, dtype=torch.uint8)
    labels = torch.zeros(6, dtype=torch.int64)
    together = model.see(Batch(0, grey, labels, numbers, numbers))
    alone = model.see(Batch(0, grey[4:5], labels[4:5], numbers[4:5], numbers[4:5]))
    assert torch.equal(together[4:5], alone)
    assert set(together.unique().tolist()) == {0.0, 1.0}


VECTORS = st.lists(st.floats(-5, 5), min_size=3, max_size=3).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@given(VECTORS, VECTORS)
def test_the_way_turns_evenly_and_its_length_grows_evenly(
    start: torch.Tensor, end: torch.Tensor
) -> None:
    way = between(start, end, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(way[0], start, atol=1e-6, rtol=0)
    torch.testing.assert_close(way[-1], end, atol=1e-6, rtol=0)
    assert way.isfinite().all()
    lengths = way.norm(dim=1)
    assert lengths.max() <= max(start.norm(), end.norm()) + 1e-6
    if min(start.norm(), end.norm()) < 0.1:
        return
    cosine = (start @ end / start.norm() / end.norm()).clamp(-1, 1)
    if abs(cosine) > 0.99:
        return
    torch.testing.assert_close(lengths.diff(), lengths.diff().mean().expand(4))
    turns = way / lengths[:, None]
    angles = torch.arccos((turns[1:] * turns[:-1]).sum(1).clamp(-1, 1))
    torch.testing.assert_close(angles, (torch.arccos(cosine) / 4).expand(4), atol=1e-5, rtol=1e-5)
