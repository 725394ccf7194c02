"""The constraints of the search that a version comes from, held against the version's figures."""

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.config.goals import QUANTITIES, Constraint, Measurements
from pipeline.errors import UserError
from pipeline.registry.summaries import Version
from pipeline.registry.versions import Registry


def of_search(registry: Registry, version: Version) -> list[Constraint]:
    """What the search that a version is a trial of asks of its models.

    Empty for a version of no search. Raises UserError if the registry's record is damaged.
    """
    if "search" not in version.tags:
        return []
    with registry.user_errors():
        record = registry.client.get_run(version.tags["search"])
    text = record.data.params.get("search.constraints", "[]")
    try:
        return [Constraint.parse(each) for each in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise UserError(
            f"the constraints of search {record.info.run_name} in the registry are damaged:"
            f" {text[:200]!r} is no list of bounds"
        ) from None


def broken(version: Version, constraints: list[Constraint]) -> list[str]:
    """What a version's validation figures break, as ``rate_bits is 5.4, not rate_bits >= 8``.

    A quantity that the registry has no figures of breaks nothing.
    """
    valid = _nested(
        {
            name.removeprefix("valid/"): value
            for name, value in version.metrics.items()
            if name.startswith("valid/")
        }
    )
    found = Measurements(valid, int(valid.get("iwae_samples", 1)), [])
    sentences = []
    for constraint in constraints:
        quantity, values = QUANTITIES[constraint.name], dict[str, Any]()
        with suppress(KeyError, ValueError):  # not evaluated
            values |= quantity.measure(found)
        if constraint.name in values and constraint.violation(values) > 0:
            shown = format(values[constraint.name], quantity.format)
            sentences.append(f"{constraint.name} is {shown}, not {constraint}")
    return sentences


def _nested(values: Mapping[str, float]) -> dict[str, Any]:
    """Metrics by their paths as the nested values of the evaluation that they come from."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return nested
