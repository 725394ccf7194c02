"""Values that cross the borders of packages: JSON."""

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, as ``Storage.read_json`` gives and ``Storage.write_json`` takes it."""
