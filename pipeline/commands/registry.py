"""``vlae registry``: list, show, register, compare, promote and roll back models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.commands import Command
from pipeline.config.evaluation import BoundOptions
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.evaluation import evaluation
from pipeline.evaluation.measure import with_error
from pipeline.registry.compare import compare, format_comparison
from pipeline.registry.models import open_model
from pipeline.registry.versions import Registry
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.values import JsonObject


class Action(Enum):
    list = "list"
    show = "show"
    register = "register"
    compare = "compare"
    promote = "promote"
    rollback = "rollback"


@dataclass
class RegistryConfig:
    """List, show, register, compare and promote models, and roll a promotion back."""

    action: Action = option("what to do; the first word after the command")
    name: str | None = option("a registered model", None)
    version: int | None = option(
        "one of its versions; for compare and promote by default the challenger", None
    )
    against: str = option(
        "what compare holds it to: an alias, or the number of a version", "champion"
    )
    alias: str = option("the alias that promote gives", "champion")
    yes: bool = option("promote even what is not better; --yes does the same", False)
    runs: list[str] = option(
        "the folders of finished runs that register takes; the last becomes the newest version", []
    )
    split: str = option("the part of the data set that models are compared on", "valid")
    dataset_url: str | None = option(
        "another data set's folder to compare on; by default that of the version's training",
        None,
        path=True,
    )
    output: str = option("where the result goes", "outputs/registry", path=True)
    bounds: BoundOptions = section(BoundOptions, "how models are evaluated")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "which registry")


def run(config: RegistryConfig) -> JsonObject:
    """Do what ``config.action`` says, and return what was found or done. Raises UserError."""
    registry = Registry(config.registry)
    if config.action is Action.list:
        return {"models": registry.models()}
    if config.name is None:
        raise UserError("which model? give name=NAME; `vlae registry list` lists them")
    return ACTIONS[config.action](registry, config.name, config)


def register(
    registry: Registry,
    name: str,
    runs: Iterable[Storage],
    bounds: BoundOptions,
    storage: StorageOptions,
) -> list[dict[str, Any]]:
    """Evaluate the models of finished runs on validation images and make each a version of
    ``name``, the last the newest.

    Returns name and version of each. What is evaluated or registered already is not again. Raises
    UserError if a run has no model.
    """
    runs = list(runs)
    for folder in runs:
        evaluation.of_run(folder, bounds, storage)
    return [registry.register(name, folder) for folder in runs]


def _show(registry: Registry, name: str, config: RegistryConfig) -> JsonObject:
    rows, history = registry.versions(name), registry.history(name)
    if config.version is not None:
        rows, history = [registry.resolve(f"models:/{name}/{config.version}")], []
    champions = [[when.isoformat(), how, number] for when, how, number in history]
    return {"name": name, "versions": rows, "champions": champions}


def _register(registry: Registry, name: str, config: RegistryConfig) -> JsonObject:
    if not config.runs:
        raise UserError("which runs? give runs=[FOLDER,...], the folders of finished training runs")
    folders = [open_storage(url, config.storage.endpoint_url) for url in config.runs]
    made = register(registry, name, folders, config.bounds, config.storage)
    return {"name": name, "registered": made}


def _compare(registry: Registry, name: str, config: RegistryConfig) -> JsonObject:
    row = _version(registry, name, config.version)
    by_number = config.against.isdecimal()
    other = registry.resolve(f"models:/{name}{'/' if by_number else '@'}{config.against}")
    return {"name": name, "comparison": _measure(row, other, config)}


def _measure(row: JsonObject, other: JsonObject, config: RegistryConfig) -> JsonObject:
    version, against = (
        open_model(f"models:/{each['name']}/{each['version']}", config.registry, config.storage)
        for each in (row, other)
    )
    return compare(
        version,
        against,
        split=config.split,
        dataset_url=config.dataset_url,
        bounds=config.bounds,
        storage=config.storage,
    )


def _promote(registry: Registry, name: str, config: RegistryConfig) -> JsonObject:
    row = _version(registry, name, config.version)
    result: JsonObject = {"name": name, "version": row["version"], "alias": config.alias}
    result |= {"comparison": None, "promoted": True}
    champions = [each for each in registry.versions(name) if "champion" in each["aliases"]]
    if config.alias == "champion" and champions and champions[0]["version"] != row["version"]:
        result["comparison"] = _measure(row, champions[0], config)
        result["promoted"] = result["comparison"]["better"] or config.yes
    if result["promoted"] and config.alias not in row["aliases"]:
        registry.set_alias(name, row["version"], config.alias)
    return result


def _roll_back(registry: Registry, name: str, config: RegistryConfig) -> JsonObject:
    version, from_version = registry.roll_back(name)
    return {"name": name, "version": version, "instead_of": from_version}


ACTIONS = {
    Action.show: _show,
    Action.register: _register,
    Action.compare: _compare,
    Action.promote: _promote,
    Action.rollback: _roll_back,
}


def _version(registry: Registry, name: str, version: int | None) -> JsonObject:
    """The version asked for, or the challenger."""
    if version is not None:
        return registry.resolve(f"models:/{name}/{version}")
    for row in registry.versions(name):
        if "challenger" in row["aliases"]:
            return row
    raise UserError(
        f"{name} has no challenger; give version=N; `vlae registry show name={name}` lists them"
    )


def format_result(config: RegistryConfig, result: JsonObject) -> str:
    """What was found or done."""
    name = result.get("name")
    if config.action is Action.list:
        return _format_list(config, result["models"])
    if config.action is Action.show:
        lines = [_format_version(row) for row in result["versions"]]
        champions = ", ".join(
            f"{how} {number} on {when[:10]} {when[11:16]} UTC"
            for when, how, number in result["champions"]
        )
        return "\n".join([*lines, *([f"champions: {champions}"] if champions else [])])
    if config.action is Action.register:
        made = zip(result["registered"], config.runs, strict=True)
        return "\n".join(f"{name} version {row['version']}: {url}" for row, url in made)
    if config.action is Action.compare:
        return format_comparison(result["comparison"])
    if config.action is Action.promote:
        lines = [format_comparison(result["comparison"])] if result["comparison"] else []
        if result["promoted"]:
            lines.append(f"{name} version {result['version']} is now {result['alias']}")
        return "\n".join(lines)
    return (
        f"{name} version {result['version']} is champion again, in place of version "
        f"{result['instead_of']}"
    )


def _format_list(config: RegistryConfig, models: list[JsonObject]) -> str:
    if not models:
        return (
            f"the registry at {config.registry.uri} holds no model yet; `vlae tune` or "
            "`vlae registry register` fills it"
        )
    lines = []
    for model in models:
        aliases = [f"{alias} is version {number}" for alias, number in model["aliases"].items()]
        count = f"{model['versions']} version{'s' if model['versions'] > 1 else ''}"
        lines.append(f"{model['name']}: {count}; {', '.join(sorted(aliases))}")
    return "\n".join(lines)


def _format_version(row: JsonObject) -> str:
    parameters, metrics, tags = row["parameters"], row["metrics"], row["tags"]
    lines = [
        (
            f"{row['name']} version"
            f" {row['version']}{''.join(f' @{alias}' for alias in row['aliases'])}"
        ),
        (
            f"  window {parameters['model.window']}, {parameters['model.latents']} latents, flow"
            f" depth {parameters['model.flow_depth']}; trained on {parameters['dataset.name']}"
            f" ({parameters['dataset.binarization']}), {int(parameters['train.images']):,} images"
        ),
    ]
    for split in ("valid", "test"):
        if f"{split}/elbo_nats" in metrics:
            bounds = f"code length {_figure(metrics, f'{split}/elbo_nats')} nats"
            bounds += f", rate {metrics[f'{split}/rate_bits']:.1f} bits"
            if f"{split}/iwae_nats" in metrics:
                samples = f"{metrics[f'{split}/iwae_samples']:.0f}"
                bounds += f", IWAE-{samples} {_figure(metrics, f'{split}/iwae_nats')} nats"
            images = f"{metrics[f'{split}/num_images']:,.0f} images"
            lines.append(f"  {split}: {bounds}, on {images}")
    search = f", a trial of {tags['search_name']}" if "search_name" in tags else ""
    return "\n".join([*lines, f"  from {row['run']}{search}; code {tags['code_version'][:12]}"])


def _figure(metrics: Mapping[str, float], key: str) -> str:
    return with_error({key: metrics[key], f"{key}_se": metrics.get(f"{key}_se")}, key)


def _problem(result: JsonObject) -> str | None:
    if result.get("promoted", True):
        return None
    return (
        f"version {result['version']} of {result['name']} is not better than the champion, version "
        f"{result['comparison']['other']}: nothing is changed; promote it all the same with --yes"
    )


COMMAND = Command(
    RegistryConfig,
    run,
    format_result,
    lambda config: config.output,
    _problem,
    usage=(
        "vlae registry list | show name=NAME [version=N] | register name=NAME runs=[FOLDER,...]\n  "
        "     vlae registry compare name=NAME [version=N] [against=VERSION]\n       vlae registry"
        " promote name=NAME [version=N] [alias=ALIAS] [--yes] | rollback name=NAME"
    ),
    actions=tuple(Action.__members__),
    flags={"--yes": "yes=true"},
)
