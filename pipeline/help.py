"""The help pages: ``vlae --help`` and ``vlae COMMAND --help``."""

import functools
import inspect
import textwrap
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pipeline.commands import GROUPS, find
from pipeline.config.compose import choices, compose, meaning, options_of
from pipeline.config.evaluation import MODEL_NAME
from pipeline.config.options import describe

EXAMPLE = """a first session:
  vlae demo                                 everything below at once, in ./demo
  vlae shard dataset=mnist                  images -> shards
  vlae train model.window=7x4               one model
  vlae tune search.num_trials=12            many models, the best into the registry
  vlae evaluate model=models:/vlae-mnist@champion
  vlae explore model=models:/vlae-mnist@champion"""


HEADINGS = {
    "images": "images to data sets:",
    "models": "data sets to models:",
    "codes": "models to codes, files and pictures:",
    "start": "to begin with:",
}
"""What the commands of each group turn into what."""
PRESETS = "model"
"""The config group whose choices are explained one by one."""
PRESET_TITLE = "model presets, with the time of 1,000,000 images on two cores:"


def overview() -> str:
    """The text of ``vlae --help``."""
    lines = [
        "Variational Lossy Autoencoders: from images in object storage to models in a registry.",
        "",
        "usage: vlae COMMAND [key=value ...]      vlae COMMAND --help lists a command's options",
        "",
        "Words may also be FILE.yaml, a file of options, and --config-dir FOLDER, which holds your",
        "own choices of the ready-made groups, such as experiment/NAME.yaml.",
        "",
    ]
    for group, names in GROUPS.items():
        lines += [HEADINGS[group], *(f"  {name:<13}{summary(name)}" for name in names), ""]
    return "\n".join([*lines, EXAMPLE])


def help_page(name: str) -> str:
    """The text of ``vlae COMMAND --help``."""
    lines = [f"usage: {usage(name)}", "", summary(name), ""]
    if groups := groups_of(name):
        lines.append("ready-made groups of options:")
        lines += [f"  {group:<12}{names}" for group, names in groups.items()]
        lines.append("")
    if presets := presets_of(name):
        lines.append(PRESET_TITLE)
        for preset, text in presets.items():
            head = f"  {preset:<14}"
            lines.append(textwrap.fill(text, 96, initial_indent=head, subsequent_indent=" " * 16))
        lines.append("")
    lines.append("options:")
    indent = " " * 6
    for head, text in options_with_defaults(name).items():
        filled = textwrap.fill(text, 96, initial_indent=indent, subsequent_indent=indent)
        lines += [f"  {head}", filled]
    return "\n".join(lines)


def usage(name: str) -> str:
    """How a command is typed."""
    return find(name).usage or f"vlae {name} [key=value ...]"


def summary(name: str) -> str:
    """A command in a sentence."""
    return " ".join(str(inspect.getdoc(find(name).config)).split())


def groups_of(name: str) -> dict[str, str]:
    """The config groups of a command, each as ``group=``, and the choices that each has."""
    return {
        f"{group}=": ", ".join(
            f"{each} (default)" if each == default else each for each in options_of(group)
        )
        for group, default in choices(name).items()
    }


def presets_of(name: str) -> dict[str, str]:
    """The model presets that a command takes, and what each is for."""
    if PRESETS not in choices(name):
        return {}
    return {preset: meaning(PRESETS, preset) for preset in options_of(PRESETS)}


def options_with_defaults(name: str) -> dict[str, str]:
    """The options of a command, each as ``key=default``, and what they mean."""
    command, found = find(name), {}
    values = _defaults(name, command.config)
    for key, item in describe(command.config):
        value = values.get(key)
        head = f"{key}={_show(value)}" if value is not None else f"{key}="
        found[head] = item.metadata["help"] + _properties(item.metadata)
    return found


def _properties(metadata: Mapping[str, Any]) -> str:
    """What an option's declaration says besides its sentence: bounds, a path, no new run."""
    known = [f"must be {metadata['bounds']}"] if metadata["bounds"] else []
    known += ["a path"] if metadata["path"] else []
    known += [] if metadata["identity"] else ["may change on resuming"]
    return f" [{'; '.join(known)}]" if known else ""


def _defaults(name: str, schema: type) -> dict[str, Any]:
    """The options' default values; options that must be given are left out."""
    from omegaconf import OmegaConf

    composed = OmegaConf.merge(OmegaConf.structured(schema), compose(name)[0])
    plain = OmegaConf.to_container(composed, resolve=False)
    keys = [key for key, _ in describe(schema)]
    values = {
        key: functools.reduce(lambda part, name: part[name], key.split("."), plain) for key in keys
    }
    return {key: value for key, value in values.items() if value != "???"}


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and MODEL_NAME in value:
        return value.replace(MODEL_NAME, "NAME")
    if isinstance(value, str) and " " in value:
        return f"'{value}'"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
