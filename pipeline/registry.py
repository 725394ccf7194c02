"""``vlae registry``: list, show, register, compare and promote models, and roll a promotion back. It needs no Ray."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline import config as options
from pipeline import evaluate
from pipeline.config import Binarization, RegistryConfig, to_dict
from pipeline.errors import UserError
from pipeline.loader import Batch, EvalLoader
from pipeline.loop import keep_freed_memory
from pipeline.measure import measure, with_error
from pipeline.metrics import Moments
from pipeline.storage import Storage, open_storage
from pipeline.versions import OpenedModel, Registry, device, open_data, open_model

COMPARED = {"nll": "negative log-likelihood", "code_length": "code length", "rate": "rate"}
"""What is measured of both models on every image, in nats. The first decides; of one sample, it is the second."""
CERTAIN = 2.0
"""A model is better if it is so by more than this many standard errors of the difference."""


def run(action: str, config: RegistryConfig) -> dict[str, Any]:
    """``vlae registry ACTION``: prints what it found or did, and returns it."""
    registry = Registry(config.registry)
    if action == "list":
        return _list(registry)
    if config.name is None:
        raise UserError("which model? give name=NAME; `vlae registry list` lists them")
    if action == "show":
        return _show(registry, config.name, config.version)
    if action == "register":
        return _register(registry, config.name, config)
    if action == "compare":
        row = _version(registry, config.name, config.version)
        return {
            "name": config.name,
            "comparison": _compare(registry, row, _other(registry, config.name, config.against), config),
        }
    if action == "promote":
        return _promote(registry, config.name, config)
    return _roll_back(registry, config.name)


def register(
    registry: Registry, name: str, runs: Iterable[Storage], bounds: options.BoundOptions, storage: options.StorageOptions
) -> list[dict[str, Any]]:
    """Evaluate the models of finished runs on validation images and make each a version of ``name``, the last the newest.

    Returns name and version of each. What is evaluated or registered already is not again. Raises UserError if a run has no model.
    """
    runs = list(runs)
    for folder in runs:
        evaluate.of_run(folder, bounds, storage, registry.config)
    return [registry.register(name, folder) for folder in runs]


def compare(registry: Registry, version: Mapping[str, Any], other: Mapping[str, Any], config: RegistryConfig) -> dict[str, Any]:
    """Measure two versions on the same images, with the same binarization, bound, k and noise.

    Each quantity is given for both, and as the difference ``version`` less ``other``, with its standard error over images: that of
    the differences image by image. Raises UserError if the two are no models of the same pixels.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    models = [
        open_model(f"models:/{row['name']}/{row['version']}", config.registry, config.storage) for row in (version, other)
    ]
    kinds = [model.binarization for model in models]
    if Binarization.none in kinds and kinds[0] != kinds[1]:
        raise UserError(
            f"versions {version['version']} and {other['version']} of {version['name']} cannot be compared: one models images of 256 "
            "values, the other black and white ones"
        )
    url = config.dataset_url or models[0].training["config"]["dataset"]["url"]
    measured = [_per_image(model, url, kinds[0], config) for model in models]
    values: dict[str, Any] = {}
    for name in COMPARED:
        moments, (new, old) = Moments(), (each[name] for each in measured)
        moments.add({"version": new, "other": old, "difference": new - old})
        values[name] = {
            key: figure
            for part in ("version", "other", "difference")
            for key, figure in ((part, moments.mean(part)), (f"{part}_se", moments.standard_error(part)))
        }
    decisive = values["nll"]
    return {
        "version": version["version"],
        "other": other["version"],
        "dataset": {"url": url, "split": config.split, "binarization": kinds[0].value},
        "num_images": len(measured[0]["nll"]),
        "bounds": to_dict(config.bounds),
        "nats": values,
        "better": decisive["difference"] + CERTAIN * (decisive["difference_se"] or 0.0) < 0,
    }


def _per_image(model: OpenedModel, url: str, binarization: Binarization, config: RegistryConfig) -> dict[str, Tensor]:
    """What ``COMPARED`` names, of each image: (num_images,), in float64."""
    data, contents = open_data(model, url, config.storage)
    bounds = config.bounds
    loader = EvalLoader(data, contents, split=config.split, batch_size=evaluate.BATCH, num_images=bounds.num_images)
    parts: list[dict[str, Tensor]] = []

    def keep(batch: Batch, x: Tensor, estimate: Any) -> None:
        values = {"nll": -estimate.iwae, "code_length": -estimate.elbo, "rate": estimate.rate}
        parts.append({name: value.double().cpu() for name, value in values.items()})
        bar.update(len(x))

    with evaluate.progress_bar(loader, model.reference.removeprefix("models:/")) as bar:
        measure(
            model.network.to(device()),
            loader,
            samples=bounds.samples,
            binarization=binarization,
            seed=bounds.seed,
            device=device(),
            threads=evaluate.num_threads(device()),
            visit=keep,
        )
    return {name: torch.cat([part[name] for part in parts]) for name in COMPARED}


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """A comparison as a table."""
    data, k = comparison["dataset"], comparison["bounds"]["samples"]
    images = f"{comparison['num_images']:,} {data['split']} images of {data['url']}"
    version, other = f"version {comparison['version']}", f"version {comparison['other']}"
    lines = [
        f"{images}, binarization {data['binarization']}; nats per image:",
        f"  {'':<26}{version:>18}{other:>18}{'difference':>18}",
    ]
    for name, label in COMPARED.items():
        row = comparison["nats"][name]
        shown = "".join(f"{with_error(row, part, 3):>18}" for part in ("version", "other", "difference"))
        lines.append(f"  {label + f', k = {k}' * (name == 'nll'):<26}{shown}")
    difference = comparison["nats"]["nll"]["difference"]
    verdict = (
        "is better"
        if comparison["better"]
        else "is not better"
        if difference >= 0
        else "may be better, but not by two standard errors"
    )
    return "\n".join([*lines, f"{version} {verdict}"])


# --- actions ------------------------------------------------------------------------------------------------------------


def _list(registry: Registry) -> dict[str, Any]:
    models = registry.models()
    for model in models:
        aliases = ", ".join(f"{alias} is version {version}" for alias, version in sorted(model["aliases"].items()))
        print(f"{model['name']}: {model['versions']} version{'s' if model['versions'] > 1 else ''}; {aliases}")
    if not models:
        print(f"the registry at {registry.config.uri} holds no model yet; `vlae tune` or `vlae registry register` fills it")
    return {"models": models}


def _show(registry: Registry, name: str, version: int | None) -> dict[str, Any]:
    rows = registry.versions(name)
    for row in rows if version is None else [registry.resolve(f"models:/{name}/{version}")]:
        _print_version(row)
    history = registry.history(name)
    if history and version is None:
        print("champions: " + ", ".join(f"{how} {number} on {when:%Y-%m-%d %H:%M} UTC" for when, how, number in history))
    return {"name": name, "versions": rows, "champions": [[when.isoformat(), how, number] for when, how, number in history]}


def _register(registry: Registry, name: str, config: RegistryConfig) -> dict[str, Any]:
    if not config.runs:
        raise UserError("which runs? give runs=[FOLDER,...], the folders of finished training runs")
    folders = [open_storage(url, config.storage.endpoint_url) for url in config.runs]
    made = register(registry, name, folders, config.bounds, config.storage)
    for row, folder in zip(made, folders, strict=True):
        print(f"{name} version {row['version']}: {folder.url}")
    return {"name": name, "registered": made}


def _compare(registry: Registry, row: dict[str, Any], other: dict[str, Any], config: RegistryConfig) -> dict[str, Any]:
    comparison = compare(registry, row, other, config)
    print(format_comparison(comparison))
    return comparison


def _promote(registry: Registry, name: str, config: RegistryConfig) -> dict[str, Any]:
    row = _version(registry, name, config.version)
    champion = next((each for each in registry.versions(name) if "champion" in each["aliases"]), None)
    comparison = None
    if config.alias == "champion" and champion and champion["version"] != row["version"]:
        comparison = _compare(registry, row, champion, config)
        if not comparison["better"] and not config.yes:
            raise UserError(
                f"version {row['version']} of {name} is not better than the champion, version {champion['version']}: nothing is changed; "
                "promote it all the same with --yes"
            )
    if config.alias not in row["aliases"]:
        registry.set_alias(name, row["version"], config.alias)
    print(f"{name} version {row['version']} is now {config.alias}")
    return {"name": name, "version": row["version"], "alias": config.alias, "comparison": comparison}


def _roll_back(registry: Registry, name: str) -> dict[str, Any]:
    version, from_version = registry.roll_back(name)
    print(f"{name} version {version} is champion again, in place of version {from_version}")
    return {"name": name, "version": version, "instead_of": from_version}


def _version(registry: Registry, name: str, version: int | None) -> dict[str, Any]:
    """The version asked for, or the challenger."""
    if version is not None:
        return registry.resolve(f"models:/{name}/{version}")
    challenger = next((row for row in registry.versions(name) if "challenger" in row["aliases"]), None)
    if challenger is None:
        raise UserError(f"{name} has no challenger; give version=N; `vlae registry show name={name}` lists them")
    return challenger


def _other(registry: Registry, name: str, against: str) -> dict[str, Any]:
    return registry.resolve(f"models:/{name}/{against}" if against.isdecimal() else f"models:/{name}@{against}")


def _print_version(row: dict[str, Any]) -> None:
    parameters, metrics = row["parameters"], row["metrics"]
    print(f"{row['name']} version {row['version']}{''.join(f' @{alias}' for alias in row['aliases'])}")
    print(
        f"  window {parameters['model.window']}, {parameters['model.latents']} latents, flow depth {parameters['model.flow_depth']}; "
        f"trained on {parameters['dataset.name']} ({parameters['dataset.binarization']}), {int(parameters['train.images']):,} images"
    )
    for split in ("valid", "test"):
        if f"{split}/elbo_nats" in metrics:
            bounds = f"  {split}: code length {_figure(metrics, f'{split}/elbo_nats')} nats, rate {metrics[f'{split}/rate_bits']:.1f} bits"
            if f"{split}/iwae_nats" in metrics:
                bounds += f", IWAE-{metrics[f'{split}/iwae_samples']:.0f} {_figure(metrics, f'{split}/iwae_nats')} nats"
            print(f"{bounds}, on {metrics[f'{split}/num_images']:,.0f} images")
    search = f", a trial of {row['tags']['search_name']}" if "search_name" in row["tags"] else ""
    print(f"  from {row['run']}{search}; code {row['tags']['code_version'][:12]}")


def _figure(metrics: Mapping[str, float], key: str) -> str:
    return with_error({key: metrics[key], f"{key}_se": metrics.get(f"{key}_se")}, key)


if __name__ == "__main__":
    from pipeline.cli import main

    main("registry")
