"""What the charts of a search's report share: colours, marks, words, and their files."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.config.goals import QUANTITIES
from pipeline.config.search import TuneConfig
from pipeline.search.trials import Row

CHARTED = {
    name: quantity
    for name, quantity in sorted(QUANTITIES.items(), key=lambda item: item[1].chart_place)
    if quantity.chart
}
"""The quantities that the map and the chart of importance show, in the order of their panels."""
MARKERS = "osD^vPX*"


class ChartStyle:
    """How charts show the searched options: by colour and marker, and along the map's x axis."""

    def __init__(self, config: TuneConfig) -> None:
        self.axes = config.search.axes
        varied = [key for key, values in self.axes.items() if len(values) > 1] or list(self.axes)
        self.color_key = "model.window" if "model.window" in varied else varied[0]
        others = [key for key in varied if key != self.color_key]
        self.across = (
            "model.latents" if "model.latents" in others else others[0] if others else None
        )
        values = self.axes[self.color_key]
        scale = matplotlib.colormaps["viridis"]
        self.colors = {
            value: to_hex(scale(0.88 * place / max(1, len(values) - 1)))
            for place, value in enumerate(values)
        }
        self.markers = {value: MARKERS[place % len(MARKERS)] for place, value in enumerate(values)}

    def color(self, row: Row) -> str:
        return self.colors[row[self.color_key]]

    def marker(self, row: Row) -> str:
        return self.markers[row[self.color_key]]

    def words(self, row: Row) -> str:
        """Format a trial's point: ``window 5x2, latents 16``."""
        return ", ".join(f"{name_of(key)} {row[key]}" for key in self.axes)

    def legend(self, axes: Axes, more: Sequence[Artist] = ()) -> None:
        """Draw the legend of colours and marks, on the right of the chart."""
        handles = [
            Line2D([], [], color=color, marker=self.markers[value], linestyle="", label=str(value))
            for value, color in self.colors.items()
        ]
        first = axes.legend(
            handles=handles,
            title=name_of(self.color_key),
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
        )
        if more:
            axes.add_artist(first)
            axes.legend(handles=more, loc="lower left", bbox_to_anchor=(1.01, 0))


def name_of(key: str) -> str:
    return key.partition(".")[2].replace("_", " ")


def svg(figure: Figure, name: str) -> str:
    """Render a chart as SVG for an HTML page; ids are unique across charts."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()
