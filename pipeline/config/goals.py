"""What a search is after: objectives and constraints, and which of two trials is the better one."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pipeline.errors import UserError

QUANTITIES = {
    "nll": "upper bound on the negative log-likelihood, nats per image",
    "rate_bits": "rate, bits per image",
    "distortion_nats": "distortion, nats per image",
    "probe_accuracy": "accuracy of a linear probe of the codes, 0 to 1",
    "images_per_s": "training speed, images per second",
}
"""What is measured of every trial that runs to its end, and can be an objective or be constrained.
"""

ON_THE_WAY = ("nll", "rate_bits", "distortion_nats")
"""What validations tell while a trial runs; there ``nll`` is the code length."""

Values = Mapping[str, Any]
Trial = TypeVar("Trial", bound=Values)
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
AT_LEAST = re.compile(rf"(?:({NUMBER})\s*<=\s*)?(\w+)(?:\s*<=\s*({NUMBER}))?")
AT_MOST = re.compile(rf"(?:({NUMBER})\s*>=\s*)?(\w+)(?:\s*>=\s*({NUMBER}))?")


@dataclass(frozen=True)
class Objective:
    """A quantity that is to be as small, or as large, as possible."""

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
    """Bounds that a quantity has to keep."""

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
                f"search.constraints: nothing keeps {text!r}, whose lower bound is above the"
                " upper one"
            )
        return cls(name, low, high)

    def violation(self, values: Values) -> float:
        """How far a value lies outside, relative to the bound that it breaks; at most 0 inside."""
        value = values[self.name]
        return max(
            (self.low - value) / max(1.0, abs(self.low)) if math.isfinite(self.low) else -math.inf,
            (value - self.high) / max(1.0, abs(self.high))
            if math.isfinite(self.high)
            else -math.inf,
        )


@dataclass(frozen=True)
class Goals:
    """Objectives and constraints. Quantities that a trial does not have, or not yet, are left out
    of every comparison.
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
        """0 where all constraints are kept; else by how much they are broken, together."""
        return sum(
            max(0.0, each.violation(values))
            for each in self.constraints
            if values.get(each.name) is not None
        )

    def beats(self, one: Values, other: Values) -> bool:
        """Whether ``one`` is better: it breaks the constraints less, or it is better in an
        objective and worse in none.

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
        """Trials that have all objectives, in fronts: nobody beats those of the first, only these
        those of the second, and so on.

        Within a front the best compromise is first: the smallest distance to the point that has
        every objective's best value, each scaled to its range over all ``trials``.
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
