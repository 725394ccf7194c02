"""The charts of a search's trials: the map, learning curves, and the models side by side."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

import vlae
from pipeline.config.search import TuneConfig
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation import pictures
from pipeline.evaluation.style import FAINT, INK
from pipeline.registry.models import open_model
from pipeline.search.chart_style import CHARTED, ChartStyle, name_of
from pipeline.search.trials import Row, is_finished

MODELS, IMAGES = 6, 8
"""Models on the comparison sheet, and images per model."""


def heat_map(style: ChartStyle, rows: Sequence[Row]) -> Figure | None:
    """Map rate, NLL and probe accuracy over the two main options.

    A cell shows its finished trial with the lowest NLL. If none finished, it shows, in pale, the
    last validation of the trial that saw the most images.
    """
    across = style.across
    ys, xs = style.axes[style.color_key], style.axes[across] if across else [""]
    cells: dict[tuple[int, int], Row] = {}
    for row in rows:
        if "nll" not in row:
            continue
        place = ys.index(row[style.color_key]), xs.index(row[across]) if across else 0
        if place not in cells or _counts_more(row, cells[place]):
            cells[place] = row
    finished = [row for row in cells.values() if is_finished(row)]
    measures = [key for key in CHARTED if any(key in row for row in finished)]
    if not measures:
        return None
    figure = Figure(figsize=(3.2 * len(measures) + 0.8, 0.55 * len(ys) + 1.5))
    for axes, key in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
    ):
        factor = CHARTED[key].chart_factor
        values = [factor * row[key] for row in finished if key in row]
        low, span = min(values), max(values) - min(values) or 1.0
        scale = matplotlib.colormaps["cividis"]
        for (y, x), row in cells.items():
            if key not in row:
                continue
            sure = is_finished(row)
            value = factor * row[key]
            face = scale(min(1.0, max(0.0, (value - low) / span))) if sure else "#f3f4f6"
            axes.add_patch(
                Rectangle(
                    (x - 0.47, y - 0.45),
                    0.94,
                    0.9,
                    color=face,
                    gid=f"trial{row['number']}.map-{key}",
                )
            )
            dark = sure and (value - low) / span < 0.55
            axes.text(
                x,
                y,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="white" if dark else INK if sure else FAINT,
                fontsize=9,
            )
        axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(len(ys) - 0.5, -0.5), title=CHARTED[key].chart)
        axes.title.set_size(10)
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
        axes.set_yticks(range(len(ys)), [str(y) for y in ys])
        axes.set_xlabel(name_of(across) if across else "")
        axes.set_ylabel(name_of(style.color_key) if key == measures[0] else "")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _counts_more(row: Row, other: Row) -> bool:
    """Whether ``row`` rather than ``other`` represents their cell of the map."""
    return (is_finished(row), row["images"], -row["nll"]) > (
        is_finished(other),
        other["images"],
        -other["nll"],
    )


def learning_curves(
    style: ChartStyle, rows: Sequence[Row], curves: Mapping[int, Sequence[Row]]
) -> Figure | None:
    """Plot code length on validation images against images seen."""
    drawn = [row for row in rows if curves.get(row["number"])]
    if not drawn:
        return None
    figure = Figure(figsize=(8.6, 4.2))
    axes = figure.subplots()
    for row in reversed(drawn):
        curve, finished = curves[row["number"]], is_finished(row)
        axes.plot(
            [entry["images"] for entry in curve],
            [entry["nll"] for entry in curve],
            color=style.color(row),
            linewidth=1.8 if finished else 1.1,
            alpha=1 if finished else 0.8,
            gid=f"trial{row['number']}.curve",
        )
        axes.plot(
            curve[-1]["images"],
            curve[-1]["nll"],
            style.marker(row),
            color=style.color(row),
            markersize=5,
            markerfacecolor=style.color(row) if finished else "white",
            gid=f"trial{row['number']}.end",
        )
    lengths = sorted(entry["nll"] for row in drawn for entry in curves[row["number"]])
    low, high = lengths[0], max(curves[row["number"]][-1]["nll"] for row in drawn)
    top = max(high, lengths[math.ceil(0.9 * (len(lengths) - 1))])
    axes.set_ylim(low - 0.05 * (top - low or 1), top + 0.08 * (top - low or 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: f"{images:,.0f}"))
    axes.set_xlabel("images seen")
    axes.set_ylabel("code length on validation images, nats")
    style.legend(axes)
    return figure


def side_by_side(config: TuneConfig, rows: Sequence[Row], style: ChartStyle) -> bytes:
    """Draw reconstructions of the same images by several models, and their samples, as PNG."""
    data = DataSet.open(config.dataset.url, config.storage.endpoint_url)
    batch = next(iter(EvalLoader(data, split="valid", batch_size=IMAGES, num_images=IMAGES)))
    originals = binarize(batch, config.dataset.binarization, config.train.seed)
    drawn = {}
    for row in rows:
        generator = torch.Generator().manual_seed(config.train.seed)
        model = open_model(
            config.storage.run_folder(row["run"]), config.registry, config.storage
        ).network
        told = f"rate {row['rate_bits']:.1f} bits, NLL {row['nll']:.2f} nats"
        decoded = pictures.decodings(model, originals, generator)
        drawn[style.words(row), told] = (
            pictures.mean_of(decoded),
            decoded[0],
            vlae.sample(model, IMAGES, generator),
        )
    return pictures.side_by_side(originals, drawn)
