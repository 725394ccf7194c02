"""What MLflow 3 shows of a run besides its figures: the data set it read, and its model.

A run's data set is an *input*, and a registered model is a *LoggedModel*, the run's *output*.
Figures that name both fill the columns of MLflow's tables of runs and of models.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel, Metric
    from mlflow.entities import Run as MlflowRun

DIGEST_LENGTH = 36
"""The most characters that MLflow keeps of a data set's digest."""
SOURCES = {"s3": "s3", "http": "http", "https": "http"}
"""MLflow's names of the kinds of places that data lies in; everything else is local."""


class Data(NamedTuple):
    """A data set as MLflow tracks it."""

    name: str
    url: str
    digest: str
    """The sha256 of its manifest. MLflow keeps the first ``DIGEST_LENGTH`` characters."""

    @property
    def of_metric(self) -> dict[str, str]:
        """The arguments with which a metric names the data set that it was measured on."""
        return {"dataset_name": self.name, "dataset_digest": self.digest[:DIGEST_LENGTH]}


def data_input(data: Data) -> "DatasetInput":
    """The data set as the input of a training run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kept = Dataset(
        name=data.name,
        digest=data.digest[:DIGEST_LENGTH],
        source_type=SOURCES.get(data.url.partition("://")[0], "local"),
        source=json.dumps({"uri": data.url}),
        profile=json.dumps({"manifest_sha256": data.digest}),
    )
    return DatasetInput(kept, [InputTag("mlflow.data.context", "training")])


def metrics(
    name: str, values: Mapping[str, Any], model_id: str | None, data: Data | None = None
) -> "list[Metric]":
    """The numbers in an evaluation, nested ones too, as metrics of a model on a data set.

    A metric's name is ``name`` and the path to its value.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)  # MLflow shows the newest value of a metric
    linked: dict[str, Any] = {"model_id": model_id, **(data.of_metric if data else {})}
    return [Metric(key, value, now, 0, **linked) for key, value in _flatten(name, values)]


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a JSON value, each with its path as its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{name}/{key}", item)
    elif isinstance(value, int | float):
        yield name, float(value)


def log_model(
    client: "MlflowClient", run: "MlflowRun", name: str, parameters: Mapping[str, Any]
) -> "LoggedModel":
    """Create the LoggedModel of a run, still without files, as the run's output."""
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(
        run.info.experiment_id,
        re.sub(r"""[/:.%"']""", "-", name),
        source_run_id=run.info.run_id,
        params={key: str(value) for key, value in parameters.items()},
        model_type="VLAE",
    )
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    return model


def link(client: "MlflowClient", model_id: str, name: str, version: int | str) -> None:
    """Tell a LoggedModel which registered version it is, as MLflow's ``register_model`` does."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    versions = json.dumps([{"name": name, "version": str(version)}])
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: versions})
