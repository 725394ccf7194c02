"""The model registry, on MLflow: a SQLite file by default, a server where several people share it.

A version holds the weights (safetensors), the arguments that rebuild the model, and what it was trained with. Nothing in it is a
pickle, and loading it needs neither Ray nor the training code.
"""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline import config as options
from pipeline.errors import UserError
from pipeline.loop import TRAINING_FILE
from pipeline.storage import Storage
from vlae.build import MODEL_FILE, WEIGHTS_FILE

FILES = (MODEL_FILE, WEIGHTS_FILE, TRAINING_FILE)


class Registry:
    """Registered models and their versions. Raises UserError if the registry cannot be reached."""

    def __init__(self, config: options.Registry) -> None:
        self.config = config
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        try:
            if config.uri.startswith("sqlite:///"):
                Path(config.uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
            self.client = MlflowClient(config.uri, config.uri)
            with _at_most_seconds():
                self.client.search_registered_models(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"the registry at {config.uri} does not answer: {str(error).splitlines()[0]}; check registry.uri"
            ) from None

    def register(self, name: str, run: Storage) -> dict[str, Any]:
        """Make the final model of a training run the newest version of ``name``; returns its name and version.

        The first version becomes ``champion``, later ones ``challenger``. A run is registered once: again, its version is returned.
        """
        for version in self._search(name):
            if version.tags.get("run") == run.url:
                return {"name": name, "version": int(version.version)}
        with tempfile.TemporaryDirectory() as folder:
            for file in FILES:
                run.download(f"model/{file}", Path(folder) / file)
            training = json.loads((Path(folder) / TRAINING_FILE).read_text())
            with _unless_it_exists():
                self.client.create_experiment(name, f"{self.config.artifacts}/{name}")
            experiment = self.client.get_experiment_by_name(name)
            tracked = self.client.create_run(
                experiment.experiment_id, run_name=training["config"]["name"] or name, tags={"run": run.url}
            )
            settings = {"manifest": training["manifest"]} | {
                f"{part}.{key}": value
                for part in ("dataset", "model", "optim", "train")
                for key, value in training["config"][part].items()
            }
            self.client.log_batch(tracked.info.run_id, params=[Param(key, str(value)) for key, value in settings.items()])
            self._log(tracked.info.run_id, "valid", training["valid"])
            self.client.log_artifacts(tracked.info.run_id, folder, "model")
            self.client.set_terminated(tracked.info.run_id)
        with _unless_it_exists():
            self.client.create_registered_model(name)
        made = self.client.create_model_version(
            name, f"{tracked.info.artifact_uri}/model", run_id=tracked.info.run_id, tags={"run": run.url}
        )
        aliases = self.client.get_registered_model(name).aliases
        self.client.set_registered_model_alias(name, "challenger" if "champion" in aliases else "champion", made.version)
        return {"name": name, "version": int(made.version)}

    def models(self) -> list[dict[str, Any]]:
        """Every registered model: its name, newest version and aliases."""
        return [
            {"name": model.name, "versions": len(self._search(model.name)), "aliases": model.aliases}
            for model in self._all_models()
        ]

    def versions(self, name: str) -> list[dict[str, Any]]:
        """Every version of a model, the newest first, with parameters and metrics. Raises UserError if there is no such model."""
        versions = self._search(name)
        if not versions:
            known = ", ".join(model["name"] for model in self.models()) or "nothing yet"
            raise UserError(f"the registry at {self.config.uri} holds no model named {name}; it holds {known}")
        aliases = self.client.get_registered_model(name).aliases
        return [self._describe(version, aliases) for version in versions]

    def promote(self, name: str, version: int, alias: str) -> None:
        """Give ``alias`` to a version; a challenger that becomes champion is no longer challenger.

        Raises UserError if there is no such version.
        """
        known = [row["version"] for row in self.versions(name)]
        if version not in known:
            raise UserError(f"{name} has no version {version}; it has {', '.join(map(str, sorted(known)))}")
        try:
            self.client.set_registered_model_alias(name, alias, str(version))
        except MlflowException as error:
            raise UserError(f"alias={alias!r} cannot be given: {str(error).splitlines()[0]}") from None
        if alias == "champion" and str(self.client.get_registered_model(name).aliases.get("challenger")) == str(version):
            self.client.delete_registered_model_alias(name, "challenger")

    def resolve(self, uri: str) -> dict[str, Any]:
        """The name and version behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``. Raises UserError if there is none."""
        reference = uri.removeprefix("models:/")
        name, _, alias = reference.partition("@")
        name, _, number = name.partition("/")
        for row in self.versions(name):
            if (alias and alias in row["aliases"]) or (not alias and number == str(row["version"])):
                return row
        raise UserError(f"{uri} is not in the registry at {self.config.uri}; see `vlae registry show name={name}`")

    def download(self, name: str, version: int, folder: Path) -> Path:
        """Fetch a version's files to somewhere in ``folder``; returns where they are, ready for ``vlae.load``."""
        source = self.client.get_model_version_download_uri(name, str(version))
        return Path(
            mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.config.uri)
        )

    def log_evaluation(self, name: str, version: int, split: str, measured: Mapping[str, Any]) -> None:
        """Keep an evaluation's figures with a version: its numbers, those in nested tables too, but no lists."""
        self._log(self.client.get_model_version(name, str(version)).run_id, split, measured)

    def _log(self, run_id: str, split: str, values: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)  # of several evaluations the latest counts
        self.client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in _numbers(split, values)])

    def _all_models(self) -> list[RegisteredModel]:
        found, token = [], None
        while True:
            page = self.client.search_registered_models(page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _search(self, name: str) -> list[ModelVersion]:
        if not name or set(name) & set("/:'\""):
            raise UserError(f"{name!r} is no name for a registered model; use one without slashes, colons and quotes")
        found = self.client.search_model_versions(f"name = '{name}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _describe(self, version: ModelVersion, aliases: dict[str, str]) -> dict[str, Any]:
        data = self.client.get_run(version.run_id).data
        return {
            "name": version.name,
            "version": int(version.version),
            "aliases": sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)),
            "run": version.tags.get("run"),
            "parameters": dict(data.params),
            "metrics": dict(data.metrics),
        }


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers below a value of JSON, each named by its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, int | float):
        yield name, float(value)


@contextlib.contextmanager
def _at_most_seconds() -> Iterator[None]:
    """Have MLflow's client give up on a server within seconds, where by itself it would try for minutes; what the user set stands."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextlib.contextmanager
def _unless_it_exists() -> Iterator[None]:
    """Create something that somebody else may be creating at the same moment."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def run(action: str, config: options.RegistryConfig) -> dict[str, Any]:
    """``vlae registry list | show | promote``: prints what it found or did, and returns it."""
    registry = Registry(config.registry)
    if action == "list":
        models = registry.models()
        for model in models:
            aliases = ", ".join(f"{alias} is version {version}" for alias, version in sorted(model["aliases"].items()))
            print(f"{model['name']}: {model['versions']} version{'s' if model['versions'] > 1 else ''}; {aliases}")
        if not models:
            print(f"the registry at {config.registry.uri} holds no model yet; `vlae tune` fills it")
        return {"models": models}
    if config.name is None:
        raise UserError("which model? give name=NAME; `vlae registry list` lists them")
    if action == "promote":
        if config.version is None:
            raise UserError(
                f"which version of {config.name}? give version=N; `vlae registry show name={config.name}` lists them"
            )
        registry.promote(config.name, config.version, config.alias)
        print(f"{config.name} version {config.version} is now {config.alias}")
    versions = registry.versions(config.name)
    if action == "show":
        for row in versions if config.version is None else [registry.resolve(f"models:/{config.name}/{config.version}")]:
            _print_version(row)
    return {"name": config.name, "versions": versions}


def _print_version(row: dict[str, Any]) -> None:
    parameters, metrics = row["parameters"], row["metrics"]
    print(f"{row['name']} version {row['version']}{''.join(f' @{alias}' for alias in row['aliases'])}")
    print(
        f"  window {parameters['model.window']}, {parameters['model.latents']} latents, flow depth {parameters['model.flow_depth']}; "
        f"trained on {parameters['dataset.name']} ({parameters['dataset.binarization']}), {int(parameters['train.images']):,} images"
    )
    for split in ("valid", "test"):
        if f"{split}/elbo_nats" in metrics:
            bounds = f"  {split}: code length {metrics[f'{split}/elbo_nats']:.2f} nats, rate {metrics[f'{split}/rate_bits']:.1f} bits"
            if f"{split}/iwae_nats" in metrics:
                bounds += f", IWAE-{metrics[f'{split}/iwae_samples']:.0f} {metrics[f'{split}/iwae_nats']:.2f} nats"
            print(f"{bounds}, on {metrics[f'{split}/num_images']:,.0f} images")
    print(f"  from {row['run']}")


if __name__ == "__main__":
    from pipeline.cli import main

    main("registry")
