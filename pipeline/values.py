"""Values that cross the borders of packages: measured figures, and JSON."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, as ``Storage.read_json`` gives and ``Storage.write_json`` takes it."""

UNITS = ("nats", "bits", "px")
"""The units that end the key of a figure in JSON: ``elbo_nats``."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_name(value: object) -> bool:
    """Whether this can name a data set, a split, a run, a search or a registered model.

    Names become parts of paths and addresses: letters, digits, dots, underscores and hyphens.
    """
    return isinstance(value, str) and NAME.fullmatch(value) is not None


@dataclass(frozen=True)
class Measured:
    """A figure that was measured on images, with its standard error."""

    value: float
    error: float | None = None
    """The standard error over images; none for a single image."""
    unit: str = ""
    """Empty for a share, and where a table's heading states it."""
    count: int | None = None
    """The number of images that were measured, if known."""

    @classmethod
    def from_json(cls, figures: Mapping[str, Any], key: str) -> "Measured":
        """The figure that ``to_json`` wrote under ``key``."""
        ending, count = key.rpartition("_")[2], figures.get("num_images")
        return cls(
            figures[key],
            figures.get(f"{key}_se"),
            ending if ending in UNITS else "",
            None if count is None else int(count),
        )

    def to_json(self, key: str) -> dict[str, float | None]:
        """The value under ``key``, and the standard error under ``key_se``."""
        return {key: self.value, f"{key}_se": self.error}

    def __neg__(self) -> "Measured":
        return Measured(-self.value, self.error, self.unit, self.count)

    @property
    def bits(self) -> float:
        """The value in bits, if the unit is nats."""
        return self.value / math.log(2)

    @property
    def percent(self) -> "Measured":
        """A share in per cent."""
        error = None if self.error is None else 100 * self.error
        return Measured(100 * self.value, error, "%", self.count)

    def text(self, digits: int = 2) -> str:
        """The figure without its unit: ``85.36 +- 0.66``, or ``85.36`` if it has no error."""
        error = "" if self.error is None else f" +- {self.error:.{digits}f}"
        return f"{self.value:.{digits}f}{error}"

    def __str__(self) -> str:
        """The figure with its unit: ``85.36 +- 0.66 nats``."""
        return f"{self.text()} {self.unit}".rstrip()
