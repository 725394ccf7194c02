"""A search's report opens from disk in a real browser, tells and sorts its trials, and needs
nothing but itself.
"""

import asyncio
import io
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline import commands
from pipeline.config import compose, options, run, search
from pipeline.evaluation.style import STYLE
from pipeline.runs import Run
from pipeline.search import effects, report, study, trials
from pipeline.search.chart_style import ChartStyle
from pipeline.search.trial import Status, Trial
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.browser import CHROMIUM, Page
from tests.pipeline import strokes

VALUES = [  # window, latents, status, rate in bits, distortion in nats, accuracy of the probe
    ("0x0", 2, "finished", 30.0, 70.0, 0.9),
    ("0x0", 4, "finished", 33.0, 68.0, 0.95),
    ("3x1", 2, "finished", 12.0, 80.0, 0.8),
    ("3x1", 4, "finished", 14.0, 82.0, 0.7),
    ("<5x2>", 2, "stopped early", 9.0, 90.0, None),
    ("<5x2>", 4, "failed", None, None, None),
]


def made() -> list[Trial]:
    rows = []
    for number, (window, latents, status, rate, distortion, probe) in enumerate(VALUES, 1):
        row: dict[str, Any] = {
            "number": number,
            "point": {"model.window": window, "model.latents": latents},
            "run": f"run-{number}",
        }
        row |= {"status": status, "images": 0, "seconds": 9.5, "failures": 0, "curve": []}
        if rate is not None and distortion is not None:
            measured = {
                "nll": distortion + math.log(2) * rate,
                "rate_bits": rate,
                "distortion_nats": distortion,
            }
            row["curve"] = [
                {"images": images, **measured}
                for images in ((80, 160, 240) if status == "finished" else (80,))
            ]
            row["images"] = row["curve"][-1]["images"]
            if status == "finished":
                row["values"] = {
                    **measured,
                    "nll_se": 0.5,
                    "probe_accuracy": probe,
                    "images_per_s": 400.0,
                }
        if status == "failed":
            row["error"] = "OutOfMemoryError"
        rows.append(row)
    return [Trial.from_json(row) for row in rows]


def searched(root: str, **search_options: Any) -> search.TuneConfig:
    """A search for the least rate and distortion, whose rate is to be at most 31 bits."""
    plain = options.to_dict(
        commands.load("tune", [*strokes.TINY, f"storage.root={root}", "search.constraints=[]"])
    )
    plain["search"] |= {
        "space": {"model": {"window": ["0x0", "3x1"], "latents": [2, 4]}},
        "objectives": ["min rate_bits", "min distortion_nats"],
        "constraints": ["rate_bits <= 31"],
    } | search_options
    return compose.build(search.TuneConfig, plain, {"register_best": 4})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The report of a search whose models have just begun to learn."""
    return write(str(tmp_path_factory.mktemp("store")))


def write(root: str) -> Storage:
    shape = strokes.write(strokes.data_storage(root)).manifest.image_shape
    loaded = searched(root)
    # A window that the schema would refuse, so that what is odd in a value is seen not to become a
    # part of the page.
    loaded.search.space["model"]["window"].append("<5x2>")
    for row in made():
        if row.status is Status.finished:
            trial = compose.build(
                run.TrainConfig,
                options.to_dict(strokes.train_config(root)),
                {**row.point, "name": row.run},
            )
            Run.of(trial).publish(trial.build(shape), {})
    output = open_storage(f"{root}/searches/mine")
    report.write(loaded, output, trials.table(loaded, made()), made())
    return output


def test_everything_is_written(written: Storage) -> None:
    pictures = {*report.PICTURES} - {"importance.png"}  # which four finished trials do not tell
    assert {*pictures, report.PAGE, report.TABLE, study.STUDY} == set(written.list())
    for name in pictures:
        assert Image.open(io.BytesIO(written.read(name))).width > 500


def test_the_table_holds_every_trial_with_what_was_measured(written: Storage) -> None:
    table = pyarrow.parquet.read_table(io.BytesIO(written.read(report.TABLE))).to_pylist()
    assert {row["number"] for row in table} == {1, 2, 3, 4, 5, 6}
    found = next(row for row in table if row["number"] == 2)
    assert (found["model.window"], found["model.latents"], found["rate_bits"], found["front"]) == (
        "0x0",
        4,
        33.0,
        3,
    )
    assert next(row for row in table if row["number"] == 6)["error"] == "OutOfMemoryError"


def test_the_charts_are_drawings_whose_parts_have_ids_of_their_own(written: Storage) -> None:
    page = written.read(report.PAGE).decode()
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        xml.etree.ElementTree.fromstring(chart)
    ids = re.findall(r'\bid="(trial\d+\.[\w-]+|row\d+)"', page)
    assert len(ids) == len(set(ids))
    assert {f"trial{number}.front" for number in range(1, 6)} <= set(ids)
    assert {f"trial{number}.parallel" for number in range(1, 5)} <= set(ids)
    assert "<5x2>" not in page


def test_the_legend_leaves_room_for_the_last_heading(tmp_path: Path) -> None:
    loaded = searched(str(tmp_path))
    rows = [dict(row, resolution_px=5.0 + row["number"]) for row in trials.table(loaded, made())]
    with matplotlib.rc_context(STYLE):
        figure = effects.parallel(ChartStyle(loaded), rows, loaded.search.goals)
        assert figure is not None
        figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [each for each in axes.texts if each.get_text() == "resolution, px"]
    legend = axes.get_legend()
    assert texts
    assert legend is not None
    assert texts[0].get_window_extent().x1 < legend.get_window_extent().x0


def test_importances_are_estimated_from_ten_finished_trials_on(
    written: Storage, tmp_path: Path
) -> None:
    loaded = searched(str(tmp_path), space={"model": {"latents": list(range(1, 13))}})
    finished = [
        Trial(
            number,
            {"model.latents": number},
            "",
            Status.finished,
            values={"rate_bits": 3.0 * number},
        )
        for number in range(1, 11)
    ]
    assert effects.importance(loaded, finished[:9]) is None
    assert effects.importance(loaded, finished) is not None
    assert "Estimated once 10 trials have run to their end" in written.read(report.PAGE).decode()


def test_the_page_tells_which_trials_keep_the_constraints_and_why_few_are_registered(
    written: Storage,
) -> None:
    page = written.read(report.PAGE).decode()
    assert (
        "3 of 4 models are registered: 4 of 6 trials ran to their end, and 3 of these keep"
        " rate_bits &lt;= 31" in page
    )
    rows = dict(re.findall(r'<tr id="row(\d)">(.*?)</tr>', page, re.DOTALL))
    assert [">yes<" in rows[str(number)] for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert ">not rate_bits &lt;= 31<" in rows["2"]
    assert not any("yes" in rows[number] or ">not " in rows[number] for number in "56")
    front = page[page.index('id="front"') : page.index("</svg>")]
    assert "outside rate_bits &lt;= 31" in front
    assert "breaks a constraint" in front


@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no browser on this machine: apt-get install chromium"
)
def test_in_a_browser_it_shows_its_trials_under_the_mouse_and_sorts_them(
    written: Storage, tmp_path: Path
) -> None:
    async def visit() -> None:
        async with Page(tmp_path) as page:
            url = f"file://{written.url}/{report.PAGE}"
            await page.open(url)
            assert await page.evaluate("document.querySelectorAll('section').length") == 7
            assert await page.evaluate(
                "[...document.images].every(image => image.naturalWidth > 0)"
            )
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                "the page is wider than the window"
            )
            titles = "[...document.querySelectorAll('th')].map(head => head.textContent)"
            column = (await page.evaluate(titles)).index("rate, bits") + 1
            cells = (
                f"[...document.querySelectorAll('tbody td:nth-child({column})')].map(cell =>"
                " cell.textContent)"
            )
            rates = ["9.0", "12.0", "14.0", "30.0", "33.0"]
            assert await page.evaluate(cells) != [*rates, ""]
            await page.mouse("click", f"th:nth-child({column}) button")
            assert await page.evaluate(cells) == [*rates, ""]
            await page.mouse("click", f"th:nth-child({column}) button")
            assert await page.evaluate(cells) == [*rates[::-1], ""], "what has no value comes last"
            tip = "(tip => tip.hidden ? null : tip.textContent)(document.getElementById('tip'))"
            assert await page.evaluate(tip) is None
            await page.mouse("mouseMoved", "[id='trial3.front'] use")
            assert (await page.evaluate(tip)).startswith("window 3x1, latents 2\n")
            assert "rate, bits: 12.0" in await page.evaluate(tip)
            assert await page.evaluate("document.getElementById('row3').className") == "lit"
            await page.mouse("mouseMoved", "h1")
            assert await page.evaluate(tip) is None
            assert page.errors() == []
            assert page.requested() == [url], "it asks for more than itself"

    asyncio.run(visit())
