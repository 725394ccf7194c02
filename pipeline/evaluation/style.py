"""The style that all figures share."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import matplotlib

INK, FAINT, RULE = "#1b1f24", "#6b7280", "#e3e6ea"
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, bytes]) -> Callable[Arguments, bytes]:
    """Let a function draw in ``STYLE``, whatever matplotlib's settings are outside of it."""

    @wraps(draw)
    def draw_in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> bytes:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style
