"""The chart of what codes keep at each size of structure, as PNG."""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipeline.evaluation.page import DPI, HEADING, TEXT, TITLE
from pipeline.evaluation.resolution import THRESHOLD
from pipeline.evaluation.style import FAINT, INK, styled
from pipeline.values import JsonObject

COLORS = ("#3f6fa8", "#e88c46", "#5b9a68", "#9a6fb0", "#b8534d", "#6b7280")
"""The curves, in their order."""
WAVELENGTHS = (2, 2.5, 3, 4, 5, 7, 10, 14, 28, 64, 128)
"""The wavelengths in pixels that the axis names, as far as they have room."""


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
