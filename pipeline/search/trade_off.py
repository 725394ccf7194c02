"""The chart of the trade-off: rate against distortion, and what the constraints exclude."""

import math
from collections.abc import Iterable, Sequence
from string import ascii_lowercase

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeline.config.goals import Constraint, Goals
from pipeline.config.search import SearchOptions
from pipeline.evaluation.style import FAINT, INK
from pipeline.search.chart_style import ChartStyle
from pipeline.search.trials import Row, is_finished

DASHES = (0, (4, 3))
TRADE_OFF = Goals.parse(["min rate_bits", "min distortion_nats"])
EXCLUDED, HATCH = "#eceef1", "#d3d8df"
"""What the constraints exclude: its colour, and that of the lines over it."""
PLANE = {
    "rate_bits": (1.0, 0.0, "||"),
    "distortion_nats": (0.0, 1.0, "--"),
    "nll": (math.log(2), 1.0, "\\\\"),
}
"""Quantities that are linear in rate (bits) and distortion (nats): the two factors, and the
hatching of what a constraint excludes, along its border. ``nll`` is drawn as code length.
"""


def front(
    style: ChartStyle, rows: Sequence[Row], along: Sequence[Row], search: SearchOptions
) -> Figure | None:
    """Plot rate against distortion of every trial, and join those ``along`` the front.

    Diagonals are lines of equal code length. What the constraints on rate, distortion and NLL
    exclude is hatched. Finished trials that break any constraint are pale; if it is one that the
    axes do not show, a letter says which.
    """
    placed = [row for row in rows if "distortion_nats" in row]
    if not placed:
        return None
    figure = Figure(figsize=(8.6, 4.6))
    axes = figure.subplots()
    joined = sorted((row["rate_bits"], row["distortion_nats"]) for row in along)
    if joined:
        axes.plot(*zip(*joined, strict=True), color=INK, linewidth=1, zorder=1)
    for row in reversed(placed):
        finished = is_finished(row)
        face = style.color(row) if finished else "white"
        size = 9 if finished else 5
        edge = INK if row.get("front") == 1 else style.color(row)
        axes.plot(
            row["rate_bits"],
            row["distortion_nats"],
            style.marker(row),
            markersize=size,
            markerfacecolor=face,
            markeredgecolor=edge,
            gid=f"trial{row['number']}.front",
            zorder=3 if finished else 2,
            alpha=0.7 if not finished else 1 if row["feasible"] else 0.35,
        )
    _fit(axes, [row for row in placed if is_finished(row)] or placed)
    excluded = _exclude(axes, search)
    letters = _letter(axes, placed, search)
    _code_lengths(axes)
    axes.set_xlabel("rate, bits per image: what the code z carries")
    axes.set_ylabel("distortion, nats per image: left to the decoder")
    more: list[Artist] = [
        Line2D([], [], color=INK, linewidth=1, label="front: none has less of both"),
        Line2D(
            [],
            [],
            color=INK,
            marker="o",
            markerfacecolor=FAINT,
            markersize=9,
            linestyle="",
            label="best by the objectives",
        ),
    ]
    if any(is_finished(row) and not row["feasible"] for row in placed):
        more += [
            Line2D(
                [],
                [],
                color=FAINT,
                marker="o",
                markersize=9,
                linestyle="",
                alpha=0.35,
                label="breaks a constraint",
            )
        ]
    more += [
        Line2D(
            [],
            [],
            color=FAINT,
            marker="o",
            markerfacecolor="white",
            markersize=5,
            linestyle="",
            label="stopped early",
        ),
        Line2D([], [], color=FAINT, linewidth=1, linestyle=DASHES, label="equal code length, nats"),
        *excluded,
        *letters,
    ]
    style.legend(axes, more)
    return figure


def _exclude(axes: Axes, search: SearchOptions) -> list[Patch]:
    """Hatch what the constraints exclude; returns an entry of the legend for each that shows."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    entries = []
    for number, constraint in enumerate(search.goals.constraints):
        if constraint.name not in PLANE:
            continue
        of_rate, of_distortion, hatch = PLANE[constraint.name]
        values = [[of_rate * x + of_distortion * y for x in (left, right)] for y in (bottom, top)]
        least, most = min(map(min, values)), max(map(max, values))
        bands = [
            (low, high)
            for low, high in (
                (least, min(constraint.low, most)),
                (max(constraint.high, least), most),
            )
            if low < high
        ]
        for side, band in enumerate(bands):
            # Interpolation between the four corners is exact: the quantity is linear.
            corners = ((left, right), (bottom, top), values, band)
            axes.contourf(*corners, colors=EXCLUDED, zorder=0)
            lines = axes.contourf(*corners, colors="none", hatches=[hatch], zorder=0.5)
            lines.set(edgecolor=HATCH, linewidth=0, gid=f"outside{number}.{side}")
        if bands:
            measure = "" if _is_placed(constraint, search) else "code length "
            label = f"{measure}outside {constraint}"
            entries.append(Patch(facecolor=EXCLUDED, edgecolor=HATCH, hatch=hatch, label=label))
    return entries


def _is_placed(constraint: Constraint, search: SearchOptions) -> bool:
    """Whether a trial's place alone says if it keeps the constraint.

    The NLL is the code length only with one sample; with more it is lower.
    """
    return constraint.name in PLANE and (constraint.name != "nll" or search.samples == 1)


def _letter(axes: Axes, rows: Iterable[Row], search: SearchOptions) -> list[Line2D]:
    """Letter finished trials by the constraints that they break, where their place does not say it.

    Returns the legend of these constraints.
    """
    rows = [row for row in rows if is_finished(row)]
    broken = {row["number"]: search.goals.broken(row) for row in rows}
    lettered = [
        each
        for each in search.goals.constraints
        if not _is_placed(each, search) and any(each in found for found in broken.values())
    ]
    letters = dict(zip(lettered, ascii_lowercase, strict=False))
    for row in rows:
        if text := "".join(
            letter for each, letter in letters.items() if each in broken[row["number"]]
        ):
            axes.annotate(
                text,
                (row["rate_bits"], row["distortion_nats"]),
                (5, 4),
                textcoords="offset points",
                fontsize=9,
                gid=f"trial{row['number']}.breaks",
                zorder=4,
            )
    return [
        Line2D(
            [],
            [],
            color=INK,
            marker=rf"$\mathrm{{{letter}}}$",
            markeredgewidth=0,
            linestyle="",
            label=f"breaks {each}",
        )
        for each, letter in letters.items()
    ]


def _fit(axes: Axes, rows: Sequence[Row]) -> None:
    """Fit the axes to the finished trials; trials that were stopped early may lie outside."""
    for key, limits in (("rate_bits", axes.set_xlim), ("distortion_nats", axes.set_ylim)):
        values = [row[key] for row in rows]
        margin = 0.12 * (max(values) - min(values)) or 1.0
        limits(min(values) - margin, max(values) + margin)


def _code_lengths(axes: Axes) -> None:
    """Draw lines of equal code length, distortion + rate ln 2, labelled at their upper end."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    lowest, highest = bottom + left * math.log(2), top + right * math.log(2)
    step = next(
        (each for each in (0.5, 1, 2, 5, 10, 20, 50, 100) if (highest - lowest) / each <= 8), 200
    )
    for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1):
        length = number * step
        ends = [(x, length - x * math.log(2)) for x in (left, right)]
        axes.plot(
            *zip(*ends, strict=True),
            color=FAINT,
            alpha=0.4,
            linewidth=1,
            linestyle=DASHES,
            zorder=0.5,
            scalex=False,
            scaley=False,
        )
        x = left if ends[0][1] <= top else (length - top) / math.log(2)
        if x < left + 0.93 * (right - left) and length - x * math.log(2) > bottom + 0.05 * (
            top - bottom
        ):
            axes.annotate(
                f"{length:g}",
                (x, length - x * math.log(2)),
                (3, -2),
                textcoords="offset points",
                color=FAINT,
                fontsize=8,
                va="top",
            )
    axes.grid(visible=False)
