"""The resolution is where images and redrawn ones stop to agree, from first principles."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.commands import load
from pipeline.config.sections import Binarization
from pipeline.data.loader import EvalLoader
from pipeline.evaluation import sheets
from pipeline.evaluation.resolution import Resolution, compare, resolution
from pipeline.storage import open_storage
from tests.pipeline import strokes
from vlae.synthetic import clouds

Shape = tuple[int, int, int]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(images: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """The parts of images below and above a frequency in cycles per pixel."""
    height, width = images.shape[-2:]
    down, right = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    low = np.fft.fft2(images.numpy()) * (np.hypot(down, right) < cut)
    below = torch.from_numpy(np.fft.ifft2(low).real)
    return below, images - below


shapes = st.tuples(st.sampled_from([1, 3]), st.integers(6, 20), st.integers(6, 20))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.data(), st.integers(0, 1000))
def test_the_resolution_is_the_size_down_to_which_images_agree(
    shape: Shape, data: st.DataObject, seed: int
) -> None:
    size = min(shape[1:])
    ring = data.draw(st.integers(1, size // 2 - 1), "the last ring that agrees")
    shared, own = split(noise(seed, 200, *shape), (ring + 0.5) / size)
    redrawn = shared + split(noise(seed + 1, 2, 200, *shape), (ring + 0.5) / size)[1]
    found = compare(shared + own, redrawn)
    assert found.correlation[: ring + 1] == pytest.approx([1.0] * (ring + 1))
    assert max(map(abs, found.correlation[ring + 1 :])) < 0.25
    assert found.px is not None
    assert size / (ring + 1) < found.px < size / ring


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes, st.floats(0.1, 0.9), st.integers(0, 1000))
def test_the_correlation_is_the_share_of_the_variance_that_is_shared(
    shape: Shape, share: float, seed: int
) -> None:
    shared = noise(seed, 300, *shape) * math.sqrt(share)
    images, redrawn = (
        shared + math.sqrt(1 - share) * each
        for each in (noise(seed + 1, 300, *shape), noise(seed + 2, 2, 300, *shape))
    )
    found = compare(images, redrawn)
    for value, error in zip(found.correlation, found.correlation_se, strict=True):
        assert error is not None
        assert abs(value - share) < 5 * error


def test_the_correlation_is_its_definition() -> None:
    images, redrawn = noise(0, 5, 2, 6, 7), noise(1, 3, 5, 2, 6, 7)
    redrawn += images
    sums = np.zeros((3, 4))
    for draw in redrawn:
        for x, other in zip(images - images.mean(0), draw - redrawn.mean((0, 1)), strict=True):
            for f, g in zip(np.fft.fft2(x.numpy()), np.fft.fft2(other.numpy()), strict=True):
                for row, column in np.ndindex(6, 7):
                    down, right = np.fft.fftfreq(6)[row], np.fft.fftfreq(7)[column]
                    ring = round(6 * math.hypot(down, right))
                    if ring <= 3:
                        a, b = f[row, column], g[row, column]
                        sums[:, ring] += (a * b.conj()).real, abs(a) ** 2, abs(b) ** 2
    expected = sums[0] / np.sqrt(sums[1] * sums[2])
    assert compare(images, redrawn).correlation == pytest.approx(expected, rel=1e-9)


def test_mean_images_and_scales_make_no_difference() -> None:
    images = noise(0, 50, 1, 12, 12)
    redrawn = images + noise(1, 2, 50, 1, 12, 12)
    found = compare(images, redrawn)
    other = compare(100 * noise(2, 12, 12) + 3 * images, 100 * noise(3, 12, 12) + 0.1 * redrawn)
    assert other.correlation == pytest.approx(found.correlation, rel=1e-6)
    assert other.px == (None if found.px is None else pytest.approx(found.px, rel=1e-6))
    inverted = compare(images, 1 - redrawn)
    assert inverted.correlation == pytest.approx([-each for each in found.correlation], rel=1e-6)
    assert inverted.px is None


def test_standard_errors_are_the_spread_over_sets_of_images() -> None:
    def draw(seed: int) -> Resolution:
        # A smooth fall from 0.9 to 0.1.
        images, redrawn = noise(seed, 60, 1, 16, 16), noise(seed + 1, 2, 60, 1, 16, 16)
        shared = noise(seed + 2, 60, 1, 16, 16)
        parts = [
            math.sqrt(0.9 - 0.1 * ring)
            * split(split(shared, (ring + 0.5) / 16)[0], (ring - 0.5) / 16)[1]
            for ring in range(9)
        ]
        rest = [
            math.sqrt(0.1 + 0.1 * ring)
            * split(split(each, (ring + 0.5) / 16)[0], (ring - 0.5) / 16)[1]
            for each in (images, *redrawn)
            for ring in range(9)
        ]
        whole = [sum(rest[9 * n : 9 * n + 9], sum(parts)) for n in range(3)]
        return compare(whole[0], torch.stack(whole[1:]))  # type: ignore[arg-type]

    found = [draw(10 * number) for number in range(30)]
    curve, errors = np.array([each.correlation for each in found]), [each.px_se for each in found]
    assert None not in errors
    spread = np.std([each.px for each in found], ddof=1)  # type: ignore[arg-type]
    assert np.mean(errors) == pytest.approx(spread, rel=0.4)  # type: ignore[arg-type]
    mean_errors = np.mean([each.correlation_se for each in found], 0)  # type: ignore[arg-type]
    np.testing.assert_allclose(mean_errors, curve.std(0, ddof=1), rtol=0.5)
    assert np.mean([each.px for each in found]) == pytest.approx(4.0, abs=0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "finest"), [(8, 2.0), (7, 7 / 3), (2, 2.0)])
def test_images_that_agree_everywhere_have_the_finest_resolution_that_pixels_show(
    size: int, finest: float
) -> None:
    images = noise(0, 10, 1, size, size)
    found = compare(images, images[None])
    assert found.px == pytest.approx(finest)
    assert found.px_se == pytest.approx(0, abs=1e-9)
    told = found.to_json()["resolution"]
    assert (told["finest_px"], told["coarsest_px"], told["lost_px"]) == (finest, size, [])


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1), (3, 1, 5)])
def test_where_nothing_is_shared_there_is_no_resolution(shape: Shape) -> None:
    for images, redrawn in (
        (noise(0, 100, *shape), noise(1, 2, 100, *shape)),
        (torch.ones(100, *shape), torch.ones(2, 100, *shape)),  # no image differs from another
        (noise(0, 100, *shape), torch.zeros(2, 100, *shape)),
    ):
        found = compare(images, redrawn)
        assert (found.px, found.px_se) == (None, None)
        assert max(map(abs, found.correlation)) < 0.4
        assert np.isfinite(found.correlation + found.correlation_se).all()  # type: ignore[operator]


def test_brightness_alone_is_no_structure() -> None:
    bright = noise(0, 200, 1, 1, 1)
    found = compare(bright + noise(1, 200, 1, 8, 8), bright + noise(2, 2, 200, 1, 8, 8))
    assert found.correlation[0] > 0.9
    assert found.px is None


def test_a_single_image_has_no_errors() -> None:
    found = compare(noise(0, 1, 1, 8, 8), noise(1, 2, 1, 1, 8, 8))
    assert (found.images, found.px, found.px_se) == (1, None, None)
    assert found.correlation_se == [None] * 5


def test_it_tells_a_known_pattern_from_its_texture() -> None:
    """The pattern of ``clouds`` has 2 periods across 16 pixels, so a wavelength of 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    texture, labels = clouds(), torch.randint(144, (400,), generator=generator)
    others = torch.randint(144, (400,), generator=generator)
    drawn = torch.rand(3, 400, 1, 16, 16, generator=generator)
    images = texture.draw(labels, drawn[0])

    pattern = compare(images, torch.stack([texture.draw(labels, each) for each in drawn[1:]]))
    assert pattern.correlation[2] > 0.8
    assert max(pattern.correlation[:2] + pattern.correlation[3:]) < 0.2
    assert pattern.px is not None
    assert 16 / 3 < pattern.px < 16 / 2
    assert pattern.to_json()["resolution"]["lost_px"] == [16.0]

    # The same texture under other patterns agrees at every size but that of the pattern.
    only_texture = compare(images, texture.draw(others, drawn[0])[None]).correlation
    assert only_texture[2] < 0.2
    assert min(only_texture[:2] + only_texture[3:6]) > 2 * only_texture[2]


def test_neither_batches_nor_threads_change_the_result(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = strokes.write(open_storage(str(tmp_path_factory.mktemp("strokes"))))
    torch.manual_seed(0)
    model = load("train", ["model=tiny"]).build(data.manifest.image_shape)
    with torch.no_grad():  # a fresh model ignores its input
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))

    def found(batch_size: int, threads: int, seed: int = 3) -> Resolution:
        images = EvalLoader(data, split="train", batch_size=batch_size, num_images=50)
        seen: list[int] = []
        made = resolution(
            model,
            images,
            binarization=Binarization.dynamic,
            seed=seed,
            device=torch.device("cpu"),
            threads=threads,
            progress=seen.append,
        )
        assert sum(seen) == made.images == 50
        return made

    first = found(50, 1)
    for batch_size, threads in ((1, 1), (7, 3)):
        other = found(batch_size, threads)
        assert other.correlation == pytest.approx(first.correlation, abs=1e-3)
    assert found(50, 1) == first
    assert found(50, 1, seed=4).correlation != first.correlation


def test_the_chart_shows_any_curve() -> None:
    images = noise(0, 20, 1, 9, 12)
    told = [
        compare(images, redrawn).to_json()
        for redrawn in (images[None], noise(1, 2, 20, 1, 9, 12), images + noise(1, 2, 20, 1, 9, 12))
    ]
    told.append(compare(images[:1], images[None, :1]).to_json())
    pictures = [sheets.resolutions({"": each}) for each in told]
    pictures.append(sheets.resolutions({f"model {n}": each for n, each in enumerate(told)}))
    assert all(each.startswith(b"\x89PNG") for each in pictures)
    assert all(one != other for one, other in pairwise(pictures))
    assert sheets.resolutions({"": told[0]}) == pictures[0]
