"""The chart of rate against distortion shows which trials break which constraint."""

import math
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.path import Path as Outline

from pipeline.config.goals import Constraint
from pipeline.evaluation.style import STYLE
from pipeline.search import trials
from pipeline.search.chart_style import ChartStyle, svg
from pipeline.search.trade_off import TRADE_OFF, front
from tests.pipeline.search.test_report import made, searched

SVG = "{http://www.w3.org/2000/svg}"


class Chart:
    """The chart of the trials of ``made`` as a reader of its SVG sees it.

    ``tighter``: by how many nats the measured bound is below the code length.
    """

    def __init__(self, constraints: list[str], samples: int = 1, tighter: float = 0) -> None:
        config = searched("unused", constraints=constraints, samples=samples)
        config.search.space["model"]["window"].append("<5x2>")
        found = made()
        for trial in found:
            if trial.values:
                trial.values = {**trial.values, "nll": trial.values["nll"] - tighter}
        self.rows = {row["number"]: row for row in trials.table(config, found)}
        finished = [row for row in self.rows.values() if trials.is_finished(row)]
        self.finished = [row["number"] for row in finished]
        with matplotlib.rc_context(STYLE):
            along = TRADE_OFF.ranked(finished)[0]
            figure = front(ChartStyle(config), list(self.rows.values()), along, config.search)
            assert figure
            root = xml.etree.ElementTree.fromstring(svg(figure, "front"))
        self.parts = {each.attrib["id"]: each for each in root.iter() if "id" in each.attrib}
        self.texts = ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]

    def place(self, number: int) -> tuple[float, float]:
        """Where the mark of a trial is."""
        mark = next(self.parts[f"trial{number}.front"].iter(f"{SVG}use"))
        return float(mark.attrib["x"]), float(mark.attrib["y"])

    def bands(self, constraint: int) -> list[Outline]:
        """The areas hatched for a constraint."""
        return [
            Outline([tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)])
            for name, part in self.parts.items()
            if name.startswith(f"outside{constraint}.")
            for path in (each.attrib["d"] for each in part.iter(f"{SVG}path"))
        ]

    def hatched(self, constraint: int) -> set[int]:
        """The finished trials whose marks are inside what is hatched for a constraint."""
        return {
            number
            for number in self.finished
            if any(band.contains_point(self.place(number)) for band in self.bands(constraint))
        }

    def letters(self) -> dict[int, str]:
        """The letters beside the marks."""
        parts = {number: self.parts.get(f"trial{number}.breaks") for number in self.rows}
        return {
            number: "".join(part.itertext()).strip()
            for number, part in parts.items()
            if part is not None
        }


@pytest.mark.parametrize(
    "constraints",
    [
        ["rate_bits <= 31"],
        ["13 <= rate_bits <= 31", "69 <= distortion_nats <= 81"],
        ["nll <= 90"],
        ["nll >= 91", "distortion_nats <= 81"],
        ["89 <= nll <= 90.83", "rate_bits >= 20", "nll >= 50"],
        ["nll <= 10"],
        ["rate_bits <= 1000", "nll >= -5"],
    ],
)
def test_a_trial_lies_in_the_hatched_area_of_each_constraint_that_it_breaks(
    constraints: list[str],
) -> None:
    chart = Chart(constraints)
    for place, constraint in enumerate(map(Constraint.parse, constraints)):
        broken = {each for each in chart.finished if constraint.violation(chart.rows[each]) > 0}
        assert chart.hatched(place) == broken
        legend = any(text == f"outside {constraint}" for text in chart.texts)
        assert legend == bool(chart.bands(place)), "the legend tells what is drawn, and only that"
    assert chart.letters() == {}


def test_the_border_of_a_likelihood_is_a_line_of_equal_code_length() -> None:
    """At 90 nats: the hatched area begins at distortion = 90 - rate ln 2."""
    chart = Chart(["nll <= 90"])
    (x1, y1), (x2, y2) = chart.place(1), chart.place(3)
    one, other = chart.rows[1], chart.rows[3]
    per_bit = (x2 - x1) / (other["rate_bits"] - one["rate_bits"])
    per_nat = (y2 - y1) / (other["distortion_nats"] - one["distortion_nats"])
    [band] = chart.bands(0)
    lengths = []
    for x, y in np.asarray(band.vertices):
        rate = one["rate_bits"] + (x - x1) / per_bit
        lengths.append(one["distortion_nats"] + (y - y1) / per_nat + rate * math.log(2))
    border = [length for length in lengths if length < 90 + 1e-3]
    assert len(border) >= 2
    assert border == pytest.approx([90] * len(border), abs=1e-3)


def test_letters_tell_what_the_axes_do_not_show() -> None:
    chart = Chart(
        ["rate_bits <= 31", "probe_accuracy >= 0.75", "images_per_s >= 1", "probe_accuracy <= 0.9"]
    )
    assert chart.letters() == {4: "a", 2: "b"}
    assert "breaks probe_accuracy >= 0.75" in chart.texts
    assert "breaks probe_accuracy <= 0.9" in chart.texts
    assert not any("images_per_s" in text for text in chart.texts), "which every trial keeps"
    both = Chart(["probe_accuracy >= 0.75", "images_per_s >= 500"])
    assert both.letters() == {1: "b", 2: "b", 3: "b", 4: "ab"}


def test_a_bound_of_several_samples_is_drawn_as_code_length_and_lettered_as_measured() -> None:
    """A trial beyond the code length of the bound may keep it: its own NLL is lower."""
    chart = Chart(["nll <= 90"], samples=8, tighter=0.85)
    assert chart.hatched(0) == {1, 2, 4}
    assert chart.letters() == {2: "a", 4: "a"}
    assert {"code length outside nll <= 90", "breaks nll <= 90"} <= set(chart.texts)
