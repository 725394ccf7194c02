"""The pictures, pixel by pixel."""

import io
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

import vlae
from pipeline.evaluation import pictures
from pipeline.evaluation.page import FRAME, GAP, MARGIN, text_width
from pipeline.evaluation.pictures import (
    AXIS_HEIGHT,
    BAR,
    CHART_HEIGHT,
    HEADER,
    PALE,
    PALE_RATE,
    RATE,
    SMALL_TILE,
    THEORY_TILE,
    TILE,
)
from pipeline.evaluation.style import FAINT
from tests.pipeline.models import MODEL

TOP, PAPER = MARGIN + HEADER, 255
LABELLED = MARGIN + max(text_width(label) for label in ("original", "decoded")) + 2 * GAP
"""Where images begin on a sheet of reconstructions, right of the rows' labels."""


def rgb(color: str) -> np.ndarray:
    return np.round(255 * np.array(to_rgb(color))).astype(np.uint8)


def opened(png: bytes) -> np.ndarray:
    """(height, width, 3)"""
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
    return np.asarray(image)


def expected_tile(image: Tensor, size: int = TILE) -> np.ndarray:
    """How an image (channels, height, width) must look: each pixel a square, grey as RGB."""
    scale = max(1, round(size / image.shape[1]))
    pixels = (image.expand(3, -1, -1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def framed(tile: np.ndarray, color: str, width: int) -> np.ndarray:
    """A tile in its frame, and the paper around it as far as half of the gap."""
    margin = ((width, width), (width, width))
    channels = [
        np.pad(np.pad(tile[..., c], margin, constant_values=value), GAP // 2 - width,
               constant_values=PAPER)
        for c, value in enumerate(rgb(color))
    ]  # fmt: skip
    return np.stack(channels, -1)


def found(sheet: np.ndarray, tile: np.ndarray, top: int, left: int) -> np.ndarray:
    """What a sheet shows where a tile should be, as far as half of the gap around it."""
    half = GAP // 2
    height, width, _ = tile.shape
    return sheet[top - half : top + height + half, left - half : left + width + half]


def places(sheet: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Top and left of every place on a sheet where a tile is, pixel by pixel."""
    height, width, _ = tile.shape
    corners = (sheet == tile[0, 0]).all(2)[: -height + 1, : -width + 1]
    corners &= (sheet == tile[-1, -1]).all(2)[height - 1 :, width - 1 :]
    return [
        (int(y), int(x))
        for y, x in zip(*np.nonzero(corners), strict=True)
        if (sheet[y : y + height, x : x + width] == tile).all()
    ]


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
        place = found(sheet, expected_tile(image), top, left)
        np.testing.assert_array_equal(place, framed(expected_tile(image), FRAME, 1))
        place[:] = PAPER
    assert (sheet[TOP - 2 :] == PAPER).all()
    rows = -(-count // columns)
    assert sheet.shape[0] == TOP + rows * (tile_height + GAP) - GAP + MARGIN
    assert sheet.shape[1] >= 2 * MARGIN + min(count, columns) * (tile_width + GAP) - GAP
    title = sheet[: TOP - 2]
    assert (title != PAPER).any()
    assert (title[:, : MARGIN - 2] == PAPER).all()
    assert (title[:, 2 - MARGIN :] == PAPER).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_decodings_stand_below_their_original_whose_frame_is_dark(
    count: int, channels: int
) -> None:
    columns, originals = 4, random_images(count, channels, 14, 10)
    drawn = [1 - originals, originals / 2]
    sheet = opened(pictures.reconstructions(originals, drawn, columns)).copy()
    height, width, _ = expected_tile(originals[0]).shape
    blocks = -(-count // columns)
    block_height = 3 * (height + GAP) + 3 * GAP
    for number in range(count):
        block, column = divmod(number, columns)
        left = LABELLED + column * (width + GAP)
        for row, images in enumerate((originals, *drawn)):
            top = TOP + block * block_height + row * (height + GAP)
            tile = expected_tile(images[number])
            place = found(sheet, tile, top, left)
            frame = (FAINT, 2) if row == 0 else (FRAME, 1)
            np.testing.assert_array_equal(place, framed(tile, *frame))
            place[:] = PAPER
    assert (sheet[TOP - 2 :, LABELLED - GAP :] == PAPER).all()
    assert sheet.shape[0] == TOP + (blocks - 1) * block_height + 3 * (height + GAP) - GAP + MARGIN


def test_the_mean_of_many_decodings_is_shown_above_the_first_of_them() -> None:
    originals, *drawn = random_images(27, 3, 14, 10).split(3)
    sheet = opened(pictures.reconstructions(originals, drawn))
    mean = torch.stack(drawn).mean(0)
    tops = [
        [places(sheet, expected_tile(image))[0][0] for image in row]
        for row in (originals, mean, *drawn[: pictures.DECODINGS])
    ]
    assert tops == sorted(tops)
    assert len({top for row in tops for top in row}) == len(tops)
    for image in drawn[pictures.DECODINGS]:
        assert not places(sheet, expected_tile(image))


@pytest.mark.parametrize("pixels", [1, 10**9])
def test_decodings_are_independent_and_their_mean_is_what_the_code_keeps(
    pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factorized decoder's pixels are independent: their mean is known from the logits."""
    monkeypatch.setattr(pictures, "PIXELS_AT_ONCE", pixels)
    monkeypatch.setattr(pictures, "MEAN_OF", 500)
    arguments = {**MODEL, "window": "0x0", "flow_depth": 0}
    model, x = vlae.build(image_shape=(1, 8, 8), **arguments), random_images(2, 1, 8, 8).round()
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.zero_()  # q(z|x) is one distribution for all x
    drawn = pictures.decodings(model, x, torch.Generator().manual_seed(0))
    assert len(drawn) == 500
    assert all(images.shape == x.shape for images in drawn)
    assert len({images.numpy().tobytes() for images in drawn}) == 500
    with torch.no_grad():
        codes = model.encoder(x[:1]).sample(
            torch.randn(4000, model.latents, generator=torch.Generator().manual_seed(1))
        )
        logits = model.decoder.predict(model.decoder.condition(codes)).logits
    expected = torch.sigmoid(logits).mean(0).permute(2, 0, 1)
    error = (pictures.mean_of(drawn) - expected).abs()
    assert error.max() < 5 * 0.5 / 500**0.5


def test_values_beyond_black_and_white_are_black_and_white() -> None:
    images = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    sheet = opened(pictures.samples(images))
    assert (sheet[TOP : TOP + TILE, MARGIN : MARGIN + TILE] == 0).all()
    left = MARGIN + TILE + GAP
    assert (sheet[TOP : TOP + TILE, left : left + TILE] == 255).all()


def chart_of(sheet: np.ndarray) -> np.ndarray:
    """The bars of a chart of latents, without the legend above them and the axis below."""
    top = sheet.shape[0] - MARGIN - AXIS_HEIGHT - CHART_HEIGHT
    return sheet[top : top + CHART_HEIGHT - 1]


def test_bars_are_as_tall_as_what_latents_tell_in_order_and_pale_if_not_active() -> None:
    capacity, rate = [0.5, 2.0, 0.0, 1.0, 0.25], [0.25, 1.0, -0.5, 1.0, 0.125]
    chart = chart_of(opened(pictures.latents(capacity, rate, [True, True, True, True, False])))
    lit = {color: (chart == rgb(color)).all(2) for color in (BAR, RATE, PALE, PALE_RATE)}
    for wide, narrow, bars, rates in (
        (BAR, RATE, [1, 1 / 2, 1 / 4], [1 / 2, 1 / 2, 1 / 8]),  # latents 1, 3 and 0
        (PALE, PALE_RATE, [1 / 8], [1 / 16]),  # latent 4; 2 tells nothing
    ):
        heights = (lit[wide] | lit[narrow]).sum(0)
        columns = np.flatnonzero(heights)
        starts = columns[np.flatnonzero(np.diff(columns, prepend=-2) > 1)]
        assert [int(heights[x]) + 1 for x in starts] == [CHART_HEIGHT * each for each in bars]
        inner = [int(lit[narrow][:, x : x + 51].sum(0).max()) + 1 for x in starts]
        assert inner == [CHART_HEIGHT * each for each in rates]


@pytest.mark.parametrize("count", [1, 2, 32, 64, 500])
@pytest.mark.parametrize("scale", [0.0, 0.003, 0.7, 30.0])
def test_any_number_of_latents_of_any_size_has_its_chart(count: int, scale: float) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)) * scale
    sheet = opened(pictures.latents(values.tolist(), None, [True] * count))
    colored = (sheet == rgb(BAR)).all(2)
    assert colored.any() == (scale > 0)
    assert colored[:, :MARGIN].sum() == colored[:, -MARGIN:].sum() == colored[:TOP].sum() == 0
    assert sheet.shape[1] < 2200


@pytest.mark.parametrize("channels", [1, 3])
def test_each_model_has_a_row_with_its_decodings_and_its_samples(channels: int) -> None:
    images = random_images(21, channels, 16, 12)
    originals, *others = images.split(3)
    models = {
        ("window 3x2", "rate 1 bit"): (others[0], others[1], others[2]),
        ("a name $ of any {length} whatever", "any _figures"): (others[3], others[4], others[5]),
    }
    sheet = opened(pictures.side_by_side(originals, models))
    corners = [places(sheet, expected_tile(image, SMALL_TILE)) for image in images]
    assert [len(each) for each in corners] == [1] * 21
    tops, lefts = np.array([each[0] for each in corners]).reshape(7, 3, 2).transpose(2, 0, 1)
    assert (tops == tops[:, :1]).all()
    original, *rows = tops[:, 0]
    assert rows[0] == rows[1] == rows[2] > original
    assert rows[3] == rows[4] == rows[5] > rows[2]
    for first, second in zip(lefts[1:4], lefts[4:], strict=True):
        assert (first == second).all()
    assert (lefts[1] == lefts[0]).all()
    assert lefts[3, 0] > lefts[2, -1]
    assert lefts[2, 0] > lefts[1, -1]
    assert (np.diff(lefts, axis=1) == expected_tile(images[0], SMALL_TILE).shape[1] + GAP).all()


def theory_figures() -> dict[str, Any]:
    """Made up, but as ``vlae theory`` measures them."""
    rows = {"factorized": (14.5, 106.3), "covering": (4.3, 111.9), "full": (-0.001, 115.5)}
    return {
        "entropy": 115.0,
        "global_information": 3.9,
        "entropy_given_class": 111.1,
        "classes": 144,
        "without_z": {"covering": 129.0, "factorized": 160.0},
        **{
            name: {
                "window": "3x1",
                "rate": rate,
                "distortion": distortion,
                "code_length": rate + distortion,
                "excess": rate + distortion - 115.0,
            }
            for name, (rate, distortion) in rows.items()
        },
    }


def test_the_theorys_bars_are_as_long_as_distortion_and_rate_beside_the_images() -> None:
    images, *decoded = random_images(16, 1, 16, 16).split(4)
    figures = theory_figures()
    names = ("factorized", "covering", "full")
    drawn = {name: {"one decoding": x} for name, x in zip(names, decoded, strict=True)}
    sheet = opened(pictures.theory(figures, {"images": images}, drawn))
    corners = [
        places(sheet, expected_tile(image, THEORY_TILE)) for x in (images, *decoded) for image in x
    ]
    assert [len(each) for each in corners] == [1] * 16
    tops, lefts = np.array([each[0] for each in corners]).reshape(4, 4, 2).transpose(2, 0, 1)
    assert (tops == tops[:, :1]).all()
    assert (lefts == lefts[:1]).all()
    pixels_per_nat = 760 / (132 - 102)
    for name, top in zip(names, tops[1:, 0], strict=True):
        across = sheet[top + THEORY_TILE // 2]
        bar, rate = ((across == rgb(color)).all(1) for color in (BAR, RATE))
        ends = [np.flatnonzero(each)[[0, -1]] for each in (bar, rate) if each.any()]
        expected = [(figures[name]["distortion"] - 102) * pixels_per_nat]
        if name != "full":
            expected.append(figures[name]["rate"] * pixels_per_nat)
        lengths = [end - start + 1 for start, end in ends]
        assert lengths == pytest.approx(expected, abs=1.5)


def test_the_same_input_gives_the_same_bytes_whatever_matplotlibs_settings_are() -> None:
    def drawn() -> list[bytes]:
        images = random_images(2, 3, 8, 8)
        return [
            pictures.samples(images),
            pictures.reconstructions(images, [images]),
            pictures.latents([1.0, 0.5], [0.5, 0.25], [True, False]),
            pictures.side_by_side(images, {("name", "figures"): (images, images, images)}),
            pictures.theory(
                theory_figures(), {"images": images[:, :1]}, {"full": {"mean": images[:, :1]}}
            ),
        ]

    first, before = drawn(), dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "text.color": "red"}):
        assert drawn() == first
    assert dict(matplotlib.rcParams) == before
