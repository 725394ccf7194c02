"""Declaring options: dataclass fields with a sentence for ``--help``."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import field
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf

from pipeline.errors import UserError


def option(help: str, default: Any = MISSING) -> Any:
    """A dataclass field with its sentence for ``--help``."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


Config = TypeVar("Config")


def section(cls: type, help: str) -> Any:
    """A nested group of options."""
    return field(default_factory=cls, metadata={"help": help})


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def describe(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option below a schema as (dotted key, field), sections left out."""
    for item in dataclasses.fields(schema):
        nested = item.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from describe(nested, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def check_all(config: Any) -> None:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_all(value)
    if hasattr(config, "check"):
        config.check()


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, ready for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)  # type: ignore[return-value]


def digest(value: Any) -> str:
    """Eight hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
