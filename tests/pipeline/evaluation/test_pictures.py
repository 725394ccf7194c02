"""The sheets of pictures, pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline.evaluation import pictures
from pipeline.evaluation.pictures import (
    BAR,
    CHART_HEIGHT,
    FAINT,
    GAP,
    INK,
    LABEL_HEIGHT,
    MARGIN,
    PAPER,
    RULE,
)

TOP = MARGIN + LABEL_HEIGHT


def opened(png: bytes) -> np.ndarray:
    """(height, width, 3)"""
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def expected_tile(image: Tensor) -> np.ndarray:
    """How an image (channels, height, width) must look: each pixel a square, grey as RGB."""
    scale = max(1, round(56 / image.shape[1]))
    pixels = (image.expand(3, -1, -1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def random_images(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(
        count, channels, height, width, generator=torch.Generator().manual_seed(count)
    )


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 13),
    st.sampled_from([1, 3]),
    st.sampled_from([(28, 28), (8, 8), (5, 9), (70, 40)]),
    st.integers(1, 6),
)
def test_every_sample_is_in_its_place_and_nothing_else_is_on_the_paper(
    count: int, channels: int, size: tuple[int, int], columns: int
) -> None:
    images = random_images(count, channels, *size)
    sheet = opened(pictures.samples(images, columns)).copy()
    tile_height, tile_width, _ = expected_tile(images[0]).shape
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = TOP + row * (tile_height + GAP), MARGIN + column * (tile_width + GAP)
        place = sheet[top : top + tile_height, left : left + tile_width]
        np.testing.assert_array_equal(place, expected_tile(image))
        place[:] = PAPER
    assert (sheet[TOP - 2 :] == PAPER).all()  # no frames either: those are of originals
    rows = -(-count // columns)
    assert sheet.shape[0] == TOP + rows * (tile_height + GAP) - GAP + MARGIN
    assert sheet.shape[1] >= 2 * MARGIN + min(count, columns) * (tile_width + GAP) - GAP
    title = sheet[: TOP - 2]
    assert (title != PAPER).any()
    assert (title[:, : MARGIN - 2] == PAPER).all()
    assert (title[:, 2 - MARGIN :] == PAPER).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_decodings_stand_below_their_original_which_is_framed(count: int, channels: int) -> None:
    columns, originals = 4, random_images(count, channels, 14, 10)
    drawn = [1 - originals, originals / 2]
    sheet = opened(pictures.reconstructions(originals, drawn, columns))
    height, width, _ = expected_tile(originals[0]).shape
    blocks = -(-count // columns)
    block_height = 3 * (height + GAP) + (3 * GAP if blocks > 1 else 0)
    for number in range(count):
        block, column = divmod(number, columns)
        left = MARGIN + column * (width + GAP)
        for row, images in enumerate((originals, *drawn)):
            top = TOP + block * block_height + row * (height + GAP)
            np.testing.assert_array_equal(
                sheet[top : top + height, left : left + width], expected_tile(images[number])
            )
            above = sheet[top - 1, left : left + width]
            assert (above == (FAINT if row == 0 else PAPER)).all()
    assert sheet.shape[0] >= TOP + (blocks - 1) * block_height + 3 * (height + GAP) - GAP + MARGIN


def test_values_beyond_black_and_white_are_black_and_white() -> None:
    images = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    sheet = opened(pictures.samples(images))
    assert (sheet[TOP : TOP + 56, MARGIN : MARGIN + 56] == 0).all()
    assert (sheet[TOP : TOP + 56, MARGIN + 56 + GAP : MARGIN + 112 + GAP] == 255).all()


def test_bars_are_as_tall_as_what_latents_tell_in_order_and_pale_if_not_active() -> None:
    capacity, rate = [0.5, 2.0, 0.0, 1.0, 0.005], [0.25, 1.0, -0.5, 1.0, 0.0]
    sheet = opened(pictures.latents(capacity, rate, [True, True, True, True, False]))
    chart = sheet[TOP:]
    lit = {
        name: (chart == color).all(2)
        for name, color in (("bar", BAR), ("rate", INK), ("pale", RULE))
    }
    bars = (lit["bar"] | lit["rate"]).sum(0)
    columns = np.flatnonzero(bars)
    starts = columns[np.flatnonzero(np.diff(columns, prepend=-2) > 1)]
    assert len(starts) == 3  # the latents 1, 3 and 0; 2 tells nothing, and 4 is pale
    heights = [int(bars[start]) for start in starts]
    assert heights == [CHART_HEIGHT, CHART_HEIGHT // 2, CHART_HEIGHT // 4]
    inks = [int(lit["rate"][:, start : start + 26].sum(0).max()) for start in starts]
    assert inks == [CHART_HEIGHT // 2, CHART_HEIGHT // 2, CHART_HEIGHT // 8]


@pytest.mark.parametrize("count", [1, 2, 32, 64, 500])
@pytest.mark.parametrize("scale", [0.0, 0.003, 0.7, 30.0])
def test_any_number_of_latents_of_any_size_has_its_chart(count: int, scale: float) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)) * scale
    sheet = opened(pictures.latents(values.tolist(), None, [True] * count))
    colored = (sheet == BAR).all(2)
    assert colored.any() == (scale > 0)
    assert colored[:, :MARGIN].sum() == colored[:, -MARGIN:].sum() == colored[:TOP].sum() == 0
    assert sheet.shape[1] < 2200
