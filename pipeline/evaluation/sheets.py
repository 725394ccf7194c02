"""What a code keeps, as PNG: its curve, and images beside their neighbours or duplicates."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from pipeline.evaluation.page import (
    DPI,
    FRAME,
    GAP,
    HEADING,
    MARGIN,
    TEXT,
    TITLE,
    Page,
    text_width,
    tiles,
)
from pipeline.evaluation.resolution import THRESHOLD
from pipeline.evaluation.style import FAINT, INK, styled
from pipeline.values import JsonObject

COLORS = ("#3f6fa8", "#e88c46", "#5b9a68", "#9a6fb0", "#b8534d", "#6b7280")
"""The curves, in their order."""
WAVELENGTHS = (2, 2.5, 3, 4, 5, 7, 10, 14, 28, 64, 128)
"""The wavelengths in pixels that the axis names, as far as they have room."""
QUERY, TILE = 132, 60
"""About how many pixels high a query and a neighbour are."""
HEADER = 64
"""Pixels from the top of the title to the first image."""
OTHER_CLASS = "#d9532c"
"""The frame of a neighbour of another class."""


@styled
def resolutions(measured: Mapping[str, JsonObject]) -> bytes:
    """The ring correlations of each model by its name, and where they fall to 0.5.

    measured: what ``Resolution.to_json`` gave for each. A band is a standard error to either side.
    """
    figure = Figure((8.2, 4.4), DPI)
    axes = figure.subplots()
    finest = max(each["resolution"]["cycles_per_px"][-1] for each in measured.values())
    axes.axhline(THRESHOLD, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "the code decides half",
        (finest, THRESHOLD),
        (0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=TEXT,
        color=FAINT,
    )
    for place, (name, each) in enumerate(measured.items()):
        curve, color, px = each["resolution"], COLORS[place % len(COLORS)], each["resolution_px"]
        frequency, height = curve["cycles_per_px"], np.array(curve["correlation"])
        label = "keeps no structure" if px is None else f"{px:.1f} px"
        axes.plot(
            frequency,
            height,
            color=color,
            linewidth=1.8,
            marker="o",
            markersize=3,
            label=f"{name}: {label}" if name else label,
        )
        if None not in curve["correlation_se"]:
            error = np.array(curve["correlation_se"])
            axes.fill_between(
                frequency, height - error, height + error, color=color, alpha=0.2, linewidth=0
            )
        if px is not None:
            axes.plot([1 / px, 1 / px], [0, THRESHOLD], color=color, linewidth=1, linestyle=":")
    shown: list[float] = []
    for px in WAVELENGTHS:
        if 1 / px <= finest and all(abs(1 / px - 1 / each) > finest / 16 for each in shown):
            shown.append(px)
    axes.set_xticks([0, *(1 / px for px in shown)], ["all", *(f"{px:g}" for px in shown)])
    axes.xaxis.set_minor_locator(NullLocator())
    lowest = min(min(each["resolution"]["correlation"]) for each in measured.values())
    axes.set(xlim=(0, finest * 1.01), ylim=(min(0.0, lowest - 0.02), 1.0))
    axes.set_xlabel("size of structure: wavelength in pixels, coarse to fine", fontsize=HEADING)
    axes.set_ylabel("correlation of image and redrawing", fontsize=HEADING)
    axes.set_title("What the code keeps", loc="left", fontsize=TITLE)
    axes.legend(fontsize=HEADING, loc="upper right")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


@styled
def neighbours(
    queries: Tensor, rows: Mapping[str, Tensor], agree: Mapping[str, Tensor] | None
) -> bytes:
    """Each query beside a row of neighbours for each way to compare, the nearest first.

    queries: (num_queries, channels, height, width), pixels in [0, 1]. rows: under the name of each
    way, (num_queries, k, channels, height, width). agree: under the same names whether each
    neighbour has its query's class, (num_queries, k); none if there are no classes.
    """
    names, count = list(rows), next(iter(rows.values())).shape[1]
    large, (_, tile_height, tile_width, _) = tiles(queries, QUERY), tiles(queries[:1], TILE).shape
    left = MARGIN + large.shape[2] + 3 * GAP
    first = left + max(map(text_width, names)) + 2 * GAP
    height = max(large.shape[1], len(names) * (tile_height + GAP) - GAP)
    pitch = height + 4 * GAP
    title = "Each image, and the nearest to it"
    note = "framed in red: of another class" if agree is not None else ""
    page = Page(
        max(first + count * (tile_width + GAP) - GAP, MARGIN + text_width(title, TITLE)) + MARGIN,
        MARGIN + HEADER + len(queries) * pitch - 4 * GAP + MARGIN,
    )
    page.text(MARGIN, MARGIN + 18, title, TITLE)
    page.text(MARGIN, MARGIN + 44, note, TEXT, FAINT)
    for number in range(len(queries)):
        top = MARGIN + HEADER + number * pitch
        page.row(large[number : number + 1], MARGIN, top, FAINT, 2)
        for place, name in enumerate(names):
            y = top + place * (tile_height + GAP)
            page.text(first - 2 * GAP, y + tile_height // 2 + 6, name, TEXT, FAINT, "right")
            found = tiles(rows[name][number], TILE)
            for column in range(count):
                same = agree is None or bool(agree[name][number, column])
                x = first + column * (tile_width + GAP)
                frame, width = (FRAME, 1) if same else (OTHER_CLASS, 3)
                page.row(found[column : column + 1], x, y, frame, width)
    return page.png()


@styled
def pairs(first: Tensor, second: Tensor, captions: Sequence[str], columns: int = 5) -> bytes:
    """Pairs of images side by side, each above its caption of some lines.

    first, second: (num_pairs, channels, height, width), pixels in [0, 1].
    """
    drawn = [tiles(each, QUERY) for each in (first, second)]
    _, height, width, _ = drawn[0].shape
    lines = max(len(caption.splitlines()) for caption in captions)
    caption_width = max(text_width(line) for caption in captions for line in caption.splitlines())
    across = max(2 * width + GAP, caption_width) + 4 * GAP
    down = height + lines * 22 + 4 * GAP
    title = "Images that are equal or nearly so"
    num_rows = -(-len(captions) // columns)
    page = Page(
        max(min(columns, len(captions)) * across - 4 * GAP, text_width(title, TITLE)) + 2 * MARGIN,
        MARGIN + HEADER - 24 + num_rows * down - 4 * GAP + MARGIN,
    )
    page.text(MARGIN, MARGIN + 18, title, TITLE)
    for number, caption in enumerate(captions):
        x = MARGIN + number % columns * across
        y = MARGIN + HEADER - 24 + number // columns * down
        page.row(np.stack([each[number] for each in drawn]), x, y)
        for line, text in enumerate(caption.splitlines()):
            page.text(x, y + height + 22 * (line + 1), text, TEXT, FAINT)
    return page.png()
