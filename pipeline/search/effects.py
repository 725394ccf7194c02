"""What the searched options do: parallel coordinates, and the importance of each option."""

from collections.abc import Sequence

import matplotlib
import optuna
from matplotlib.figure import Figure

from pipeline.config.goals import QUANTITIES, Goals
from pipeline.config.search import TuneConfig
from pipeline.evaluation.style import FAINT, INK, RULE
from pipeline.search.chart_style import CHARTED, ChartStyle, name_of
from pipeline.search.proposals import known
from pipeline.search.trial import Status, Trial
from pipeline.search.trials import Row, is_finished

FEWEST_FOR_IMPORTANCE = 10
"""Finished trials that importances are estimated from; with fewer, every trial changes them."""


def parallel(style: ChartStyle, rows: Sequence[Row], goals: Goals) -> Figure | None:
    """Plot every finished trial as a line through its options and its results.

    The results are those that the search is judged by, and those of the map. Where one is
    constrained, the allowed part of its axis is wide. Trials that break a constraint are pale,
    those of the first front thick.
    """
    finished = [row for row in rows if is_finished(row)]
    results = [
        name
        for name in QUANTITIES
        if (name in goals.quantities or name in CHARTED)
        and all(row.get(name) is not None for row in finished)
    ]
    varied = [key for key, values in style.axes.items() if len(values) > 1]
    if len(finished) < 2 or not varied:
        return None
    figure = Figure(figsize=(max(11.0, 1.4 * (len(varied) + len(results))), 3.8))
    axes = figure.subplots()
    spans = {name: _span([row[name] for row in finished]) for name in results}

    def height(row: Row, name: str) -> float:
        if name in spans:
            return _place(row[name], spans[name])
        return _place(style.axes[name].index(row[name]), (0, len(style.axes[name]) - 1))

    for x, name in enumerate([*varied, *results]):
        axes.plot([x, x], [0, 1], color=FAINT, linewidth=1, zorder=1)
        if name in spans:
            low, high = spans[name]
            form = QUANTITIES[name].format
            ends = {_place(end, spans[name]): format(end, form) for end in (low, high)}
            head = QUANTITIES[name].title
            for constraint in goals.constraints:
                if constraint.name == name:
                    allowed = [
                        min(1.0, max(0.0, _place(bound, spans[name])))
                        for bound in (constraint.low, constraint.high)
                    ]
                    axes.plot([x, x], allowed, color=RULE, linewidth=9, zorder=0)
        else:
            values = style.axes[name]
            ends = {
                _place(place, (0, len(values) - 1)): str(value)
                for place, value in enumerate(values)
            }
            head = name_of(name)
        for y, text in ends.items():
            axes.annotate(
                text,
                (x, y),
                (-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                zorder=4,
            )
        axes.annotate(head, (x, 1), (0, 12), textcoords="offset points", ha="center", fontsize=10)
    for row in reversed(finished):
        axes.plot(
            range(len(varied) + len(results)),
            [height(row, name) for name in [*varied, *results]],
            color=style.color(row),
            linewidth=2.6 if row["front"] == 1 else 1.3,
            alpha=0.9 if row["feasible"] else 0.3,
            gid=f"trial{row['number']}.parallel",
            zorder=3 if row["feasible"] else 2,
        )
    axes.set(xlim=(-0.6, len(varied) + len(results) - 0.6), ylim=(-0.04, 1.1))
    axes.set_axis_off()
    style.legend(axes)
    return figure


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value."""
    return min(values), max(values)


def _place(value: float, span: tuple[float, float]) -> float:
    """Where a value lies on an axis from 0 to 1; in the middle if all values are one."""
    low, high = span
    return (value - low) / (high - low) if high > low else 0.5


def importance(config: TuneConfig, trials: Sequence[Trial]) -> Figure | None:
    """Plot each option's share in the variance of each quantity over the finished trials.

    By fANOVA (Hutter et al., 2014). None if too few trials finished.
    """
    finished = [trial for trial in trials if trial.status is Status.finished]
    shares = {}
    for key in CHARTED:
        measured = [trial.values[key] for trial in finished if trial.values and key in trial.values]
        if len(measured) >= FEWEST_FOR_IMPORTANCE and len(set(measured)) > 1:
            study = known(config.search, Goals.parse([f"min {key}"]), finished)
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            shares[key] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    if not shares:
        return None
    names = [key for key, values in config.search.axes.items() if len(values) > 1]
    figure = Figure(figsize=(8.6, 0.5 * len(names) + 1.5))
    axes = figure.subplots()
    scale = matplotlib.colormaps["cividis"]
    height = 0.8 / len(shares)
    for place, (key, values) in enumerate(shares.items()):
        color = scale(0.1 + 0.75 * place / max(1, len(shares) - 1))
        heights = [y - 0.4 + height * (place + 0.5) for y in range(len(names))]
        axes.barh(
            heights,
            [values.get(name, 0.0) for name in names],
            height * 0.9,
            color=color,
            label=str(CHARTED[key].chart).partition(",")[0],
        )
    axes.set_yticks(range(len(names)), [name_of(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"share of the variance over {len(finished)} finished trials (fANOVA)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
