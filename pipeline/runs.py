"""Training runs: the files in a run's folder, publishing its model and opening it."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import vlae
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.config.sections import Binarization, StorageOptions
from pipeline.data import DataSet
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import ObjectNotFound, Storage
from pipeline.storage.resume import rereads
from pipeline.values import JsonObject
from vlae.files import MODEL_FILE, WEIGHTS_FILE

Metrics: TypeAlias = JsonObject
"""What a run measured, by name."""
Row: TypeAlias = dict[str, float]
"""A row of a run's log: what was measured after ``step`` steps, by name."""

IDENTITY = "identity.json"
"""The options that determine the run's weights, and the checksum of its data set's manifest."""
CONFIG = "config.json"
"""All options of the command that ran last."""
METRICS = "metrics"
"""The folder of the metrics log; see ``MetricReader``."""
RESULT = "result.json"
"""The result. It is written last: a run that has one is finished."""
CHECKPOINTS = "checkpoints"
"""The folder of checkpoints."""
RESTARTS = "restarts.json"
"""Why Ray restarted the run: a list of time, step and reason."""
TENSORBOARD = "tensorboard"
"""The folder of TensorBoard event files."""
MODEL = "model"
"""The folder of the final model."""
BEST = "best"
"""The folder with the model of the best validation, in a ``model`` folder."""
EVALUATION = "evaluation"
"""The folder with the evaluation that the run is registered with: ``result.json`` and pictures.

In a registered version, the file ``evaluation.json``.
"""

TRAINING_FILE = "training.json"
"""In a model's folder, the record of its training."""
MODEL_FILES = (MODEL_FILE, WEIGHTS_FILE, TRAINING_FILE)
"""The files of a model's folder."""


@dataclass(frozen=True)
class Run:
    """A training run: the storage of its folder, and what is kept there under which name.

    Picklable: pass it to workers as it is.
    """

    storage: Storage

    @classmethod
    def of(cls, config: TrainConfig) -> "Run":
        """The run of this configuration; its folder need not exist yet."""
        return cls.at(config.folder, config.storage.endpoint_url)

    @classmethod
    def at(cls, url: str, endpoint_url: str | None = None) -> "Run":
        """The run in the folder or at the storage address ``url``."""
        return cls(open_storage(url, endpoint_url))

    @property
    def url(self) -> str:
        """The address of its folder."""
        return self.storage.url

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.url.rpartition("/")[2]

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return self.storage.exists(RESULT)

    def result(self) -> JsonObject:
        """The result of a finished run."""
        result: JsonObject = self.storage.read_json(RESULT)
        return result

    def identity(self) -> JsonObject:
        """The options that determine its weights, and under ``manifest`` its data set's checksum.

        It exists once ``launch.check`` has passed.
        """
        identity: JsonObject = self.storage.read_json(IDENTITY)
        return identity

    def keep_options(self, config: TrainConfig) -> None:
        """Write all options of the command that works on it."""
        self.storage.write_json(CONFIG, to_dict(config))

    def rows(self) -> list[Row]:
        """The metrics that it has logged so far, row by row; none if it has not started."""
        return MetricReader(self.storage).rows()

    def restarts(self) -> list[JsonObject]:
        """Why it was restarted so far: ``time``, ``step`` and ``reason`` of each restart."""
        if not self.storage.exists(RESTARTS):
            return []
        restarts: list[JsonObject] = self.storage.read_json(RESTARTS)
        return restarts

    def publish(self, model: "vlae.VLAE", training: JsonObject) -> None:
        """Write a model, ready for ``vlae.load``, and the record of its training to ``model/``."""
        with tempfile.TemporaryDirectory() as folder:
            vlae.save(model, folder)
            record = training | {"weights": sha256_of_file(Path(folder) / WEIGHTS_FILE)}
            (Path(folder) / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
            for path in sorted(Path(folder).iterdir()):
                self.storage.upload(f"{MODEL}/{path.name}", path)

    def download(self, folder: Path) -> None:
        """Copy the files of its model into ``folder``.

        Raises UserError if one is missing, or the weights are damaged.
        """
        for file in (MODEL_FILE, TRAINING_FILE):
            self.storage.download(f"{MODEL}/{file}", folder / file)
        stated = self.storage.read_json(f"{MODEL}/{TRAINING_FILE}").get("weights")
        for _ in rereads(self.storage.is_remote):
            self.storage.download(f"{MODEL}/{WEIGHTS_FILE}", folder / WEIGHTS_FILE)
            actual = sha256_of_file(folder / WEIGHTS_FILE)
            if stated in (None, actual):  # none is stated by earlier versions of this program
                return
        raise UserError(
            f"{self.url}/{MODEL}/{WEIGHTS_FILE} is damaged: its sha256 is {actual}, the record of"
            f" its training says {stated}; put the file back from a copy, or train the run again"
        )

    def download_pictures(self, evaluation: JsonObject, folder: Path) -> None:
        """Download the pictures that the record of its evaluation names."""
        for picture in evaluation["pictures"]:
            file = picture.rpartition("/")[2]
            self.storage.download(f"{EVALUATION}/{file}", folder / file)

    def open(self) -> "OpenedModel":
        """Its model. Raises UserError if the run is not finished or the model is damaged."""
        if not self.storage.exists(f"{MODEL}/{TRAINING_FILE}"):
            raise UserError(
                f"{self.url} holds no finished model; give a run's folder, models:/NAME@ALIAS"
                " from the registry, or pretrained/NAME"
            )
        with tempfile.TemporaryDirectory() as folder:
            self.download(Path(folder))
            return OpenedModel.read(self.url, Path(folder))

    def evaluation(self, weights: str) -> JsonObject | None:
        """The record of its evaluation.

        None if there is none, if its pictures are missing, or if it measured a model with other
        ``weights`` (their sha256).
        """
        if not self.storage.exists(f"{EVALUATION}/{RESULT}"):
            return None
        found: JsonObject = self.storage.read_json(f"{EVALUATION}/{RESULT}")
        return found if found.get("weights") == weights and found["pictures"] else None


class MetricReader:
    """Reads a run's log of metrics, and reads nothing twice but the end of it.

    The log is written to the objects ``metrics/00000.jsonl``, ``metrics/00001.jsonl``, ... with one
    JSON object in each line: a row, or ``{"resumed": step}`` where a run was resumed from the
    checkpoint of that step, which voids the earlier rows of later steps. Objects are only added.
    Once the next one exists, an object does not change.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.number = 0
        """The number of the object that is read next, or again."""
        self._lines_read = 0  # of that object

    def rows(self) -> list[Row]:
        """The log from where the last call ended, without the rows that a resumed run voided."""
        rows: list[Row] = []
        for line in self._new_lines():
            if (resumed := line.get("resumed")) is not None:
                rows = [row for row in rows if row["step"] <= resumed]
                continue
            # A run that was resumed at its last step logs that step's rows again.
            place = len(rows)
            while place and rows[place - 1]["step"] >= line["step"]:
                place -= 1
                if rows[place].keys() == line.keys():
                    del rows[place]
            rows.append(line)
        return rows

    def _new_lines(self) -> list[Row]:
        number, lines_read, found = self.number, self._lines_read, list[Row]()
        while True:
            # Asked first: then the object that is read next is complete.
            is_complete = self.storage.exists(metrics_key(number + 1))
            try:
                lines = self.storage.read(metrics_key(number)).decode().splitlines()
            except ObjectNotFound:
                break
            found += map(json.loads, lines[lines_read:])
            lines_read = len(lines)
            if not is_complete:
                break
            number, lines_read = number + 1, 0
        # At the end: an error above loses no line.
        self.number, self._lines_read = number, lines_read
        return found


def metrics_key(number: int) -> str:
    """The key of an object of the metrics log."""
    return f"{METRICS}/{number:05d}.jsonl"


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready for use, and where it comes from."""

    reference: str
    """A run's address, or ``models:/...``."""
    network: "vlae.VLAE"
    training: JsonObject
    """The record of its training."""
    weights: str
    """The sha256 of its weights' file."""
    version: tuple[str, int] | None = None
    """Name and number in the registry, if it comes from there."""

    @classmethod
    def read(
        cls, reference: str, folder: Path, version: tuple[str, int] | None = None
    ) -> "OpenedModel":
        """The model whose files are in ``folder``. Raises UserError if they are no model's."""
        training = json.loads((folder / TRAINING_FILE).read_text())
        weights = sha256_of_file(folder / WEIGHTS_FILE)
        return cls(reference, load(folder), training, weights, version)

    @property
    def is_nested(self) -> bool:
        """Whether it was trained with codes of which only the first latents are sent."""
        return bool(self.training["config"]["train"].get("nested"))

    @property
    def binarization(self) -> Binarization:
        return Binarization[self.training["config"]["dataset"]["binarization"]]


def load(folder: Path) -> "vlae.VLAE":
    """The model in a folder, in float32. Raises UserError if there is none, or it is damaged."""
    try:
        return vlae.load(folder).float()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def open_data(model: OpenedModel, url: str | None, storage: StorageOptions) -> DataSet:
    """The data set at ``url``, by default that of the model's training.

    Raises UserError if there is none, or its images have another shape or other pixels than the
    model's.
    """
    url = url or model.training["config"]["dataset"].get("url")
    if url is None:
        raise UserError(f"{model.reference} does not say where its images are; give dataset_url=")
    data = DataSet.open(url, storage.endpoint_url)
    if tuple(data.manifest.image_shape) != tuple(model.network.image_shape):
        raise UserError(
            f"{model.reference} was made for images of shape {model.network.image_shape}, but those"
            f" of {data.storage.url} are {data.manifest.image_shape}"
        )
    if data.manifest.pixels == "binary" and model.binarization is Binarization.none:
        raise UserError(
            f"{model.reference} was made for images of 256 values, but those of {data.storage.url}"
            " are black and white"
        )
    return data


def check_pixels(data: DataSet, binarization: Binarization) -> None:
    """Raise UserError unless a model that sees pixels like this suits the images of ``data``."""
    contents = data.manifest
    if binarization is Binarization.auto:
        raise UserError(
            f"data set {contents.name} did not exist when the options were loaded; load them again"
        )
    if contents.image_shape[0] > 1 and binarization is not Binarization.none:
        raise UserError(
            f"dataset.binarization={binarization.value} makes pixels black or white, but the images"
            f" of data set {contents.name} are in colour; leave it out"
        )
    if contents.pixels == "binary" and binarization is Binarization.none:
        raise UserError(
            "dataset.binarization=none is for images of 256 values, but those of data set"
            f" {contents.name} are black and white; leave it out"
        )


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
