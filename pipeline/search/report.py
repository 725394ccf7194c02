"""The report of a search: charts of the trade-off between its trials, and a table.

``search.html`` is a single file without external resources. Its charts are the same figures as the
PNGs, as inline SVG; hovering over a point shows its trial.
"""

import base64
import hashlib
import html
import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import chain
from string import Template

import matplotlib
import pyarrow
import pyarrow.parquet
from matplotlib.figure import Figure

from pipeline.config.goals import QUANTITIES
from pipeline.config.search import TuneConfig
from pipeline.evaluation.style import STYLE
from pipeline.search.chart_style import ChartStyle, name_of, png, svg
from pipeline.search.charts import (
    MODELS,
    heat_map,
    learning_curves,
    side_by_side,
)
from pipeline.search.effects import FEWEST_FOR_IMPORTANCE, importance, parallel
from pipeline.search.study import STUDY, archive
from pipeline.search.trade_off import TRADE_OFF, front
from pipeline.search.trial import Trial
from pipeline.search.trials import Row, is_finished, shortfall
from pipeline.storage.base import Storage

PAGE, TABLE = "search.html", "trials.parquet"
PICTURES = (
    "front.png",
    "map.png",
    "parallel.png",
    "curves.png",
    "importance.png",
    "models.png",
)
"""The files that are written; a picture without data is left out."""

TITLES = {
    "front": "Rate against distortion",
    "map": "What window and code size do",
    "parallel": "From options to results",
    "curves": "Learning curves",
    "importance": "What matters for what",
    "models": "Models side by side",
}
COLUMNS = {
    "number": "trial",
    "status": "status",
    "front": "front",
    "kept": "keeps the constraints",
    "images": "images",
    **{
        column: title
        for name, quantity in QUANTITIES.items()
        for column, title in ((name, quantity.title), (f"{name}_se", "+-"))
        if column == name or quantity.shows_error
    },
    "seconds": "seconds",
}
"""The columns of the page's table, each with its head."""

FORMATS = {
    "images": ",.0f",
    **{
        column: quantity.format
        for name, quantity in QUANTITIES.items()
        for column in (name, f"{name}_se")
        if column == name or quantity.shows_error
    },
    "seconds": ",.0f",
}
"""How the numbers of a column are printed, as format specifications."""


def write(config: TuneConfig, output: Storage, rows: Sequence[Row], trials: Sequence[Trial]) -> str:
    """Write the report of a search into its folder, and return the URL of the page.

    ``rows``: the table of the trials, from ``trials.table``; ``trials``: the trials themselves.
    """
    columns = {key: None for row in rows for key in row}
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    output.write(TABLE, file.getvalue())
    output.write(STUDY, archive(config, trials))

    style = ChartStyle(config)
    finished = [row for row in rows if is_finished(row)]
    fronts = TRADE_OFF.ranked(finished)
    drawings: dict[str, Figure | None] = {}
    with matplotlib.rc_context(STYLE):
        drawings["front"] = front(style, rows, fronts[0] if fronts else [], config.search)
        drawings["map"] = heat_map(style, rows)
        drawings["parallel"] = parallel(style, rows, config.search.goals)
        drawings["curves"] = learning_curves(
            style, rows, {trial.number: trial.curve for trial in trials}
        )
        drawings["importance"] = importance(config, trials)
        charts = {name: svg(figure, name) for name, figure in drawings.items() if figure}
        for name, figure in drawings.items():
            if figure:
                output.write(f"{name}.png", png(figure))
    if fronts:
        # The first front, and if it has too few models, those of the next fronts
        shown = list(chain(*fronts))[:MODELS]
        sheet = side_by_side(config, sorted(shown, key=lambda row: row["rate_bits"]), style)
        output.write("models.png", sheet)
        charts["models"] = (
            f'<img alt="{TITLES["models"]}"'
            f' src="data:image/png;base64,{b64encode(sheet).decode()}">'
        )
    output.write(PAGE, page(config, output.url.rpartition("/")[2], rows, charts, style).encode())
    return f"{output.url}/{PAGE}"


def page(
    config: TuneConfig, name: str, rows: Sequence[Row], charts: Mapping[str, str], style: ChartStyle
) -> str:
    """Fill in the template of the HTML page."""
    search = config.search
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in dict.fromkeys(row["status"] for row in rows)
    }
    bound = f"-IWAE with k = {search.samples}" if search.samples > 1 else "the code length, -ELBO"
    facts = {
        "Data set": config.dataset.name,
        "Trials": ", ".join(f"{count} {status}" for status, count in counts.items()),
        "Objectives": ", ".join(search.objectives),
        **({"Constraints": ", ".join(search.constraints)} if search.constraints else {}),
        "Budget of a trial": f"{config.train.images:,} images",
        "NLL": f"{bound}, an upper bound, on {search.num_images:,} validation images",
        **({"Registered": reason} if (reason := shortfall(config, rows)) else {}),
    }
    if search.constraints:
        rows = [
            {**row, "kept": ", ".join(f"not {each}" for each in search.goals.broken(row)) or "yes"}
            if is_finished(row)
            else row
            for row in rows
        ]
    columns = {**{key: name_of(key) for key in style.axes}, **COLUMNS}
    columns = {
        key: title
        for key, title in columns.items()
        if any(row.get(key) is not None for row in rows)
    }
    order = ["number", *(key for key in columns if key != "number")]
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(columns[key])}</button></th>'
        for key in order
    )
    body = "".join(
        f'<tr id="row{row["number"]}">{"".join(_cell(style, row, key) for key in order)}</tr>\n'
        for row in rows
    )
    sections = "".join(
        f'<section id="{name}"><h2>{title}</h2><p>{html.escape(CAPTIONS[name])}</p><div'
        f' class="chart">{charts[name]}</div></section>\n'
        if name in charts
        else f'<section id="{name}"><h2>{title}</h2><p>{MISSING[name]}</p></section>\n'
        for name, title in TITLES.items()
        if name in charts or name in MISSING
    )
    told = {
        row["number"]: [
            style.words(row),
            *(
                f"{columns[key]}: {_shown(row, key)}"
                for key in COLUMNS
                if key in columns and _shown(row, key)
            ),
        ]
        for row in rows
    }
    page = (files("pipeline.search") / "report.html").read_text()
    return Template(page).substitute(
        policy=_policy(page),
        title=html.escape(f"Search {name}"),
        facts="".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
            for key, value in facts.items()
        ),
        sections=sections,
        head=head,
        body=body,
        trials=json.dumps(told).replace("<", "\\u003c"),
    )


def _policy(page: str) -> str:
    """The content security policy: the page runs its own script alone, and loads nothing."""
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:;"
        f" style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


MISSING = {
    "importance": (
        f"Estimated once {FEWEST_FOR_IMPORTANCE} trials have run to their end: from fewer, it"
        " changes with every trial."
    ),
}
"""What a section says if there is no chart."""

CAPTIONS = {
    "front": (
        "Filled: trials that ran to their end. Hollow: stopped early, at their last validation,"
        " which may lie outside. Pale: breaks a constraint; a letter says which, unless the place"
        " does."
    ),
    "parallel": (
        "Each line is a trial that ran to its end. Thick: the first front. Pale: breaks a"
        " constraint. Where a result is constrained, the allowed part of its axis is wide."
    ),
    "map": (
        "In each cell, of the trials that finished there, the one of the least NLL. Pale: none"
        " finished; the last validation."
    ),
    "curves": "A hollow end is a trial that was stopped early.",
    "importance": "How much of the differences between finished trials each option explains.",
    "models": (
        "The front's models, and if these are few those behind it: decodings of the same validation"
        " images, whose mean shows what the code keeps, and images that each draws by itself."
    ),
}


def _shown(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else format(value, FORMATS[key]) if key in FORMATS else str(value)


def _cell(style: ChartStyle, row: Row, key: str) -> str:
    """A cell of the table; ``data-value`` is its sort key."""
    value = style.axes[key].index(row[key]) if key in style.axes else row.get(key)
    sorted_by = "" if value is None else f' data-value="{html.escape(str(value))}"'
    dot = f'<i style="background:{style.color(row)}"></i>' if key == style.color_key else ""
    return f"<td{sorted_by}>{dot}{html.escape(_shown(row, key))}</td>"
