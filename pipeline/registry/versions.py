"""The model registry, on MLflow: a SQLite file by default, a server where several people share it.

A version holds a model as safetensors and JSON, what it was trained with, how it was evaluated, its
pictures and a model card. It exists once all of its files are in place, and each is held to its
sha256, which the registry keeps, whenever it is read. Nothing is unpickled or executed, and loading
needs neither Ray nor the training code.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow.artifacts
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import sections
from pipeline.errors import UserError
from pipeline.registry import card
from pipeline.registry.tracking import Connection, training_run
from pipeline.runs import (
    EVALUATION,
    MODEL_FILES,
    TRAINING_FILE,
    find_evaluation,
    load,
    sha256_of_file,
)
from pipeline.storage.base import Storage
from vlae.factory import WEIGHTS_FILE

PYFUNC_FILE = "MLmodel"
PYFUNC = {
    "flavors": {"python_function": {"loader_module": "vlae.pyfunc", "python_version": "3.11"}}
}
"""What MLflow's own ``pyfunc.load_model`` looks for: the name of a module of ours. There is no code
in a version.
"""
CHECKSUM = "sha256."
"""Begins the tags of a version that hold the checksums of its files."""
EVALUATED = "evaluation/"
"""Begins the names of the metrics that evaluations measured, as opposed to the training's own."""
CHAMPION = "champion."
"""Begins the tags of a registered model that say which version became champion: the rest is the
time, in nanoseconds.
"""


class Registry:
    """Registered models and their versions. Raises UserError if the registry cannot be reached."""

    def __init__(self, config: sections.RegistryOptions) -> None:
        self.config = config
        try:
            with _at_most_seconds():
                self.connection = Connection(config)
                self.client = self.connection.client
                self.client.search_registered_models(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"the registry at {config.uri} does not answer: {str(error).splitlines()[0]}; check"
                " registry.uri"
            ) from None

    def register(self, name: str, run: Storage) -> dict[str, Any]:
        """Make the evaluated model of a finished run the newest version of ``name``; returns its
        name and version.

        The first version becomes ``champion``, later ones ``challenger``. A model is registered
        once: again, its version is returned. What an interrupted registration left is of no matter:
        a version is made when its files are in place. Raises UserError if the run has no model, or
        none that was evaluated.
        """
        with tempfile.TemporaryDirectory() as place, self._explained():
            folder = Path(place)
            training, evaluation = gather(run, folder)
            weights = sha256_of_file(folder / WEIGHTS_FILE)
            if known := self._same(name, run.url, weights):
                return self._named(name, known[0])
            tracked = training_run(run, training["config"], training["manifest"])
            run_id = self.connection.sync(tracked)
            if not tracked.finished:
                self.connection.end(tracked, "FINISHED")
            self._log(run_id, evaluation["split"], evaluation[evaluation["split"]])
            kept = self.client.get_run(run_id)
            search = kept.data.tags.get("mlflow.parentRunId")
            tags = {"run": run.url, "run_id": run_id, "manifest": training["manifest"]}
            tags["code_version"] = kept.data.tags["code_version"]
            if search:
                tags |= {"search": search, "search_name": self.client.get_run(search).info.run_name}
            (folder / "README.md").write_text(card.text(name, training, evaluation, tags))
            (folder / PYFUNC_FILE).write_text(json.dumps(PYFUNC, indent=2) + "\n")
            checksums = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
            # Named after its content: nobody who registers the same run, or another model in its
            # folder, writes over it.
            path = f"model-{hashlib.sha256(json.dumps(checksums).encode()).hexdigest()[:16]}"
            self.client.log_artifacts(run_id, str(folder), path)
            with _unless_it_exists():
                self.client.create_registered_model(name)
            self.client.create_model_version(
                name,
                f"{kept.info.artifact_uri}/{path}",
                run_id=run_id,
                tags=tags | {CHECKSUM + file: digest for file, digest in checksums.items()},
            )
            # Two people may register a run at once, and a client whose answer was lost asks again:
            # the first stays.
            first, *others = self._same(name, run.url, weights)
            for other in others:
                with contextlib.suppress(MlflowException):  # who made it may be as quick
                    self.client.delete_model_version(name, str(other))
            return self._named(name, first, new=True)

    def _same(self, name: str, url: str, weights: str) -> list[int]:
        """The versions that are the model of these weights of a run, the first first."""
        wanted = {"run": url, CHECKSUM + WEIGHTS_FILE: weights}
        return [
            int(each.version)
            for each in reversed(self._search(name))
            if wanted.items() <= each.tags.items()
        ]

    def _named(self, name: str, number: int, new: bool = False) -> dict[str, Any]:
        """A version, once it has the alias of a new one: nobody may have come to give it."""
        aliases = self.client.get_registered_model(name).aliases
        if "champion" not in aliases:
            self.crown(name, number)
        elif str(aliases["champion"]) != str(number) and (new or "challenger" not in aliases):
            self.client.set_registered_model_alias(name, "challenger", str(number))
        return {"name": name, "version": number}

    # --- looking ----------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Every registered model: its name, number of versions and aliases."""
        with self._explained():
            return [
                {
                    "name": model.name,
                    "versions": len(self._search(model.name)),
                    "aliases": model.aliases,
                }
                for model in self._all_models()
            ]

    def versions(self, name: str) -> list[dict[str, Any]]:
        """Every version of a model, the newest first, with parameters and metrics. Raises UserError
        if there is no such model.
        """
        with self._explained():
            return [
                self._describe(version, aliases) for version, aliases in self._all_versions(name)
            ]

    def resolve(self, uri: str) -> dict[str, Any]:
        """The version behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``. Raises UserError
        if there is none.
        """
        reference = uri.removeprefix("models:/")
        name, _, alias = reference.partition("@")
        name, _, number = name.partition("/")
        for version, aliases in self._all_versions(name):
            if (alias in aliases) if alias else (number == str(version.version)):
                with self._explained():
                    return self._describe(version, aliases)
        raise UserError(
            f"{uri} is not in the registry at {self.config.uri}; see `vlae registry show"
            f" name={name}`"
        )

    def download(self, name: str, version: int, folder: Path) -> Path:
        """Fetch a version's files into ``folder``; returns it, ready for ``vlae.load``.

        Only files that the registry has a checksum of are fetched. Raises UserError, naming the
        file, if one is missing or another.
        """
        with self._explained():
            found = self.client.get_model_version(name, str(version))
            source = self.client.get_model_version_download_uri(name, str(version))
            checksums = {
                key.removeprefix(CHECKSUM): tag
                for key, tag in found.tags.items()
                if key.startswith(CHECKSUM)
            }
        folder.mkdir(parents=True, exist_ok=True)
        for file, checksum in checksums.items():
            if not re.fullmatch(r"\w[\w.-]*", file):
                raise UserError(
                    f"{name} version {version} names a file {file!r}, which may lie anywhere;"
                    " nothing is read"
                )
            try:
                with self._explained():
                    fetched = mlflow.artifacts.download_artifacts(
                        artifact_uri=f"{source}/{file}",
                        dst_path=str(folder),
                        tracking_uri=self.config.uri,
                    )
            except UserError as error:
                raise UserError(
                    f"{file} of {name} version {version} cannot be read: {error}"
                ) from None
            if (digest := sha256_of_file(Path(fetched))) != checksum:
                raise UserError(
                    f"{source}/{file} is damaged or was replaced: it has sha256 {digest}, but was"
                    f" registered as {name} version {version} with {checksum}"
                )
        missing = set(MODEL_FILES) - checksums.keys()
        if missing:
            raise UserError(
                f"{name} version {version} was not registered by this program: it has no checksum"
                f" of {min(missing)}"
            )
        return folder

    # --- aliases ----------------------------------------------------------------------------------

    def set_alias(self, name: str, version: int, alias: str) -> None:
        """Give ``alias`` to a version. Raises UserError if there is no such version, or MLflow
        takes no such alias.
        """
        known = [int(each.version) for each, _ in self._all_versions(name)]
        if version not in known:
            raise UserError(
                f"{name} has no version {version}; it has {', '.join(map(str, sorted(known)))}"
            )
        if alias == "champion":
            with self._explained():
                self.crown(name, version)
            return
        try:
            self.client.set_registered_model_alias(name, alias, str(version))
        except MlflowException as error:
            raise UserError(
                f"alias={alias!r} cannot be given: {str(error).splitlines()[0]}"
            ) from None

    def crown(self, name: str, version: int, how: str = "promoted") -> None:
        """Make a version champion, and keep in a tag that it was; one that was challenger no longer
        is.

        Each change has a tag of its own, so that two at once do not lose one another's.
        """
        self.client.set_registered_model_tag(
            name, f"{CHAMPION}{time.time_ns():020d}", f"{how}:{version}"
        )
        self.client.set_registered_model_alias(name, "champion", str(version))
        if str(self.client.get_registered_model(name).aliases.get("challenger")) == str(version):
            self.client.delete_registered_model_alias(name, "challenger")

    def history(self, name: str) -> list[tuple[datetime, str, int]]:
        """How the champions of a model followed each other: when, ``promoted`` or ``rolled back``,
        and the version.
        """
        with self._explained():
            tags = self.client.get_registered_model(name).tags
        events = []
        for key, value in sorted(tags.items()):
            how, _, version = value.rpartition(":")
            if key.startswith(CHAMPION) and version.isdecimal():
                events.append(
                    (
                        datetime.fromtimestamp(int(key.removeprefix(CHAMPION)) / 1e9, UTC),
                        how,
                        int(version),
                    )
                )
        return events

    def roll_back(self, name: str) -> tuple[int, int]:
        """Make champion again what was before the present one; returns both versions, that first.

        Once more goes one further back. Raises UserError if there was none before.
        """
        known = {int(each.version): aliases for each, aliases in self._all_versions(name)}
        present = next(
            (version for version, aliases in known.items() if "champion" in aliases), None
        )
        line: list[int] = []
        for _, how, version in self.history(name):
            if how == "promoted":
                line.append(version)
            else:
                while line and line[-1] != version:
                    line.pop()
        before = next(
            (version for version in reversed(line) if version != present and version in known), None
        )
        if present is None or before is None:
            raise UserError(
                f"{name} has had no champion before the present one; `vlae registry show"
                f" name={name}` shows its versions"
            )
        with self._explained():
            self.crown(name, before, "rolled back")
        return before, present

    def log_evaluation(
        self, name: str, version: int, split: str, measured: Mapping[str, Any]
    ) -> None:
        """Keep an evaluation's figures with a version: its numbers, those in nested tables too, but
        no lists.
        """
        with self._explained():
            self._log(self.client.get_model_version(name, str(version)).run_id, split, measured)

    def _log(self, run_id: str, split: str, values: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)  # of several evaluations the latest counts
        self.client.log_batch(
            run_id,
            metrics=[
                Metric(key, value, now, 0) for key, value in _numbers(EVALUATED + split, values)
            ],
        )

    def _all_models(self) -> list[RegisteredModel]:
        found, token = [], None
        while True:
            page = self.client.search_registered_models(page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _all_versions(self, name: str) -> list[tuple[ModelVersion, list[str]]]:
        """Every version of a model, the newest first, with its aliases. Raises UserError if there
        is no such model.
        """
        with self._explained():
            versions = self._search(name)
            if not versions:
                known = ", ".join(model["name"] for model in self.models()) or "nothing yet"
                raise UserError(
                    f"the registry at {self.config.uri} holds no model named {name}; it holds"
                    f" {known}"
                )
            aliases = self.client.get_registered_model(name).aliases
        return [
            (
                version,
                sorted(
                    alias
                    for alias, number in aliases.items()
                    if str(number) == str(version.version)
                ),
            )
            for version in versions
        ]

    def _search(self, name: str) -> list[ModelVersion]:
        if not name or set(name) & set("/:'\""):
            raise UserError(
                f"{name!r} is no name for a registered model; use one without slashes, colons and"
                " quotes"
            )
        found = self.client.search_model_versions(f"name = '{name}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _describe(self, version: ModelVersion, aliases: list[str]) -> dict[str, Any]:
        data = self.client.get_run(version.run_id).data
        return {
            "name": version.name,
            "version": int(version.version),
            "aliases": aliases,
            "run": version.tags.get("run"),
            "tags": {
                key: value for key, value in version.tags.items() if not key.startswith(CHECKSUM)
            },
            "parameters": dict(data.params),
            "metrics": {
                key.removeprefix(EVALUATED): value
                for key, value in data.metrics.items()
                if key.startswith(EVALUATED)
            },
        }

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in a sentence what went wrong with the registry, or with the storage of its files."""
        try:
            yield
        except (
            MlflowException,
            SQLAlchemyError,
            Boto3Error,
            BotoCoreError,
            ClientError,
            OSError,
        ) as error:
            raise UserError(
                f"the registry at {self.config.uri} did not do as asked:"
                f" {str(error).splitlines()[0]}"
            ) from error


def gather(run: Storage, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fetch the model of a finished run and its evaluation into ``folder``; returns the records of
    its training and evaluation.

    Raises UserError if there is no model, or no evaluation of it.
    """
    for file in MODEL_FILES:
        run.download(f"model/{file}", folder / file)
    load(folder)
    evaluation = find_evaluation(run, sha256_of_file(folder / WEIGHTS_FILE))
    if evaluation is None:
        raise UserError(
            f"the model of {run.url} has not been evaluated; `vlae registry register name=NAME"
            f" runs=[{run.url}]` does both"
        )
    for picture in evaluation["pictures"]:
        file = picture.rpartition("/")[2]
        run.download(f"{EVALUATION}/{file}", folder / file)
    (folder / f"{EVALUATION}.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    return json.loads((folder / TRAINING_FILE).read_text()), evaluation


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers below a value of JSON, each named by its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, int | float):
        yield name, float(value)


@contextlib.contextmanager
def _at_most_seconds() -> Iterator[None]:
    """Have MLflow's client give up on a server within seconds, where by itself it would try for
    minutes; what the user set stands.
    """
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
