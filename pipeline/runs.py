"""Training runs: the names of the files in a run's folder, publishing a model and opening it."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlae
from pipeline.config import sections
from pipeline.config.run import TrainConfig
from pipeline.data import DataSet
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.values import JsonObject
from vlae.factory import MODEL_FILE, WEIGHTS_FILE

RESULT = "result.json"
METRICS = "metrics.jsonl"
TRAINING_FILE = "training.json"

Metrics = dict[str, Any]


def run_storage(config: TrainConfig) -> Storage:
    """Where a run keeps its checkpoints, metrics, model and result."""
    return open_storage(
        f"{config.storage.root}/runs/{config.run_name}", config.storage.endpoint_url
    )


def publish(run: Storage, model: vlae.VLAE, training: Metrics) -> None:
    """Put a model, ready for ``vlae.load``, under ``model/`` of the run, with a record of its
    training beside it.
    """
    with tempfile.TemporaryDirectory() as folder:
        vlae.save(model, folder)
        (Path(folder) / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n")
        for path in sorted(Path(folder).iterdir()):
            run.upload(f"model/{path.name}", path)


def read_rows(storage: Storage) -> list[dict[str, float]]:
    """The rows that a run has logged so far; none if it has not started."""
    if not storage.exists(METRICS):
        return []
    return [json.loads(line) for line in storage.read(METRICS).decode().splitlines()]


MODEL_FILES = (MODEL_FILE, WEIGHTS_FILE, TRAINING_FILE)
EVALUATION = "evaluation"
"""The folder of a run with the evaluation that it is registered with: ``result.json`` and pictures.
In a version, ``evaluation.json``.
"""


def find_evaluation(run: Storage, weights: str) -> dict[str, Any] | None:
    """The record of the evaluation that a run keeps of its model; none if there is none with
    pictures, or of other weights.
    """
    if not run.exists(f"{EVALUATION}/result.json"):
        return None
    found: dict[str, Any] = run.read_json(f"{EVALUATION}/result.json")
    return found if found.get("weights") == weights and found["pictures"] else None


def load(folder: Path) -> vlae.VLAE:
    """The model in a folder. Raises UserError if it is none."""
    try:
        return vlae.load(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class OpenedModel:
    """A model for use, and where it is from."""

    reference: str
    network: vlae.VLAE
    training: dict[str, Any]
    weights: str  # sha256
    version: dict[str, Any] | None  # in the registry, if it is from there

    @property
    def binarization(self) -> sections.Binarization:
        return sections.Binarization[self.training["config"]["dataset"]["binarization"]]


def open_run(run: Storage) -> OpenedModel:
    """The model of a finished run. Raises UserError if there is none, or it is damaged."""
    if not run.exists(f"model/{TRAINING_FILE}"):
        raise UserError(
            f"{run.url} holds no finished model; give a run's folder, or models:/NAME@ALIAS from "
            "the registry"
        )
    with tempfile.TemporaryDirectory() as place:
        for file in MODEL_FILES:
            run.download(f"model/{file}", Path(place) / file)
        return opened(run.url, Path(place))


def opened(reference: str, folder: Path, version: JsonObject | None = None) -> OpenedModel:
    """The model whose files are in ``folder``. Raises UserError if they are not a model's."""
    training = json.loads((folder / TRAINING_FILE).read_text())
    return OpenedModel(
        reference, load(folder), training, sha256_of_file(folder / WEIGHTS_FILE), version
    )


def open_data(model: OpenedModel, url: str | None, storage: sections.StorageOptions) -> DataSet:
    """The data set at ``url``, by default that of the model's training.

    Raises UserError if there is none, or its images have another shape than the model's.
    """
    url = url or str(model.training["config"]["dataset"]["url"])
    data = DataSet.load(open_storage(url, storage.endpoint_url))
    if tuple(data.manifest.image_shape) != tuple(model.network.image_shape):
        raise UserError(
            f"{model.reference} was made for images of shape {model.network.image_shape}, but those"
            f" of {data.storage.url} are {data.manifest.image_shape}"
        )
    return data


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
