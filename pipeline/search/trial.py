"""A trial of a search, and its record in storage."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeAlias

from pipeline.values import JsonObject

Point: TypeAlias = dict[str, Any]
"""The values of the searched options in one trial, by dotted key."""


class Status(Enum):
    """The state of a trial; the values are stored in its record and shown in tables."""

    running = "unfinished"
    finished = "finished"
    stopped = "stopped early"
    failed = "failed"


@dataclass
class Trial:
    """A trial: one point of the space, its training run and its results so far."""

    number: int
    """Counts from 1."""
    point: Point
    run: str
    """The name of its training run."""
    status: Status = Status.running
    images: int = 0
    """Images seen at its last validation."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Its validations: ``images``, ``seconds`` and the quantities of ``goals.ON_THE_WAY``."""
    seconds: float = 0.0
    """How long it has run, over all attempts."""
    failures: int = 0
    """How often its process was lost and restarted."""
    search_seconds: float = 0.0
    """How long the search had run when this record was written."""
    values: Mapping[str, Any] | None = None
    """The measurements of a finished trial, see ``goals.QUANTITIES``."""
    error: str | None = None
    """Why a failed trial failed."""

    @classmethod
    def from_json(cls, record: JsonObject) -> Self:
        """Read a trial from its record."""
        return cls(**{**record, "status": Status(record["status"])})

    def to_json(self) -> JsonObject:
        """Its record, without the fields that are None."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return {**known, "status": self.status.value}
