"""The configuration: every option of every command, declared once, with its type, default and
meaning.

YAML files in ``configs/`` only choose values. ``load`` composes them with Hydra, applies the
command line's ``key=value`` overrides, and checks everything that can be checked without touching
data, so that a mistake ends before any compute.
"""

import difflib
import functools
import importlib.resources
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import hydra
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.options import Config, check_all, check_secrets, describe, to_dict
from pipeline.errors import UserError

Follow: TypeAlias = Callable[[Any, Mapping[str, str | None]], list[str]]
REFUSALS = (OmegaConfBaseException, TypeError, ValueError, AttributeError, RuntimeError)
"""What is raised for values that a configuration does not take."""
SQLITE = "sqlite:///"
"""What the address of a SQLite file begins with; its path follows, relative or absolute."""


@functools.cache
def compose(command: str, *chosen: str) -> tuple[DictConfig, Mapping[str, str | None]]:
    """The values that ``configs/`` gives a command, and which choice of each config group they come
    from.

    ``chosen`` are choices other than the command's own, such as "model=tiny". Hydra takes 0.1 s for
    it, so it is asked once in a process. Raises HydraException.
    """
    with initialize_config_module("configs", version_base=None):
        composed = hydra.compose(command, list(chosen), return_hydra_config=True)
    names = {
        group: choice
        for group, choice in composed.hydra.runtime.choices.items()
        if not group.startswith("hydra/")
    }
    with open_dict(composed):
        del composed["hydra"]
    return composed, MappingProxyType(names)


def choices(command: str) -> Mapping[str, str | None]:
    """The config groups that a command composes, each with its default choice: {"dataset": "mnist",
    ...}.
    """
    return compose(command)[1]


def options_of(group: str) -> list[str]:
    """The choices that ``configs/`` holds for a group."""
    files = importlib.resources.files("configs") / group
    return sorted(
        file.name.removesuffix(".yaml") for file in files.iterdir() if file.name.endswith(".yaml")
    )


def meaning(group: str, name: str) -> str:
    """What a choice of a config group is for: the first sentence of its file's comment."""
    text = (importlib.resources.files("configs") / group / f"{name}.yaml").read_text()
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line[1:].strip() for line in comment if "@package" not in line)
    return re.split(r"(?<=[.)])\s+(?=[A-Z])", words)[0].rstrip(".")


def load(
    command: str, schema: type[Config], overrides: list[str], follow: Follow | None = None
) -> Config:
    """The configuration of a command, of type ``schema``, from its YAML and ``key=value``
    overrides.

    A key that names a config group chooses a file of it (``model=fast``); any other sets a value
    (``model.window=7x4``). ``follow`` gets the options that result, before they are checked, and
    the choices of groups, and gives overrides for those that are left to the data. Raises
    UserError, in one sentence, on everything that is wrong with it.
    """
    groups = choices(command)
    chosen, values = _parse(groups, overrides)
    composed, names = _composed(command, chosen)
    if follow:
        more_chosen, more_values = _parse(groups, follow(_typed(schema, composed, values), names))
        composed, _ = _composed(command, chosen | more_chosen)
        values |= more_values
    return build(schema, composed, values)


def _composed(
    command: str, chosen: Mapping[str, str]
) -> tuple[DictConfig, Mapping[str, str | None]]:
    """``compose`` for the user's choices of config groups. Raises UserError."""
    try:
        return compose(command, *chosen.values())
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None


def _parse(
    groups: Mapping[str, str | None], overrides: Iterable[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The choices of config groups, as they were written, and the values in ``key=value`` words.

    Raises UserError.
    """
    chosen, values = dict[str, str](), dict[str, Any]()
    for text in overrides:
        try:
            key, equals, value = text.partition("=")
            quoted = (
                f"{key}='{value}'"
                if equals and re.search(r"\{[^{}:]*\}.", value) and "'" not in value
                else text
            )  # a pattern
            override = OverridesParser.create().parse_override(quoted)
        except HydraException:
            raise UserError(
                f"{text!r} is not understood; write key=value, and quote a value of odd characters"
            ) from None
        key = override.key_or_group
        if (
            override.type is not OverrideType.CHANGE
            or override.package
            or override.is_sweep_override()
        ):
            raise UserError(
                f"{text!r} is not understood; write plain key=value (to try many values, use vlae"
                " tune)"
            )
        if key in groups:
            if override.value() is None and groups[key] is None:
                continue
            if override.value() not in options_of(key):
                raise UserError(
                    f"{text!r}: there is no such {key}; choose one of {', '.join(options_of(key))}"
                )
            chosen[key] = text
        else:
            values[key] = override.value()
    return chosen, values


def build(schema: type[Config], base: Any, values: Mapping[str, Any]) -> Config:
    """A checked configuration from nested values and dotted ``values`` on top of them.

    Used for the command line, and for the samples of a search. Raises UserError as ``load`` does.
    """
    built = _typed(schema, base, values)
    try:
        check_all(built)
        to_dict(built)  # so that what is left to resolve is resolved now or never
    except REFUSALS as error:
        raise _refusal(error, "the configuration") from None
    return built


def _typed(schema: type[Config], base: Any, values: Mapping[str, Any]) -> Config:
    """A configuration whose values have their types, and are not checked otherwise.

    Raises UserError.
    """
    known = dict(describe(schema))
    mappings = tuple(
        f"{key}." for key, item in known.items() if typing.get_origin(item.type) is dict
    )
    key = "the configuration"
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), base)
        for key, value in values.items():
            if key not in known and not key.startswith(mappings):
                raise UserError(unknown_option(key, known))
            OmegaConf.update(config, key, value, force_add=True)
        for key in known:
            parent, _, name = key.rpartition(".")
            if OmegaConf.is_missing(OmegaConf.select(config, parent) if parent else config, name):
                raise UserError(f"{key} is needed; give {key}=VALUE")
        for key in [key for key, item in known.items() if item.metadata["path"]]:
            # A folder means the same to every process, whatever its working directory.
            path = OmegaConf.select(config, key)
            if path:
                OmegaConf.update(config, key, absolute(path))
        built = typing.cast(Config, OmegaConf.to_object(config))
    except REFUSALS as error:
        raise _refusal(error, key) from None
    check_secrets(built)  # before anything uses an address, or an error repeats it
    return built


def _refusal(error: Exception, key: str) -> UserError:
    return UserError(f"{getattr(error, 'full_key', None) or key}: {reason_of(error)}")


def absolute(address: str) -> str:
    """The address with an absolute path, if it is a local folder or a SQLite file."""
    scheme, path = SQLITE if address.startswith(SQLITE) else "", address.removeprefix(SQLITE)
    return address if "://" in path else f"{scheme}{Path(path).expanduser().absolute()}"


def unknown_option(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{key} is not an option" + (f"; did you mean {near[0]}?" if near else "; see --help")


def reason_of(error: Exception) -> str:
    """What is wrong with a value, from OmegaConf's error: its first line, the rest of which repeats
    the key and the class.
    """
    reason = str(error).splitlines()[0]
    if re.search(
        r"Optional|NoneType|ListConfig|DictConfig|InterpolationKey|Error|resolver", reason
    ):
        return "this is not a kind of value that it takes; see --help"
    return reason
