"""A trial of a search, and its record in storage."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeAlias

from pipeline.values import JsonObject

Point: TypeAlias = dict[str, Any]
"""The options that a trial tries, by their dotted keys."""


class Status(Enum):
    """What became of a trial; the values stand in its record and in tables."""

    running = "unfinished"
    finished = "finished"
    stopped = "stopped early"
    failed = "failed"


@dataclass
class Trial:
    """What is known of a trial."""

    number: int
    """Counts from 1."""
    point: Point
    run: str
    """The name of its training run."""
    status: Status = Status.running
    images: int = 0
    """Images seen at its last validation."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Its validations so far: ``images``, ``seconds`` and what ``goals.ON_THE_WAY`` names."""
    seconds: float = 0.0
    """How long it has run."""
    failures: int = 0
    """How often it was lost and started again."""
    search_seconds: float = 0.0
    """How long the search had run when this was written."""
    values: Mapping[str, Any] | None = None
    """Of a finished trial, what was measured, by the names of ``goals.QUANTITIES``."""
    error: str | None = None
    """Of a failed trial, why."""

    @classmethod
    def from_json(cls, record: JsonObject) -> Self:
        """A trial from its record."""
        return cls(**{**record, "status": Status(record["status"])})

    def to_json(self) -> JsonObject:
        """Its record; what is not known is left out."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return {**known, "status": self.status.value}
