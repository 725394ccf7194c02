"""The configuration: every option of every command, declared once, with its type, default and
meaning.

YAML files in ``configs/`` only choose values. ``load`` composes them with Hydra, applies the user's
own files and the command line's ``key=value`` overrides, and checks everything that can be checked
without touching data, so that a mistake ends before any compute.
"""

import difflib
import functools
import importlib.resources
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import hydra
import yaml
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.addresses import name_of
from pipeline.config.options import Config, check_all, check_secrets, describe, to_dict
from pipeline.errors import UserError

Follow: TypeAlias = Callable[[Any, Mapping[str, str | None]], list[str]]
REFUSALS = (OmegaConfBaseException, TypeError, ValueError, AttributeError, RuntimeError)
"""What is raised for values that a configuration does not take."""
UNREADABLE = (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException)
"""What is raised for a file that is no YAML, or no configuration."""
SQLITE = "sqlite:///"
"""What the address of a SQLite file begins with; its path follows, relative or absolute."""
CONFIG_DIR = "--config-dir"
"""The word before a folder of the user's own choices of config groups, as in Hydra."""
OVERRIDE = "override "
"""What may stand before a config group in a ``defaults`` list."""

OmegaConf.register_new_resolver("name_of", name_of, replace=True)


@dataclass
class Words:
    """What the words of a command line say."""

    folders: tuple[str, ...] = ()
    """The user's folders of config groups, absolute."""
    chosen: dict[str, str] = field(default_factory=dict)
    """The choices of config groups, as Hydra takes them: {"model": "model=fast"}."""
    values: dict[str, Any] = field(default_factory=dict)
    """The values of options, by their keys."""


@functools.cache
def compose(
    command: str, *chosen: str, folders: tuple[str, ...] = ()
) -> tuple[DictConfig, Mapping[str, str | None]]:
    """The values that ``configs/`` gives a command, and which choice of each config group they come
    from.

    ``chosen`` are choices other than the command's own, such as "model=tiny"; ``folders`` are more
    places where they are searched. Hydra takes 0.1 s for it, so it is asked once in a process.
    Raises HydraException.
    """
    places = ",".join(f"'file://{folder}'" for folder in folders)
    searched = [f"hydra.searchpath=[{places}]"] if folders else []
    with initialize_config_module("configs", version_base=None):
        composed = hydra.compose(command, [*chosen, *searched], return_hydra_config=True)
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


def options_of(group: str, folders: Iterable[str] = ()) -> list[str]:
    """The choices that ``configs/`` and the user's folders hold for a group."""
    places = [importlib.resources.files("configs"), *map(Path, folders)]
    found = [place / group for place in places if (place / group).is_dir()]
    names = {file.name for folder in found for file in folder.iterdir()}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


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
    (``model.window=7x4``). ``--config-dir FOLDER`` adds the user's own choices of config groups.
    The path of a YAML file stands for what the file sets; all other words override it. ``follow``
    gets the options that result, before they are checked, and the choices of groups, and gives
    overrides for those that are left to the data. Raises UserError, in one sentence, on everything
    that is wrong with it.
    """
    groups = choices(command)
    folders, files, pairs = _split(overrides)
    own = Words(folders)
    for file in files:
        _read(file, command, groups, dict(describe(schema)), own)
    _parse(groups, pairs, own)
    composed, names = _composed(command, own)
    if follow:
        _parse(groups, follow(_typed(schema, composed, own.values), names), own)
        composed, _ = _composed(command, own)
    return build(schema, composed, own.values)


def _composed(command: str, words: Words) -> tuple[DictConfig, Mapping[str, str | None]]:
    """``compose`` for the user's choices of config groups. Raises UserError."""
    try:
        return compose(command, *words.chosen.values(), folders=words.folders)
    except (HydraException, *UNREADABLE) as error:
        raise UserError(" ".join(str(error).split())) from None


def _split(words: Iterable[str]) -> tuple[tuple[str, ...], list[Path], list[str]]:
    """The user's folders and files in a command's words, and the ``key=value`` words.

    Raises UserError if a folder or file does not exist.
    """
    folders, files, pairs = list[str](), list[Path](), list[str]()
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == CONFIG_DIR:
            given = value if equals else next(remaining, "")
            folder = Path(given).expanduser().absolute()
            if not given or not folder.is_dir():
                raise UserError(
                    f"{CONFIG_DIR} {given} is no folder; give one that holds choices such as"
                    " experiment/NAME.yaml"
                )
            folders.append(str(folder))
        elif not equals and word.endswith((".yaml", ".yml")):
            files.append(Path(word).expanduser())
            if not files[-1].is_file():
                raise UserError(f"{word} does not exist; give the path of a YAML file of options")
        else:
            pairs.append(word)
    return tuple(folders), files, pairs


def _read(
    file: Path,
    command: str,
    groups: Mapping[str, str | None],
    known: Mapping[str, Any],
    words: Words,
) -> None:
    """Add what a user's file sets: the choices in its ``defaults`` list, and its values.

    Raises UserError, which names the file.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not understood: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no options; write key: value in its lines")
    listed = content.pop("defaults", [])
    pairs = list[str]()
    for entry in listed if isinstance(listed, list) else [listed]:
        if entry in ("_self_", command):
            continue
        if not isinstance(entry, dict):
            raise UserError(
                f"{file}: defaults has {entry!r}; write GROUP: CHOICE, {command} or _self_"
            )
        pairs += [_choice(str(group).removeprefix(OVERRIDE), each) for group, each in entry.items()]
    for group in [key for key in content if key in groups and not isinstance(content[key], dict)]:
        pairs.append(_choice(str(group), content.pop(group)))
    try:
        _parse(groups, pairs, words)
        values = dict(_flat(content, known))
        for key in values:
            _check_known(key, known)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    words.values |= values


def _choice(group: str, choice: object) -> str:
    """The choice of a config group as a word of the command line."""
    return f"{group.lstrip('/')}={'null' if choice is None else choice}"


def _flat(
    content: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, Any]]:
    """Nested values by the dotted keys of options."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known and value:
            yield from _flat(value, known, f"{key}.")
        else:
            yield key, value


def _parse(groups: Mapping[str, str | None], overrides: Iterable[str], words: Words) -> None:
    """Add the choices of config groups and the values in ``key=value`` words. Raises UserError."""
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
            known = options_of(key, words.folders)
            if override.value() not in known:
                raise UserError(
                    f"{text!r}: there is no such {key}; choose one of {', '.join(known)}"
                )
            words.chosen[key] = text
        else:
            words.values[key] = override.value()


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


@functools.cache  # shared, since `merge` copies it, which is faster than to make it anew
def _structured(schema: type[Any]) -> DictConfig:
    return typing.cast(DictConfig, OmegaConf.structured(schema))


def _typed(schema: type[Config], base: Any, values: Mapping[str, Any]) -> Config:
    """A configuration whose values have their types, and are not checked otherwise.

    Raises UserError.
    """
    known = dict(describe(schema))
    key = "the configuration"
    try:
        config = OmegaConf.merge(_structured(schema), base)  # type: ignore[arg-type]
        for key, value in values.items():
            _check_known(key, known)
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


def _check_known(key: str, known: Mapping[str, Any]) -> None:
    """Raise UserError unless a key is an option, or an entry of one that is a mapping."""
    if key in known:
        return
    mappings = (name for name, item in known.items() if typing.get_origin(item.type) is dict)
    if not any(key.startswith(f"{name}.") for name in mappings):
        raise UserError(unknown_option(key, known))


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
