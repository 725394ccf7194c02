"""The model registry, on MLflow: by default a SQLite file, or a server that a team shares.

A version holds a model as safetensors and JSON, the records of its training and evaluation, its
pictures and a model card. It is created after all of its files are in place. The registry keeps
the sha256 of each file, and every download is checked against it. Nothing is unpickled or executed,
and loading needs neither Ray nor the training code.
"""

import contextlib
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
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import sections
from pipeline.errors import UserError
from pipeline.registry import bom, champions, files, lineage, signing
from pipeline.registry.champions import PROMOTED, ROLLED_BACK, ChampionChange
from pipeline.registry.summaries import ModelSummary, Verification, Version
from pipeline.registry.tracking import (
    Connection,
    ignore_existing,
    short_timeouts,
    training_run,
)
from pipeline.runs import MODEL_FILES, Run, sha256_of_file
from vlae.files import WEIGHTS_FILE

CHECKSUM = "sha256."
"""The prefix of a version's tags that hold the checksums of its files."""
MODEL_ID = "model_id"
"""A version's tag with the id of its LoggedModel."""
EVALUATED = "evaluation/"
"""The prefix of the metrics that evaluations measured; the others are from training."""


class Registry:
    """Registered models and their versions. Raises UserError if the registry cannot be reached."""

    def __init__(self, config: sections.RegistryOptions) -> None:
        self.config = config
        signing.check()
        bom.check_license(config.license)
        try:
            with short_timeouts():
                self.connection = Connection(config)
                self.client = self.connection.client
                self.client.search_registered_models(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"the registry at {config.uri} does not answer: {str(error).splitlines()[0]}; check"
                " registry.uri"
            ) from None

    def register(self, name: str, run: Run) -> int:
        """Make the evaluated model of a finished run the newest version of ``name``.

        Returns the version's number. The first version becomes ``champion``, later ones
        ``challenger``. A model is registered once: the second time, the existing version is
        returned. Leftovers of an interrupted registration are harmless: the version is created
        after its files. Raises UserError if the run has no model, or the model was not evaluated.
        """
        with tempfile.TemporaryDirectory() as place, self.user_errors():
            folder = Path(place)
            training, evaluation = files.collect(run, folder)
            weights = sha256_of_file(folder / WEIGHTS_FILE)
            if known := self._find_registered(name, run.url, weights):
                self._ensure_alias(name, known[0])
                return known[0]
            tracked = training_run(run, training["config"], training["manifest"])
            run_id = self.connection.sync(tracked)
            if not tracked.finished:
                self.connection.end(tracked, "FINISHED")
            kept, split = self.client.get_run(run_id), evaluation["split"]
            model = lineage.log_model(self.client, kept, name, tracked.parameters)
            measured = lineage.metrics(
                EVALUATED + split, evaluation[split], model.model_id, tracked.data
            )
            self.client.log_batch(run_id, metrics=measured)
            search = kept.data.tags.get("mlflow.parentRunId")
            tags = {"run": run.url, "run_id": run_id, "manifest": training["manifest"]}
            tags["code_version"] = kept.data.tags["code_version"]
            if search:
                tags |= {"search": search, "search_name": self.client.get_run(search).info.run_name}
            finished = datetime.fromtimestamp(kept.info.end_time // 1000, UTC)
            checksums = files.complete(
                folder, name, training, evaluation, tags, finished, self.config
            )
            self.client.log_model_artifacts(model.model_id, str(folder))
            self.client.finalize_logged_model(model.model_id, "READY")
            with ignore_existing():
                self.client.create_registered_model(name)
            created = self.client.create_model_version(
                name,
                model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                tags=tags
                | {MODEL_ID: model.model_id}
                | {CHECKSUM + file: digest for file, digest in checksums.items()},
            )
            lineage.link(self.client, model.model_id, name, created.version)
            # Duplicates arise if two people register a run at once, or a client repeats a request
            # whose answer was lost. The first version stays.
            first, *others = self._find_registered(name, run.url, weights)
            for other in others:
                with contextlib.suppress(MlflowException):  # its creator may have deleted it
                    self.client.delete_model_version(name, str(other))
            self._ensure_alias(name, first, new=True)
            return first

    def _find_registered(self, name: str, url: str, weights: str) -> list[int]:
        """The versions made from these weights of this run, the oldest first.

        If versions are signed, those without a signature do not count.
        """
        wanted = {"run": url, CHECKSUM + WEIGHTS_FILE: weights}
        signature = {CHECKSUM + signing.SIGNATURE_FILE} if signing.signs() else set()
        return [
            int(each.version)
            for each in reversed(self._search(name))
            if wanted.items() <= each.tags.items() and signature <= each.tags.keys()
        ]

    def _ensure_alias(self, name: str, number: int, new: bool = False) -> None:
        """Give a version the alias that a new version gets.

        An interrupted registration may have created the version without its alias.
        """
        aliases = self.client.get_registered_model(name).aliases
        if "champion" not in aliases:
            self.set_champion(name, number)
        elif str(aliases["champion"]) != str(number) and (new or "challenger" not in aliases):
            self.client.set_registered_model_alias(name, "challenger", str(number))

    # --- reading ----------------------------------------------------------------------------------

    def models(self) -> list[ModelSummary]:
        """Every registered model."""
        with self.user_errors():
            return [
                ModelSummary(model.name, len(self._search(model.name)), model.aliases)
                for model in self._all_models()
            ]

    def versions(self, name: str) -> list[Version]:
        """Every version of a model, the newest first.

        Raises UserError if there is no such model.
        """
        with self.user_errors():
            return [
                self._describe(version, aliases) for version, aliases in self._all_versions(name)
            ]

    def resolve(self, uri: str) -> Version:
        """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER`` refers to.

        Raises UserError if there is none.
        """
        reference = uri.removeprefix("models:/")
        name, _, alias = reference.partition("@")
        name, _, number = name.partition("/")
        for version, aliases in self._all_versions(name):
            if (alias in aliases) if alias else (number == str(version.version)):
                with self.user_errors():
                    return self._describe(version, aliases)
        raise UserError(
            f"{uri} is not in the registry at {self.config.uri}; see `vlae registry show"
            f" name={name}`"
        )

    def download(self, name: str, version: int, folder: Path) -> Path:
        """Download a version's files into ``folder``; returns it, ready for ``vlae.load``.

        Files without a checksum in the registry are not downloaded. Raises UserError, naming the
        file, if one is missing or does not match its checksum, and if a key to verify with is
        configured and the signature does not fit.
        """
        for problem in self._fetch(name, version, folder):
            raise UserError(problem)
        return folder

    def verify(self, name: str, version: int) -> Verification:
        """Hold every file of a version to its checksum, and all to the signature."""
        with tempfile.TemporaryDirectory() as place:
            problems = list(self._fetch(name, version, Path(place)))
            found = {path.name: path.stat().st_size for path in sorted(Path(place).iterdir())}
        return Verification(
            version, found, signing.SIGNATURE_FILE in found, signing.verifies(), problems
        )

    def _fetch(self, name: str, version: int, folder: Path) -> Iterator[str]:
        """Download a version's files into ``folder``; yields a sentence for whatever is wrong."""
        with self.user_errors():
            found = self.client.get_model_version(name, str(version))
            source = self.client.get_model_version_download_uri(name, str(version))
        checksums = {
            key.removeprefix(CHECKSUM): tag
            for key, tag in found.tags.items()
            if key.startswith(CHECKSUM)
        }
        title = f"{name} version {version}"
        folder.mkdir(parents=True, exist_ok=True)
        for file, checksum in checksums.items():
            if not re.fullmatch(r"\w[\w.-]*", file):
                yield f"{title} names a file {file!r}, which may be outside its folder"
                return
            try:
                with self.user_errors():
                    fetched = mlflow.artifacts.download_artifacts(
                        artifact_uri=f"{source}/{file}",
                        dst_path=str(folder),
                        tracking_uri=self.config.uri,
                    )
            except UserError as error:
                yield f"{file} of {title} cannot be read: {error}"
                continue
            if (digest := sha256_of_file(Path(fetched))) != checksum:
                yield (
                    f"{source}/{file} is damaged or was replaced: it has sha256 {digest}, but"
                    f" {title} was registered with {checksum}"
                )
        if missing := set(MODEL_FILES) - checksums.keys():
            yield (
                f"{title} was not registered by this program: it has no checksum of {min(missing)}"
            )
        try:
            signing.verify(folder, name)
        except UserError as error:
            yield f"{title} is not trusted: {error}"

    # --- aliases ----------------------------------------------------------------------------------

    def set_alias(self, name: str, version: int, alias: str) -> None:
        """Give ``alias`` to a version.

        Raises UserError if there is no such version, or MLflow does not accept the alias.
        """
        known = [int(each.version) for each, _ in self._all_versions(name)]
        if version not in known:
            raise UserError(
                f"{name} has no version {version}; it has {', '.join(map(str, sorted(known)))}"
            )
        if alias == "champion":
            with self.user_errors():
                self.set_champion(name, version)
            return
        try:
            self.client.set_registered_model_alias(name, alias, str(version))
        except MlflowException as error:
            raise UserError(
                f"alias={alias!r} is not possible: {str(error).splitlines()[0]}"
            ) from None

    def set_champion(self, name: str, version: int, how: str = PROMOTED) -> None:
        """Make a version champion, and record that in a tag. It stops being the challenger.

        The alias decides who is champion, so it comes first: a tag alone would make a later
        rollback return to a version that never was. A champion whose tag is missing gets it now.
        """
        model, now = self.client.get_registered_model(name), time.time_ns()
        current = model.aliases.get("champion")
        if current is not None and champions.last(champions.read(model.tags)) != int(current):
            self.client.set_registered_model_tag(
                name, *champions.tag(now - 1, PROMOTED, int(current))
            )
        self.client.set_registered_model_alias(name, "champion", str(version))
        self.client.set_registered_model_tag(name, *champions.tag(now, how, version))
        if str(self.client.get_registered_model(name).aliases.get("challenger")) == str(version):
            self.client.delete_registered_model_alias(name, "challenger")

    def champion(self, name: str) -> int | None:
        """The number of a model's champion, if it has one."""
        with self.user_errors():
            number = self.client.get_registered_model(name).aliases.get("champion")
        return None if number is None else int(number)

    def history(self, name: str) -> list[ChampionChange]:
        """Every change of a model's champion, the oldest first."""
        with self.user_errors():
            return champions.read(self.client.get_registered_model(name).tags)

    def roll_back(self, name: str) -> tuple[int, int]:
        """Make the previous champion champion again; returns its number and the current one's.

        Repeated calls go further back. Raises UserError if there was no earlier champion.
        """
        known = {int(each.version): aliases for each, aliases in self._all_versions(name)}
        current = next(
            (version for version, aliases in known.items() if "champion" in aliases), None
        )
        previous = champions.previous(self.history(name), current, known)
        if current is None or previous is None:
            raise UserError(
                f"{name} has had no champion before the current one; `vlae registry show"
                f" name={name}` shows its versions"
            )
        with self.user_errors():
            self.set_champion(name, previous, ROLLED_BACK)
        return previous, current

    def log_evaluation(
        self, name: str, version: int, split: str, measured: Mapping[str, Any]
    ) -> None:
        """Record the numbers of an evaluation with a version, nested ones too, but no lists."""
        with self.user_errors():
            found = self.client.get_model_version(name, str(version))
            metrics = lineage.metrics(EVALUATED + split, measured, found.tags.get(MODEL_ID))
            self.client.log_batch(found.run_id, metrics=metrics)

    def _all_models(self) -> list[RegisteredModel]:
        found, token = [], None
        while True:
            page = self.client.search_registered_models(page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _all_versions(self, name: str) -> list[tuple[ModelVersion, list[str]]]:
        """Every version of a model with its aliases, the newest first.

        Raises UserError if there is no such model.
        """
        with self.user_errors():
            versions = self._search(name)
            if not versions:
                known = ", ".join(model.name for model in self.models()) or "nothing yet"
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
                f"{name!r} cannot be the name of a registered model; use one without slashes,"
                " colons and quotes"
            )
        found = self.client.search_model_versions(f"name = '{name}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _describe(self, version: ModelVersion, aliases: list[str]) -> Version:
        data, tags = self.client.get_run(version.run_id).data, version.tags
        return Version(
            name=version.name,
            number=int(version.version),
            aliases=aliases,
            run=tags.get("run"),
            tags={key: value for key, value in tags.items() if not key.startswith(CHECKSUM)},
            parameters=dict(data.params),
            metrics={
                key.removeprefix(EVALUATED): value
                for key, value in data.metrics.items()
                if key.startswith(EVALUATED)
            },
        )

    @contextlib.contextmanager
    def user_errors(self) -> Iterator[None]:
        """Turn errors of the registry, and of the storage of its files, into a UserError."""
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
                f"the registry at {self.config.uri} reported an error: {str(error).splitlines()[0]}"
            ) from error
