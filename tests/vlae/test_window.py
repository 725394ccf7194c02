"""A window in the paper's notation has exactly the pixels of the paper's figure."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlae import Window

BY_HAND = {
    # First the block above, from the top, then the pixels to the left in the pixel's own row.
    "7x4": [(row, column) for row in (-4, -3, -2, -1) for column in (-3, -2, -1, 0, 1, 2, 3)]
    + [(0, -3), (0, -2), (0, -1)],
    "5x3": [(row, column) for row in (-3, -2, -1) for column in (-2, -1, 0, 1, 2)]
    + [(0, -2), (0, -1)],
    "4x2": [
        (-2, -2),
        (-2, -1),
        (-2, 0),
        (-2, 1),
        (-1, -2),
        (-1, -1),
        (-1, 0),
        (-1, 1),
        (0, -2),
        (0, -1),
    ],
    "3x1": [(-1, -1), (-1, 0), (-1, 1), (0, -1)],
    "2x1": [(-1, -1), (-1, 0), (0, -1)],
    "1x1": [(-1, 0)],
    "3x0": [(0, -1)],
    "0x0": [],
    "7x4-grey": [(row, column) for row in (-4, -3, -2, -1) for column in range(-3, 4)]
    + [(0, -3), (0, -2), (0, -1)],
    # Cells of 2 x 2 above, and of 1 x 2 to the left.
    "2x1-down2": [
        (-2, -2),
        (-2, -1),
        (-2, 0),
        (-2, 1),
        (-1, -2),
        (-1, -1),
        (-1, 0),
        (-1, 1),
        (0, -2),
        (0, -1),
    ],
    "1x2-down2": [(row, column) for row in (-4, -3, -2, -1) for column in (0, 1)],
    "3x1-down3": [(row, column) for row in (-3, -2, -1) for column in range(-3, 6)]
    + [(0, -3), (0, -2), (0, -1)],
}


@pytest.mark.parametrize("text", BY_HAND)
def test_offsets_are_the_ones_counted_by_hand(text: str) -> None:
    assert list(Window.parse(text).offsets) == BY_HAND[text]


@given(st.integers(1, 40), st.integers(0, 40))
@settings(deadline=None, derandomize=True, database=None)
def test_every_offset_is_earlier_in_raster_order_and_unique(width: int, height: int) -> None:
    offsets = Window(width, height).offsets
    assert all(row < 0 or (row == 0 and column < 0) for row, column in offsets)
    assert list(offsets) == sorted(set(offsets))


@given(st.integers(1, 40), st.integers(0, 40))
@settings(deadline=None, derandomize=True, database=None)
def test_the_block_is_width_by_height_and_reaches_further_left_than_right(
    width: int, height: int
) -> None:
    window = Window(width, height)
    assert window.left == math.ceil((width - 1) / 2)
    assert window.right == (math.floor((width - 1) / 2) if height else 0)
    assert len(window.offsets) == width * height + window.left


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 5))
@settings(deadline=None, derandomize=True, database=None)
def test_the_cells_of_a_down_sampled_window_are_arranged_as_the_pixels_of_a_plain_one(
    width: int, height: int, down: int
) -> None:
    window, plain = Window(width, height, down=down), Window(width, height)
    cells: dict[int, list[tuple[int, int]]] = {}
    for cell, offset in zip(window.cells, window.offsets, strict=True):
        cells.setdefault(cell, []).append(offset)
    # Divided by the size of a cell, its first pixel is an offset of the plain window.
    places = {
        (math.ceil(-row / down) * -1, column // down)
        for row, column in (offsets[0] for offsets in cells.values())
    }
    assert places == set(plain.offsets)
    for offsets in cells.values():
        (row, column), (last_row, last_column) = offsets[0], offsets[-1]
        assert last_column - column == down - 1
        assert last_row - row == (0 if row == 0 else down - 1)
        assert len(offsets) == (last_row - row + 1) * down


@given(st.integers(1, 9999), st.integers(0, 9999), st.integers(1, 999), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_parsing_undoes_printing(width: int, height: int, down: int, grey: bool) -> None:
    window = Window(width, height, down=down, grey=grey)
    assert Window.parse(str(window)) == window
    assert str(Window.parse(f"{width}x{height}")) == f"{width}x{height}"


def test_full_parses_prints_and_has_no_offsets() -> None:
    assert str(Window.parse("full")) == "full"
    assert Window.parse("full").full
    with pytest.raises(ValueError, match="full"):
        _ = Window.parse("full").offsets


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "7x",
        "x4",
        "7X4",
        "7 x 4",
        "-7x4",
        "7x-4",
        "7x4x2",
        "7x4\n",
        "Full",
        "7.0x4",
        "7x4-down",
        "7x4-grey-down2",
        "7x4grey",
    ],
)
def test_text_that_is_not_a_window_is_an_error_that_quotes_it(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Window.parse(text)


@pytest.mark.parametrize("text", ["3x2-down0", "full-down2"])
def test_a_window_that_cannot_be_down_sampled_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition("-")[0]):
        Window.parse(text)


def test_a_block_without_columns_is_an_error_that_names_the_window() -> None:
    with pytest.raises(ValueError, match="0x3"):
        Window.parse("0x3")


@pytest.mark.parametrize("text", ["9x2", "5x7", "9x7", "5x1-down2", "1x4-down2"])
def test_a_window_larger_than_the_image_is_an_error_that_names_window_and_image(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}.*8x6"):
        Window.parse(text).check_fits(height=6, width=8)


@pytest.mark.parametrize("text", ["8x6", "0x0", "1x1", "full", "4x3-down2"])
def test_a_window_of_at_most_the_image_fits(text: str) -> None:
    Window.parse(text).check_fits(height=6, width=8)
