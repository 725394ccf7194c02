"""What a search optimizes: quantities, objectives, constraints, and the order of trials."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pipeline.errors import UserError

Values = Mapping[str, Any]
Trial = TypeVar("Trial", bound=Values)


@dataclass(frozen=True)
class Measurements:
    """What a quantity is computed from, once a trial's training run is complete."""

    valid: Values
    """The evaluation of its final model on validation images."""
    samples: int
    """The k of the bound: 1 is the code length."""
    speeds: Sequence[float]
    """Images per second, at every report of its training."""


@dataclass(frozen=True)
class Quantity:
    """A quantity that can be an objective or be constrained."""

    meaning: str
    """What it is, with its unit."""
    measure: Callable[[Measurements], Values]
    """Gives its value by its name, and the figures that are recorded beside it. Empty where it
    cannot be measured.
    """
    title: str
    """The head of its column in the report."""
    format: str
    """How its values are printed, as a format specification."""
    shows_error: bool = False
    """Whether the report has a column of its standard error, ``NAME_se``."""
    chart: str | None = None
    """Its title in charts; a quantity without one is not drawn."""
    chart_place: int = 0
    """Its place among the panels of a chart, from the left."""
    chart_factor: float = 1
    """What charts multiply its values by."""
    during_training: bool = False
    """Whether validations report it while a trial runs."""


def _nll(found: Measurements) -> Values:
    bound = "iwae_nats" if found.samples > 1 else "elbo_nats"
    return {
        "nll": found.valid[bound],
        "nll_se": found.valid[f"{bound}_se"],
        "code_length_nats": found.valid["elbo_nats"],
    }


def _copied(*names: str) -> Callable[[Measurements], Values]:
    """Figures that stand in the evaluation under the same names."""
    return lambda found: {name: found.valid[name] for name in names}


def _probe_accuracy(found: Measurements) -> Values:
    if "probe" not in found.valid:
        return {}
    probe = found.valid["probe"]["linear"]
    return {"probe_accuracy": probe["accuracy"], "probe_accuracy_se": probe["accuracy_se"]}


def _resolution(found: Measurements) -> Values:
    """A code that keeps no structure counts as one that keeps what is as large as the images."""
    if "resolution_px" not in found.valid:
        return {}
    px = found.valid["resolution_px"]
    return {
        "resolution_px": found.valid["resolution"]["coarsest_px"] if px is None else px,
        "resolution_px_se": found.valid["resolution_px_se"],
    }


def _images_per_s(found: Measurements) -> Values:
    # `samples` stands here because records and tables keep this order of columns.
    return {"samples": found.samples, "images_per_s": statistics.median(found.speeds)}


QUANTITIES = {
    "nll": Quantity(
        "upper bound on the negative log-likelihood, nats per image",
        _nll,
        title="NLL, nats",
        format=".2f",
        shows_error=True,
        chart="NLL, nats per image",
        chart_place=1,
        during_training=True,
    ),
    "rate_bits": Quantity(
        "rate, bits per image",
        _copied("rate_bits", "rate_nats"),
        title="rate, bits",
        format=".1f",
        chart="rate, bits per image",
        chart_place=0,
        during_training=True,
    ),
    "distortion_nats": Quantity(
        "distortion, nats per image",
        _copied("distortion_nats", "distortion_nats_se", "num_images"),
        title="distortion, nats",
        format=".2f",
        during_training=True,
    ),
    "probe_accuracy": Quantity(
        "accuracy of a linear probe of the codes, 0 to 1",
        _probe_accuracy,
        title="probe",
        format=".1%",
        chart="probe accuracy, %",
        chart_place=2,
        chart_factor=100,
    ),
    "resolution_px": Quantity(
        "resolution, pixels: the code keeps structure that is coarser",
        _resolution,
        title="resolution, px",
        format=".2f",
        shows_error=True,
        chart="resolution, pixels",
        chart_place=3,
    ),
    "images_per_s": Quantity(
        "training speed, images per second",
        _images_per_s,
        title="images/s",
        format=",.0f",
    ),
}
"""What is measured of every trial that finishes. A new objective is a new row."""

ON_THE_WAY = tuple(name for name, each in QUANTITIES.items() if each.during_training)
"""The quantities that validations report while a trial runs; there ``nll`` is the code length."""

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
AT_LEAST = re.compile(rf"(?:({NUMBER})\s*<=\s*)?(\w+)(?:\s*<=\s*({NUMBER}))?")
AT_MOST = re.compile(rf"(?:({NUMBER})\s*>=\s*)?(\w+)(?:\s*>=\s*({NUMBER}))?")


@dataclass(frozen=True)
class Objective:
    """A quantity to minimize or to maximize."""

    name: str
    maximize: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "min nll" or "max probe_accuracy". Raises UserError."""
        direction, _, name = text.strip().partition(" ")
        if direction not in ("min", "max") or name.strip() not in QUANTITIES:
            raise UserError(
                f"search.objectives: {text!r} is not understood; write min or max and one of"
                f" {', '.join(QUANTITIES)}"
            )
        return cls(name.strip(), direction == "max")

    def loss(self, values: Values) -> float:
        """Lower is better."""
        return -values[self.name] if self.maximize else values[self.name]

    def __str__(self) -> str:
        return f"{'max' if self.maximize else 'min'} {self.name}"


@dataclass(frozen=True)
class Constraint:
    """Bounds that a quantity must satisfy."""

    name: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "20 <= rate_bits <= 60", "rate_bits >= 8" and the like. Raises UserError."""
        at_least, at_most = AT_LEAST.fullmatch(text.strip()), AT_MOST.fullmatch(text.strip())
        found = (
            at_least.groups()
            if at_least
            else at_most.groups()[::-1]
            if at_most
            else (None, "", None)
        )
        first, name, last = found
        if name not in QUANTITIES or (first is None and last is None):
            raise UserError(
                f"search.constraints: {text!r} is not understood; write bounds like '20 <="
                f" rate_bits <= 60' or 'rate_bits >= 8' of one of {', '.join(QUANTITIES)}"
            )
        low, high = (
            float(-math.inf if first is None else first),
            float(math.inf if last is None else last),
        )
        if low > high:
            raise UserError(
                f"search.constraints: {text!r} cannot be met: its lower bound is above its upper"
                " bound"
            )
        return cls(name, low, high)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        low, high = (str(bound).removesuffix(".0") for bound in (self.low, self.high))
        if self.low == -math.inf:
            return f"{self.name} <= {high}"
        if self.high == math.inf:
            return f"{self.name} >= {low}"
        return f"{low} <= {self.name} <= {high}"

    def violation(self, values: Values) -> float:
        """How far the value lies outside, relative to the violated bound; at most 0 inside."""
        value = values[self.name]
        return max(
            (self.low - value) / max(1.0, abs(self.low)) if math.isfinite(self.low) else -math.inf,
            (value - self.high) / max(1.0, abs(self.high))
            if math.isfinite(self.high)
            else -math.inf,
        )


@dataclass(frozen=True)
class Goals:
    """Objectives and constraints.

    Quantities that a trial does not have yet are left out of every comparison.
    """

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def parse(cls, objectives: Iterable[str], constraints: Iterable[str] = ()) -> Self:
        """From ``search.objectives`` and ``search.constraints``. Raises UserError."""
        parsed = tuple(map(Objective.parse, objectives))
        if not parsed:
            raise UserError("search.objectives is empty; give at least one, such as 'min nll'")
        names = [objective.name for objective in parsed]
        if len(set(names)) < len(names):
            raise UserError(
                f"search.objectives names {max(names, key=names.count)} twice; leave one out"
            )
        return cls(parsed, tuple(map(Constraint.parse, constraints)))

    @property
    def quantities(self) -> set[str]:
        """What trials are judged by."""
        return {each.name for each in self.objectives} | {each.name for each in self.constraints}

    def violation(self, values: Values) -> float:
        """The sum of all violations; 0 if every constraint is satisfied."""
        return sum(
            max(0.0, each.violation(values))
            for each in self.constraints
            if values.get(each.name) is not None
        )

    def broken(self, values: Values) -> list[Constraint]:
        """The constraints that are not satisfied."""
        return [
            each
            for each in self.constraints
            if values.get(each.name) is not None and each.violation(values) > 0
        ]

    def beats(self, one: Values, other: Values) -> bool:
        """Whether ``one`` dominates ``other``.

        It violates the constraints less, or as much and is better in one objective and worse in
        none.

        Constrained dominance (Deb et al., 2002); with one objective and no constraint, a smaller
        loss.
        """
        broken, other_broken = self.violation(one), self.violation(other)
        if broken != other_broken:
            return broken < other_broken
        shared = [
            each
            for each in self.objectives
            if one.get(each.name) is not None and other.get(each.name) is not None
        ]
        losses = [(each.loss(one), each.loss(other)) for each in shared]
        return all(a <= b for a, b in losses) and any(a < b for a, b in losses)

    def ranked(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """Sort the trials that have all objectives into Pareto fronts.

        No trial beats one of the first front; only trials of the first beat one of the second; and
        so on.

        Within a front, trials are ordered by their distance to the ideal point, which has the best
        value of every objective; each objective is scaled to its range over all ``trials``.
        """
        left = [
            values
            for values in trials
            if all(values.get(each.name) is not None for each in self.objectives)
        ]
        losses = [[each.loss(values) for values in left] for each in self.objectives]
        ideal = [(min(column), max(column) - min(column) or 1.0) for column in losses if column]

        def distance(values: Values) -> float:
            scaled = [
                (each.loss(values) - low) / span
                for each, (low, span) in zip(self.objectives, ideal, strict=True)
            ]
            return math.hypot(*scaled)

        fronts = []
        while left:
            front = [
                values for values in left if not any(self.beats(other, values) for other in left)
            ]
            fronts.append(sorted(front, key=distance))
            left = [values for values in left if not any(values is each for each in front)]
        return fronts
