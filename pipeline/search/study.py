"""A search as an Optuna study in a SQLite file, which ``optuna-dashboard`` opens."""

import tempfile
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.config.search import TuneConfig
from pipeline.search.proposals import known
from pipeline.search.trial import Status, Trial

STUDY = "study.db"
"""The name of the file in a search's folder."""
STATES = {
    Status.finished: TrialState.COMPLETE,
    Status.stopped: TrialState.PRUNED,
    Status.failed: TrialState.FAIL,
    Status.running: TrialState.RUNNING,
}


def archive(config: TuneConfig, trials: Sequence[Trial]) -> bytes:
    """The study as a SQLite file, named as the search.

    A trial has its measurements and its run as user attributes, and with a single objective its
    validations as intermediate values. Its times are those of the search's clock, which stands
    still between two attempts; the last record was written now.
    """
    search = config.search
    seen = known(search, search.goals, trials)
    ended = max((trial.search_seconds for trial in trials), default=0.0)
    began = datetime.now() - timedelta(seconds=ended)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STUDY
        storage = RDBStorage(f"sqlite:///{path}")
        study = optuna.create_study(
            storage=storage, study_name=config.search_name, directions=seen.directions
        )
        with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
            study.set_metric_names([each.name for each in search.goals.objectives])
        for trial, frozen in zip(trials, seen.trials, strict=True):
            study.add_trial(_complete(config, trial, frozen, began))
        storage.remove_session()
        storage.engine.dispose()
        return path.read_bytes()


def _complete(
    config: TuneConfig, trial: Trial, frozen: FrozenTrial, began: datetime
) -> FrozenTrial:
    """The trial that Optuna's sampler knows, with all that a person wants to see of it."""
    objectives = config.search.goals.objectives
    frozen.state = STATES[trial.status]
    over = began + timedelta(seconds=trial.search_seconds)
    frozen.datetime_start = over - timedelta(seconds=trial.seconds)
    frozen.datetime_complete = None if trial.status is Status.running else over
    if len(objectives) == 1:
        name = objectives[0].name
        frozen.intermediate_values = {
            int(entry["images"]): entry[name] for entry in trial.curve if name in entry
        }
    # The dashboard reads constraints in Optuna's earlier form: a list.
    frozen.system_attrs = (
        {"constraints": list(frozen.constraints.values())} if frozen.constraints else {}
    )
    told = {"trial": trial.number, "run": trial.run, "images": trial.images, "error": trial.error}
    frozen.user_attrs = {
        name: value for name, value in {**told, **(trial.values or {})}.items() if value is not None
    }
    return frozen
