"""The pictures that show what a model has learned, as PNG."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import IdentityTransform
from torch import Tensor

import vlae
from pipeline.data.images import Pixels
from pipeline.evaluation.page import GAP, HEADING, MARGIN, TEXT, TITLE, Page, text_width, tiles
from pipeline.evaluation.style import FAINT, INK, RULE, styled
from pipeline.values import JsonObject

BAR, RATE = "#7a9ec9", "#e88c46"
"""Capacity or distortion, and rate."""
PALE, PALE_RATE = "#d9dee5", "#aeb6c1"
"""A latent that is not active, and its rate."""
TILE, SMALL_TILE, THEORY_TILE = 112, 84, 96
"""About how many pixels high an image is on a sheet, side by side, and in the theory's figure."""
HEADER = 44
"""Pixels from the top of a sheet's title to its first image."""
CHART_HEIGHT, AXIS_HEIGHT = 320, 44
"""Pixels of the chart of latents, and of the labels below it."""
DECODINGS = 3
"""How many decodings of each code a picture of reconstructions shows."""
MEAN_OF = 16
"""How many decodings of each code are averaged. Their mean shows what the code keeps: with the next
16 it would differ by a quarter of the standard deviation of one decoding.
"""
PIXELS_AT_ONCE = 1 << 18
"""Pixels that are decoded at once, which bounds the memory of large images. In small ones, rounds
of pixels take about the same time for all decodings as for one.
"""
SIDE_BY_SIDE = (
    f"mean of {MEAN_OF} decodings of each original's code",
    "one of them",
    "samples: z from the prior, x from the decoder",
)
"""The heads of the images of each model, side by side."""
SEES = {
    "factorized": "sees no pixel ({window})",
    "covering": "sees the texture's window ({window})",
    "full": "sees every earlier pixel ({window})",
}


def draw_samples(model: vlae.VLAE, num_images: int, generator: torch.Generator) -> bytes:
    """A picture of images drawn from the model."""
    return samples(vlae.sample(model, num_images, generator))


def draw_reconstructions(model: vlae.VLAE, x: Tensor, generator: torch.Generator) -> bytes:
    """A picture of images, as the model sees them, above decodings of their codes.

    x: (num_images, channels, height, width).
    """
    return reconstructions(x, decodings(model, x, generator))


def decodings(model: vlae.VLAE, x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """``MEAN_OF`` tensors like x: in each, z ~ q(z|x) and an image x' ~ p(x'|z) for each image.

    x: (num_images, channels, height, width). Their mean estimates E[x'|x]. It needs no likelihood's
    mean: an autoregressive decoder has one only given the pixels that were drawn before.
    """
    at_once = max(1, PIXELS_AT_ONCE // (len(x) * x.shape[-2] * x.shape[-1]))
    drawn: list[Tensor] = []
    while left := MEAN_OF - len(drawn):
        count = min(left, at_once)
        images = vlae.reconstruct(model, x.repeat(count, 1, 1, 1), generator)
        drawn += images.chunk(count)
    return drawn


def samples(images: Tensor, columns: int = 10) -> bytes:
    """Images drawn from the model; (num_images, channels, height, width), pixels in [0, 1]."""
    return contact_sheet(images, "Samples: z from the prior, x from the decoder", columns)


@styled
def contact_sheet(images: Tensor, title: str, columns: int = 10) -> bytes:
    """Images of a data set; (num_images, channels, height, width), pixels in [0, 1]."""
    rows = [tiles(part, TILE) for part in images.split(columns)]
    return _sheet(title, [[row] for row in rows], [""])


@styled
def reconstructions(originals: Tensor, drawn: list[Tensor], columns: int = 10) -> bytes:
    """Each original above images decoded from its code.

    What the decodings share is in the code; where they differ, the decoder has filled it in. If
    there are more than ``DECODINGS``, the first of them are shown, below the mean of all.

    originals: (num_images, channels, height, width), pixels in [0, 1]; drawn: a list of tensors
    like it.
    """
    shown = {"original": [originals], "decoded": drawn[:DECODINGS]}
    title = f"Originals, and {len(drawn)} decodings of each original's code"
    if len(drawn) > DECODINGS:
        mean = f"mean of {len(drawn)}"
        shown = {"original": [originals], mean: [mean_of(drawn)], "decoded": drawn[:DECODINGS]}
        title = f"Originals, the mean of {len(drawn)} decodings of each original's code, and"
        title += f" {DECODINGS} of these"
    parts = [images.split(columns) for rows in shown.values() for images in rows]
    blocks = [[tiles(part, TILE) for part in block] for block in zip(*parts, strict=True)]
    return _sheet(title, blocks, [label for label, rows in shown.items() for _ in rows])


def mean_of(drawn: Sequence[Tensor]) -> Tensor:
    """The mean image of several decodings of each code, of the shape of one of them."""
    return torch.stack(list(drawn)).mean(0)


@styled
def shortened(originals: Tensor, drawn: Mapping[str, Tensor], columns: int = 10) -> bytes:
    """Each original above images decoded from ever more of its code.

    originals: (num_images, channels, height, width), pixels in [0, 1]; drawn: tensors like it, by
    their label.
    """
    parts = [images.split(columns) for images in (originals, *drawn.values())]
    blocks = [[tiles(part, SMALL_TILE) for part in block] for block in zip(*parts, strict=True)]
    return _sheet("Decodings of the first latents of each code", blocks, ["original", *drawn])


def _sheet(title: str, blocks: Sequence[Sequence[Pixels]], labels: Sequence[str]) -> bytes:
    """A titled sheet of blocks of rows of tiles, with a label for each row of a block.

    The first row of a block with several has a dark frame, which sets it off from the others.
    """
    columns, height, width, _ = blocks[0][0].shape
    left = MARGIN + max(text_width(label) + 2 * GAP if label else 0 for label in labels)
    between = 3 * GAP if len(labels) > 1 else 0
    block_height = len(labels) * (height + GAP) + between
    page = Page(
        max(left + columns * (width + GAP) - GAP, MARGIN + text_width(title, TITLE)) + MARGIN,
        MARGIN + HEADER + len(blocks) * block_height - between - GAP + MARGIN,
    )
    page.text(MARGIN, MARGIN + 18, title, TITLE)
    for number, block in enumerate(blocks):
        for place, (row, label) in enumerate(zip(block, labels, strict=True)):
            top = MARGIN + HEADER + number * block_height + place * (height + GAP)
            page.text(left - 2 * GAP, top + height // 2 + 6, label, TEXT, FAINT, "right")
            if place == 0 and len(labels) > 1:
                page.row(row, left, top, FAINT, 2)
            else:
                page.row(row, left, top)
    return page.png()


@styled
def latents(capacity: list[float], rate: list[float] | None, active: list[bool]) -> bytes:
    """A bar chart of the latents' capacities in bits, the largest first.

    A latent's capacity is the most that it alone can tell about an image. Rates, where each latent
    has one, are narrow bars within the wide ones. The bars of inactive latents are pale.
    """
    order = sorted(range(len(capacity)), key=lambda latent: -capacity[latent])
    largest = max(capacity + (rate or []))
    lines = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, max(largest, 0.01))
    title = "Capacity of each latent: the most it can tell about an image"
    total = f"{sum(capacity):.1f} bits together; {sum(active)} of {len(active)} latents are active"

    pitch = max(4, min(64, 1400 // len(order)))  # pixels from one bar to the next
    gap = max(1, pitch // 5)
    inset = (pitch - gap) // 3
    kinds = [("capacity", capacity, 0, BAR, PALE)]
    if rate:
        kinds.append(("rate", rate, inset, RATE, PALE_RATE))
    handles = [Patch(color=color, label=label) for label, _, _, color, _ in kinds]
    if not all(active):
        handles.append(Patch(color=PALE, label="not active"))

    left, top = MARGIN + 72, MARGIN + HEADER + (64 if len(handles) > 1 else 40)
    width = max(len(order) * pitch, 612)  # room for the title and the legend
    page = Page(
        max(left + width, MARGIN + text_width(title, TITLE), MARGIN + text_width(total)) + MARGIN,
        top + CHART_HEIGHT + AXIS_HEIGHT + MARGIN,
    )
    page.text(MARGIN, MARGIN + 18, title, TITLE)
    page.text(MARGIN, MARGIN + 46, total, TEXT, FAINT)
    axes = page.axes(left, top, width, CHART_HEIGHT)
    axes.set(xlim=(0, width), ylim=(0, lines[-1]), yticks=lines)
    places = [pitch * place for place in range(len(order))]
    for _, values, margin, color, pale in kinds:
        axes.bar(
            [place + gap // 2 + margin for place in places],
            [max(0.0, values[latent]) for latent in order],
            pitch - gap - 2 * margin,
            align="edge",
            color=[color if active[latent] else pale for latent in order],
        )
    if len(handles) > 1:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(handles),
            fontsize=TEXT,
            borderpad=0,
            borderaxespad=0.6,
        )
    labelled = pitch >= 28
    axes.set_xticks(
        [place + pitch / 2 for place in places] if labelled else [],
        [str(latent) for latent in order] if labelled else [],
    )
    axes.tick_params(length=0, labelsize=TEXT)
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("latent" if labelled else "latents, the largest first", fontsize=TEXT)
    axes.set_ylabel("bits", fontsize=TEXT)
    return page.png()


@styled
def side_by_side(
    originals: Tensor, models: Mapping[tuple[str, str], tuple[Tensor, Tensor, Tensor]]
) -> bytes:
    """A row for each model: what it makes of the same originals, and its samples.

    originals: (num_images, channels, height, width), pixels in [0, 1]; models: under each model's
    name and figures, the mean of its decodings of each original, one decoding, and samples: three
    tensors like the originals.
    """
    top_row = tiles(originals, SMALL_TILE)
    count, height, width, _ = top_row.shape
    block, pitch = count * (width + GAP) - GAP, max(height, 48) + 2 * GAP
    left = (
        MARGIN
        + max(max(text_width(name, HEADING), text_width(told)) for name, told in models)
        + 3 * GAP
    )
    lefts = [left + place * (block + 4 * GAP) for place in range(len(SIDE_BY_SIDE))]
    right, top = lefts[-1] + block, MARGIN + 2 * GAP + 14
    page = Page(right + MARGIN, top + (len(models) + 1) * pitch + GAP + MARGIN)
    for x, head in zip(lefts, SIDE_BY_SIDE, strict=True):
        page.text(x, MARGIN + 12, head, TEXT, FAINT)
    page.text(MARGIN, top + height // 2 + 6, "originals", HEADING)
    page.row(top_row, left, top)
    page.fill(MARGIN, top + pitch - GAP // 2, right - MARGIN, 2, RULE)
    for place, ((name, told), rows) in enumerate(models.items(), 1):
        y = top + place * pitch + GAP
        page.text(MARGIN, y + height // 2 - 5, name, HEADING)
        page.text(MARGIN, y + height // 2 + 19, told, TEXT, FAINT)
        for x, row in zip(lefts, rows, strict=True):
            page.row(tiles(row, SMALL_TILE), x, y)
    return page.png()


@styled
def theory(
    figures: JsonObject,
    images: Mapping[str, Tensor],
    drawn: Mapping[str, Mapping[str, Tensor]],
) -> bytes:
    """Each decoder's distortion and rate against the entropy, and its decodings of some images.

    figures: what ``vlae theory`` measured. images: named rows of images, each
    (num_images, 1, height, width), pixels in [0, 1]; drawn: such rows for each decoder.
    """
    count, height, width, _ = tiles(next(iter(images.values())), THEORY_TILE).shape
    pitch = height + GAP
    band = max(map(len, drawn.values())) * pitch + 3 * GAP
    labels = {name for rows in (images, *drawn.values()) for name in rows}
    chart_left, chart_width = MARGIN + 300, 760
    left = chart_left + chart_width + 5 * GAP + max(map(text_width, labels)) + 2 * GAP
    first_row = MARGIN + 104
    chart_top = first_row + len(images) * pitch + 5 * GAP
    chart_height = len(drawn) * band
    page = Page(left + count * (width + GAP) - GAP + MARGIN, chart_top + chart_height + 56 + MARGIN)
    page.text(MARGIN, MARGIN + 26, "What the decoder sees decides what the code carries", 18)
    page.text(
        MARGIN,
        MARGIN + 62,
        f"Images of known entropy: H = {figures['entropy']:.2f} nats,"
        f" {figures['global_information']:.2f} of them global (which of {figures['classes']}"
        f" patterns), {figures['entropy_given_class']:.2f} local texture",
        HEADING,
        FAINT,
    )

    def place_rows(rows: Mapping[str, Tensor], top: int) -> None:
        for place, (name, row) in enumerate(rows.items()):
            y = top + place * pitch
            page.text(left - 2 * GAP, y + height // 2 + 6, name, TEXT, FAINT, "right")
            page.row(tiles(row, THEORY_TILE), left, y)

    place_rows(images, first_row)
    for place, (name, rows) in enumerate(drawn.items()):
        row, middle = figures[name], chart_top + place * band + band // 2
        page.text(MARGIN, middle - 38, f"{name} decoder", HEADING + 1)
        page.text(MARGIN, middle - 12, SEES[name].format(window=row["window"]), TEXT, FAINT)
        rate = round(row["rate"], 2) + 0.0  # no -0.00
        page.text(MARGIN, middle + 24, f"R = {rate:.2f}   D = {row['distortion']:.2f}")
        excess = f"C - H = {row['excess']:.2f}"
        page.text(
            MARGIN, middle + 50, f"{excess}  ({100 * row['excess'] / figures['entropy']:.1f} %)"
        )
        place_rows(rows, chart_top + place * band + (band - len(rows) * pitch + GAP) // 2)
    axes = page.axes(chart_left, chart_top, chart_width, chart_height)
    _code_lengths(axes, figures, list(drawn))
    axes.legend(
        handles=[
            Patch(color=RATE, label="rate R: carried by the code z"),
            Patch(color=BAR, label="distortion D: left to the decoder"),
        ],
        loc="upper left",
        bbox_to_anchor=(chart_left, page.height - first_row),
        bbox_transform=IdentityTransform(),
        borderpad=0,
        borderaxespad=0,
        fontsize=HEADING,
    )
    return page.png()


def _code_lengths(axes: Axes, figures: JsonObject, names: Sequence[str]) -> None:
    """Draw each decoder's bar into the axes, the first on top, one unit apart."""
    entropy, texture = figures["entropy"], figures["entropy_given_class"]
    rows = [figures[name] for name in names]
    # The axis leaves out the nats that all decoders spend alike, or the differences would be too
    # small to see.
    first = 2 * math.floor((min(texture, *(row["distortion"] for row in rows)) - 3) / 2)
    longest = max(entropy, *(row["code_length"] for row in rows), figures["without_z"]["covering"])
    last = 2 * math.ceil((longest + 2) / 2)
    axes.set(xlim=(first, last), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 4, 10], integer=True))
    axes.tick_params(length=0, labelsize=TEXT)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("nats per image (the axis does not begin at 0)", color=FAINT, fontsize=TEXT)
    thickness = 0.34
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        code = max(0.0, row["code_length"] - row["distortion"])
        axes.barh(place, row["distortion"] - first, thickness, first, color=BAR)
        axes.barh(place, code, thickness, row["distortion"], color=RATE)
        without = figures["without_z"].get(name, math.inf)
        if without < last:
            half = thickness / 2 + 0.03
            axes.plot([without, without], [place - half, place + half], color=INK, linewidth=1.5)
            axes.annotate(
                "least without z",
                (without, place + half),
                (0, -4),
                textcoords="offset points",
                color=FAINT,
                fontsize=TEXT,
                ha="center",
                va="top",
            )
    for nats, text, side, line in (
        (texture, "texture H(x|c)", "right", "--"),
        (entropy, "entropy H", "left", "-"),
    ):
        axes.axvline(nats, color=INK, linewidth=1.5, linestyle=line)
        axes.annotate(
            text,
            (nats, 1),
            (3 if side == "left" else -3, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=TEXT,
            ha=side,
        )
