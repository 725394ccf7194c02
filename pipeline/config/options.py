"""Declaring options: a dataclass field says what it means, its bounds, and what it decides."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf

from pipeline.errors import UserError
from pipeline.values import JsonObject, is_name

Config = TypeVar("Config")


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option takes; of a list, each of its numbers."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number lies within; NaN never does."""
        return (
            value == value
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """In words: ``at least 1``, ``in 0..1``, ``above 0, and finite``."""
        if self.at_least is not None and self.at_most is not None:
            return f"in {_number(self.at_least)}..{_number(self.at_most)}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        parts = [f"{word} {_number(bound)}" for word, bound in words.items() if bound is not None]
        if self.below is not None:
            parts.append("finite" if math.isinf(self.below) else f"below {_number(self.below)}")
        return ", and ".join(parts)


def _number(bound: float) -> str:
    exponent = math.log2(bound) if bound > 0 else 0.0
    return f"2^{exponent:.0f}" if exponent >= 16 and exponent.is_integer() else f"{bound:g}"


def option(
    help: str,
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    name: bool = False,
    identity: bool = True,
    shared: bool = False,
) -> Any:
    """A field of a section of options, with its sentence for ``--help`` and its bounds.

    path: a local folder or file, made absolute. name: a name as ``is_name`` defines it. identity:
    whether a run or a search with another value is another one; if not, it may change when the same
    one is resumed. shared: the trials of a search must have it in common, so that they can be
    compared.
    """
    bounds = Bounds(at_least, above, at_most, below)
    metadata = {
        "help": help,
        "bounds": None if bounds == Bounds() else bounds,
        "path": path,
        "name": name,
        "identity": identity,
        "shared": shared,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, help: str, *, identity: bool = False) -> Any:
    """A nested group of options; ``identity`` says whether any of them belongs to a run's."""
    return field(default_factory=cls, metadata={"help": help, "identity": identity})


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise UserError(sentence)


def require_name(key: str, value: object) -> None:
    """Raise UserError unless an option's value is a name as ``is_name`` defines it."""
    require(
        is_name(value),
        f"{key}={value} is no name; use up to 200 letters, digits, dots, underscores and hyphens,"
        " the first a letter or a digit",
    )


def describe(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option below a schema as (dotted key, field); sections are entered, not listed."""
    for item in dataclasses.fields(schema):
        nested = item.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from describe(nested, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


SECRETS = re.compile(
    r"^[\w+.-]+://[^/?#\s]*@|[?&](x-amz-\w+|signature|sig|token|access_token|password)=",
    re.IGNORECASE,
)
"""What addresses with a password or a signature look like."""
SECRET = (
    "{key} contains a password or a signature, which would end up in configurations, logs and the"
    " registry; leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
    " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)


def has_secret(value: object) -> bool:
    """Whether an option's value is an address with a password or a signature in it."""
    return isinstance(value, str) and "://" in value and bool(SECRETS.search(value))


def _is_huge(value: object) -> bool:
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def check_secrets(config: Any, prefix: str = "") -> None:
    """Raise UserError, which does not repeat it, if an option has a password or a signature."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            check_secrets(value, f"{key}.")
        for each in value if isinstance(value, list) else [value]:
            require(not has_secret(each), SECRET.format(key=key))


def check_all(config: Any, prefix: str = "") -> None:
    """Hold every option to its bounds and every name to its form, and call each section's
    ``check``. Raises UserError.
    """
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            check_all(value, f"{key}.")
            continue
        for each in value if isinstance(value, list) else [value]:
            require(not _is_huge(each), f"{key} is {value}; it must be a number of 64 bits")
        if bounds := item.metadata["bounds"]:
            if isinstance(value, list):
                held = all(type(each) is int and bounds.hold(each) for each in value)
                require(held, f"{key} is {value}; its numbers must be {bounds}")
            elif value is not None:
                require(bounds.hold(value), f"{key} is {value}; it must be {bounds}")
        elif item.metadata["name"] and value is not None:
            require_name(key, value)
    if hasattr(config, "check"):
        config.check()


def identity(schema: type, values: Mapping[str, Any]) -> JsonObject:
    """Of a configuration as plain values, the options that make it this run or search."""
    kept = {}
    for item in dataclasses.fields(schema):
        nested, value = item.default_factory, values[item.name]
        if not item.metadata["identity"]:
            continue
        is_section = isinstance(nested, type) and dataclasses.is_dataclass(nested)
        kept[item.name] = identity(nested, value) if is_section else value  # type: ignore[arg-type]
    return kept


def to_dict(config: Any) -> JsonObject:
    """A configuration as plain values, ready for JSON."""
    return OmegaConf.to_container(  # type: ignore[return-value]
        OmegaConf.structured(config), resolve=True, enum_to_str=True
    )


def digest(value: Any) -> str:
    """Eight hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
