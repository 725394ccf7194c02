"""``vlae registry``: list, show, register, verify, compare, promote and roll back models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import vlae
from pipeline.commands import Command
from pipeline.config.evaluation import BoundOptions
from pipeline.config.options import option, section
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.values import JsonObject, Measured

if TYPE_CHECKING:
    from pipeline.registry.summaries import Version
    from pipeline.registry.versions import Registry
    from pipeline.runs import Run

Value = TypeVar("Value")


class Action(Enum):
    list = "list"
    show = "show"
    register = "register"
    verify = "verify"
    compare = "compare"
    promote = "promote"
    rollback = "rollback"


@dataclass
class RegistryConfig:
    """List, show, register, verify, compare and promote models, and roll a promotion back."""

    action: Action = option("what to do; the first word after the command")
    name: str | None = option("the name of a registered model", None, name=True)
    version: int | None = option(
        "one of its versions; by default all for show and verify, and the challenger for compare"
        " and promote",
        None,
    )
    against: str = option(
        "the version that compare compares it with: an alias or a number", "champion"
    )
    alias: str = option("the alias that promote gives", "champion")
    yes: bool = option(
        "promote a version even if it is not better, or breaks its search's constraints, like"
        " --yes",
        False,
    )
    runs: list[str] = option(
        "the folders of finished runs to register; the last becomes the newest version", []
    )
    split: str = option("the split on which versions are compared", "valid")
    dataset_url: str | None = option(
        "the folder of another data set to compare on; by default that of the version's training",
        None,
        path=True,
    )
    output: str = option("where the result goes", "outputs/registry", path=True)
    bounds: BoundOptions = section(BoundOptions, "how models are evaluated")
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "which registry")


def run(config: RegistryConfig) -> JsonObject:
    """Carry out ``config.action``. Returns its result. Raises UserError."""
    from pipeline.registry.versions import Registry

    registry = Registry(config.registry)
    if config.action is Action.list:
        return {"models": [model.to_json() for model in registry.models()]}
    if config.name is None:
        raise UserError("which model? give name=NAME; `vlae registry list` lists them")
    return ACTIONS[config.action](registry, config.name, config)


def register(
    registry: "Registry",
    name: str,
    runs: Sequence["Run"],
    bounds: BoundOptions,
    storage: StorageOptions,
) -> list[int]:
    """Evaluate the models of finished runs on validation images, and register each under ``name``.

    The last becomes the newest version. Returns the number of each version. Existing evaluations
    and versions are reused. Raises UserError if a run has no model.
    """
    from pipeline.evaluation.evaluation import evaluate_run

    for each in runs:
        evaluate_run(each, bounds, storage)
    return [registry.register(name, each) for each in runs]


def _show(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    versions, history = registry.versions(name), registry.history(name)
    if config.version is not None:
        versions, history = [registry.resolve(f"models:/{name}/{config.version}")], []
    return {
        "name": name,
        "versions": [version.to_json() for version in versions],
        "champions": [[time.isoformat(), how, version] for time, how, version in history],
    }


def _register(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    from pipeline.runs import Run

    if not config.runs:
        raise UserError("which runs? give runs=[FOLDER,...], the folders of finished training runs")
    runs = [Run.at(url, config.storage.endpoint_url) for url in config.runs]
    numbers = register(registry, name, runs, config.bounds, config.storage)
    return {
        "name": name,
        "registered": [{"name": name, "version": number} for number in numbers],
    }


def _verify(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    if config.version is None:
        numbers = [version.number for version in registry.versions(name)]
    else:
        numbers = [registry.resolve(f"models:/{name}/{config.version}").number]
    return {
        "name": name,
        "verified": [registry.verify(name, number).to_json() for number in numbers],
    }


def _compare(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    version = _version(registry, name, config.version)
    by_number = config.against.isdecimal()
    other = registry.resolve(f"models:/{name}{'/' if by_number else '@'}{config.against}")
    return {"name": name, "comparison": _measure(version, other, config)}


def _measure(version: "Version", other: "Version", config: RegistryConfig) -> JsonObject:
    from pipeline.registry.compare import compare
    from pipeline.registry.models import open_model

    model, against = (
        open_model(each.reference, config.registry, config.storage) for each in (version, other)
    )
    return compare(
        model,
        against,
        split=config.split,
        dataset_url=config.dataset_url,
        bounds=config.bounds,
        storage=config.storage,
    )


def _promote(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    version = _version(registry, name, config.version)
    result: JsonObject = {"name": name, "version": version.number, "alias": config.alias}
    result |= {"comparison": None, "promoted": True, "broken": []}
    if config.alias != "champion":
        if config.alias not in version.aliases:
            registry.set_alias(name, version.number, config.alias)
        return result
    result["broken"] = _broken(registry, version)
    if result["broken"] and not config.yes:
        result["promoted"] = False
        return result
    before, known = len(registry.history(name)), {version.number}
    while rivals := _champions(registry, name, before) - known:
        rival = registry.resolve(f"models:/{name}/{min(rivals)}")
        result["comparison"] = _measure(version, rival, config)
        if not (result["comparison"]["better"] or config.yes):
            result["promoted"] = False
            if registry.champion(name) == version.number:  # two were promoted at once
                registry.set_alias(name, rival.number, "champion")
            return result
        known.add(rival.number)
        registry.set_alias(name, version.number, "champion")
    if registry.champion(name) != version.number:
        registry.set_alias(name, version.number, "champion")
    return result


def _broken(registry: "Registry", version: "Version") -> list[str]:
    """The constraints that a version breaks: those of the search that it is a trial of, or else of
    the champion's. The champion itself is held to none.
    """
    from pipeline.registry.constraints import broken, of_search

    champion = registry.champion(version.name)
    if champion == version.number:
        return []
    asking = version
    if "search" not in version.tags and champion is not None:
        asking = registry.resolve(f"models:/{version.name}/{champion}")
    search = asking.tags.get("search_name")
    return [
        f"{sentence}, as search {search} asks"
        for sentence in broken(version, of_search(registry, asking))
    ]


def _champions(registry: "Registry", name: str, before: int) -> set[int]:
    """The champion, and whatever became champion after the first ``before`` changes.

    Somebody else may promote a version while this command compares its own.
    """
    changes = registry.history(name)[before:]
    champion = registry.champion(name)
    return {each.version for each in changes} | (set() if champion is None else {champion})


def _roll_back(registry: "Registry", name: str, config: RegistryConfig) -> JsonObject:
    version, from_version = registry.roll_back(name)
    return {"name": name, "version": version, "instead_of": from_version}


ACTIONS: dict[Action, Callable[["Registry", str, RegistryConfig], JsonObject]] = {
    Action.show: _show,
    Action.register: _register,
    Action.verify: _verify,
    Action.compare: _compare,
    Action.promote: _promote,
    Action.rollback: _roll_back,
}
"""The actions on one registered model."""


def _version(registry: "Registry", name: str, number: int | None) -> "Version":
    """The version with this number, or the challenger."""
    if number is not None:
        return registry.resolve(f"models:/{name}/{number}")
    for version in registry.versions(name):
        if "challenger" in version.aliases:
            return version
    raise UserError(
        f"{name} has no challenger; give version=N; `vlae registry show name={name}` lists them"
    )


def format_result(config: RegistryConfig, result: JsonObject) -> str:
    """The result of the action as text."""
    from pipeline.registry.summaries import format_comparison

    name = result.get("name")
    if config.action is Action.list:
        return _format_list(config, result["models"])
    if config.action is Action.show:
        lines = [_format_version(version) for version in result["versions"]]
        champions = ", ".join(
            f"{how} {number} on {time[:10]} {time[11:16]} UTC"
            for time, how, number in result["champions"]
        )
        return "\n".join([*lines, *([f"champions: {champions}"] if champions else [])])
    if config.action is Action.register:
        registered = zip(result["registered"], config.runs, strict=True)
        return "\n".join(f"{name} version {each['version']}: {url}" for each, url in registered)
    if config.action is Action.verify:
        return "\n".join(_format_verified(str(name), each) for each in result["verified"])
    if config.action is Action.compare:
        return format_comparison(result["comparison"])
    if config.action is Action.promote:
        lines = [format_comparison(result["comparison"])] if result["comparison"] else []
        if result["promoted"]:
            lines.append(f"{name} version {result['version']} is now {result['alias']}")
            lines += [f"although its {sentence}" for sentence in result["broken"]]
        return "\n".join(lines)
    return (
        f"{name} version {result['version']} is champion again, in place of version "
        f"{result['instead_of']}"
    )


def _format_list(config: RegistryConfig, models: list[JsonObject]) -> str:
    if not models:
        return (
            f"the registry at {config.registry.uri} holds no model yet; `vlae tune` and "
            "`vlae registry register` add models"
        )
    lines = []
    for model in models:
        aliases = [f"{alias} is version {number}" for alias, number in model["aliases"].items()]
        count = f"{model['versions']} version{'s' if model['versions'] > 1 else ''}"
        lines.append(f"{model['name']}: {count}; {', '.join(sorted(aliases))}")
    return "\n".join(lines)


def _format_version(version: JsonObject) -> str:
    parameters, tags = version["parameters"], version["tags"]
    aliases = "".join(f" @{alias}" for alias in version["aliases"])
    architecture = vlae.describe(_part(parameters, "model."))
    data = f"{parameters['dataset.name']} ({parameters['dataset.binarization']})"
    lines = [
        f"{version['name']} version {version['version']}{aliases}",
        f"  {architecture}; trained on {data}, {int(parameters['train.images']):,} images",
    ]
    for split in ("valid", "test"):
        figures = _part(version["metrics"], f"{split}/")
        if "elbo_nats" in figures:
            elbo = Measured.from_json(figures, "elbo_nats")
            bounds = f"code length {elbo}, rate {figures['rate_bits']:.1f} bits"
            if "iwae_nats" in figures:
                iwae = Measured.from_json(figures, "iwae_nats")
                bounds += f", IWAE-{figures['iwae_samples']:.0f} {iwae}"
            lines.append(f"  {split}: {bounds}, on {elbo.count:,} images")
    search = f", a trial of {tags['search_name']}" if "search_name" in tags else ""
    return "\n".join([*lines, f"  from {version['run']}{search}; code {tags['code_version'][:12]}"])


def _format_verified(name: str, found: JsonObject) -> str:
    if found["problems"]:
        return "\n  ".join([f"{name} version {found['version']}:", *found["problems"]])
    signature = "not signed"
    if found["signed"]:
        signature = "signature valid"
        if not found["checked"]:
            signature = "signature not checked, since VLAE_VERIFYING_KEY names no key"
    return (
        f"{name} version {found['version']}: {len(found['files'])} files,"
        f" {sum(found['files'].values()):,} bytes, all with their checksums; {signature}"
    )


def _part(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """The values whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _problem(result: JsonObject) -> str | None:
    bad = [each for each in result.get("verified", []) if each["problems"]]
    if bad:
        numbers = ", ".join(str(each["version"]) for each in bad)
        return (
            f"{result['name']} has damaged or untrusted files in version {numbers}:"
            f" {bad[0]['problems'][0]}"
        )
    if result.get("promoted", True):
        return None
    if result["broken"]:
        return (
            f"version {result['version']} of {result['name']} breaks a constraint: its"
            f" {'; its '.join(result['broken'])}: nothing was changed; to promote it anyway, add"
            " --yes"
        )
    return (
        f"version {result['version']} of {result['name']} is not better than the champion, version "
        f"{result['comparison']['other']}: nothing was changed; to promote it anyway, add --yes"
    )


COMMAND = Command(
    RegistryConfig,
    run,
    format_result,
    lambda config: config.output,
    _problem,
    usage=(
        "vlae registry list | show name=NAME [version=N] | register name=NAME runs=[FOLDER,...]\n  "
        "     vlae registry verify name=NAME [version=N]\n       vlae registry compare name=NAME"
        " [version=N] [against=VERSION]\n       vlae registry"
        " promote name=NAME [version=N] [alias=ALIAS] [--yes] | rollback name=NAME"
    ),
    actions=tuple(Action.__members__),
    flags={"--yes": "yes=true"},
)
