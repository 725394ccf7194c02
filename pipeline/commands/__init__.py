"""The commands: one module for each verb that a user types, in four groups.

A module holds the verb's options, ``run``, and how its result is told, and names them in its
``COMMAND``. What takes long to import (PyTorch, Ray, MLflow) is imported inside ``run``: help and
the check of the options need none of it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipeline.config import compose
from pipeline.config.options import require_name
from pipeline.errors import UserError
from pipeline.values import JsonObject

Config = TypeVar("Config")

GROUPS = {
    "images": ("shard", "index", "data"),
    "models": ("plan", "train", "tune", "evaluate", "registry", "theory"),
    "codes": (
        "encode",
        "compress",
        "decompress",
        "reconstruct",
        "sample",
        "neighbours",
        "explore",
        "export",
    ),
    "start": ("demo", "serve-store"),
}
"""The commands, by the package that holds them, in the order of ``vlae --help``."""
NAMES = tuple(name for names in GROUPS.values() for name in names)

AUTO = "auto"
"""The preset and the binarization that follow the images."""


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A verb of the command line. Its sentence in the overview is the docstring of ``config``."""

    config: type[Config]
    """The dataclass of its options."""
    run: Callable[[Config], JsonObject | int]
    """Does the work and returns the result as JSON; or an exit code, if the command leaves no
    result.

    Raises UserError.
    """
    format: Callable[[Config, JsonObject], str]
    """The result as text for a person."""
    folder: Callable[[Config], str]
    """Where ``result.json`` goes: a folder or a storage address."""
    problem: Callable[[JsonObject], str | None] = lambda result: None
    """The sentence of the error that the command ends with after showing its result, if any."""
    usage: str | None = None
    """The first lines of its help, if not ``vlae COMMAND [key=value ...]``."""
    actions: tuple[str, ...] = ()
    """The words of which one has to come first: the value of the option ``action``."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Words that stand for options: ``{"--yes": "yes=true"}``."""
    resumes: bool = False
    """Whether the same command continues an interrupted one, instead of beginning anew."""
    follow: compose.Follow | None = None
    """Gives the overrides that ``auto`` stands for, from the options, which are not checked yet,
    and the choices of config groups.
    """


def find(name: str) -> Command[Any]:
    """The command of a name in ``NAMES``."""
    group = next(group for group, names in GROUPS.items() if name in names)
    module = importlib.import_module(f"pipeline.commands.{group}.{name.replace('-', '_')}")
    command: Command[Any] = module.COMMAND
    return command


def load(name: str, overrides: list[str]) -> Any:
    """The checked options of a command, from its YAML and ``key=value`` overrides. Raises
    UserError.
    """
    command = find(name)
    return compose.load(name, command.config, overrides, command.follow)


def follow_manifest(config: Any, presets: Mapping[str, str | None]) -> list[str]:
    """What ``auto`` stands for, by the manifest of the data set in ``config``. See
    ``Command.follow``.

    Nothing if there is none to be read. Raises UserError if ``preset`` is given.
    """
    from pipeline.config.model import preset_for
    from pipeline.config.sections import Binarization
    from pipeline.data import manifest
    from pipeline.storage import open_storage

    require_name("dataset.name", config.dataset.name)
    preset, binarization = presets["model"], config.dataset.binarization
    if config.preset is not None:
        raise UserError(f"preset is a record; choose a preset by model={config.preset}")
    followed = []
    if AUTO in (preset, binarization.value):
        storage = open_storage(config.dataset.url, config.storage.endpoint_url)
        try:
            contents = manifest.load(storage)
        except UserError:
            return []  # the command itself will say what is wrong
        if binarization is Binarization.auto:
            binarization = Binarization(contents.binarization)
            followed.append(f"dataset.binarization={binarization.value}")
        if preset == AUTO:
            preset = preset_for(contents.image_shape, binarization)
            followed.append(f"model={preset}")
    return [*followed, f"preset={preset}"]
