"""The commands: one module for each verb that a user types.

A module holds the verb's options, ``run``, and how its result is told, and names them in its
``COMMAND``. What takes long to import (PyTorch, Ray, MLflow) is imported inside ``run``: help and
the check of the options need none of it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.values import JsonObject

Config = TypeVar("Config")

NAMES = (
    "shard",
    "index",
    "data",
    "plan",
    "train",
    "tune",
    "evaluate",
    "encode",
    "reconstruct",
    "sample",
    "registry",
    "theory",
    "serve-store",
    "demo",
)
"""The commands, in the order in which ``vlae --help`` lists them."""


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
    follows: bool = False
    """Whether its model and its pixels follow the manifest of its data set."""


def find(name: str) -> Command[Any]:
    """The command of a name in ``NAMES``."""
    module = importlib.import_module(f"pipeline.commands.{name.replace('-', '_')}")
    command: Command[Any] = module.COMMAND
    return command


def load(name: str, overrides: list[str]) -> Any:
    """The checked options of a command, from its YAML and ``key=value`` overrides.

    If the command trains a model, ``model=auto`` and ``dataset.binarization=auto`` become what the
    data set's manifest asks for; they stay as they are if there is none to be read. Raises
    UserError.
    """
    command = find(name)
    config = compose.load(name, command.config, overrides)
    if not command.follows:
        return config
    return compose.load(name, command.config, [*overrides, *_followed(config, overrides)])


def _followed(config: Any, overrides: list[str]) -> list[str]:
    """The overrides that a data set's manifest adds to those of the user."""
    from pipeline.config.run import preset_for
    from pipeline.config.sections import Binarization
    from pipeline.data import manifest
    from pipeline.storage import open_storage

    binarization = config.dataset.binarization
    is_auto = not any(text.startswith("model=") and text != "model=auto" for text in overrides)
    storage = open_storage(config.dataset.url, config.storage.endpoint_url)
    if not (is_auto or binarization is Binarization.auto):
        return []
    try:
        binarization_of_data = Binarization(manifest.load(storage).binarization)
    except UserError:
        return []  # the command itself will say what is wrong
    added = []
    if binarization is Binarization.auto:
        binarization = binarization_of_data
        added.append(f"dataset.binarization={binarization.value}")
    if is_auto:
        added.append(f"model={preset_for(binarization)}")
    return added
