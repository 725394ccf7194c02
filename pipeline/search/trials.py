"""The trials of a search: their records in storage, and the table of results."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self, TypeAlias

from pipeline.config.compose import build
from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.config.search import TuneConfig
from pipeline.errors import UserError
from pipeline.search.proposals import propose
from pipeline.search.trial import Point, Status, Trial
from pipeline.storage.base import Storage
from pipeline.storage.recipe import begin_named
from pipeline.storage.uploads import retry
from pipeline.training import launch
from pipeline.values import JsonObject

RECORD = "search.json"

Row: TypeAlias = Mapping[str, Any]
"""A row of the table of trials, see ``table``."""


def check(config: TuneConfig, storage: Storage) -> None:
    """Raise UserError unless the data set is there and fits every model that is tried, and the
    search's name is not another's.
    """
    for key, values in config.search.axes.items():
        for value in values:
            data = launch.check_data(trial_config(config, {key: value}))
    if "probe_accuracy" in config.search.goals.quantities and (data.manifest.num_classes or 0) < 2:
        raise UserError(
            f"probe_accuracy is searched for, but the images of {config.dataset.url} have no"
            " labels; use other objectives"
        )
    wanted = {**config.search_identity(), "manifest": data.manifest.digest}
    begin_named(storage, RECORD, wanted, f"search {config.search_name}")


def trial_config(config: TuneConfig, point: Point) -> TrainConfig:
    """The training run of ``point``, whose options override the search's own.

    The run's name is made of the search's name and the point's values.
    """
    values = to_dict(config)
    base = {item.name: values[item.name] for item in fields(TrainConfig)}
    tried = re.sub(
        r"[^\w.-]", "", "-".join(f"{key.partition('.')[2]}{value}" for key, value in point.items())
    )  # 1e+30
    return build(TrainConfig, base, {**point, "name": f"{config.search_name}-{tried}"})


@dataclass
class Trials:
    """All trials of a search and the time they took. Each trial has its own object in storage."""

    config: TuneConfig
    storage: Storage
    rows: list[Trial]
    interrupted: list[Trial] = field(init=False)
    """Unfinished trials of an earlier attempt, which run first."""

    @classmethod
    def load(cls, config: TuneConfig, storage: Storage) -> Self:
        """Load the trials of earlier attempts.

        Raises UserError if a record is none that this search wrote.
        """
        rows = []
        for key in retry(partial(storage.list, "trials/")):
            record = retry(partial(storage.read_json, key))
            try:
                trial = Trial.from_json(record)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{storage.url}/{key} is no record of a trial ({error}); delete it"
                ) from None
            # Its point becomes a configuration: it must hold the search's own values alone.
            axes = config.search.axes
            tried = trial.point if isinstance(trial.point, dict) else {}
            if tried.keys() != axes.keys() or not all(
                any(type(value) is type(each) and value == each for each in axes[option])
                for option, value in tried.items()
            ):
                raise UserError(
                    f"{storage.url}/{key} is damaged or forged: its point {trial.point} is none of"
                    " this search; delete it"
                )
            rows.append(trial)
        return cls(config, storage, rows)

    def __post_init__(self) -> None:
        self.interrupted = [row for row in self.rows if row.status is Status.running]
        self.spent = max((row.search_seconds for row in self.rows), default=0.0)
        self.began = time.monotonic()
        self.clocks: dict[int, float] = {}

    def next(self) -> Trial | None:
        """The trial to run next, to be passed to ``begin``.

        None if every point has been tried or the budget is used up.
        """
        if self.exhausted():
            return None
        if self.interrupted:
            return self.interrupted[0]
        search = self.config.search
        point = (
            propose(search, self.config.train.seed, self.rows)
            if len(self.rows) < search.num_trials
            else None
        )
        if point is None:
            return None
        name = trial_config(self.config, point).run_name
        number = max((row.number for row in self.rows), default=0) + 1
        return Trial(number, point, name)

    def numbered(self, number: int) -> Trial:
        """The trial with this number."""
        return next(row for row in self.rows if row.number == number)

    def begin(self, row: Trial) -> None:
        """Begin a trial that ``next`` returned, and write its record."""
        if self.interrupted:
            self.interrupted.remove(row)
        else:
            self.rows.append(row)
        self.save(row)

    def give_again(self, row: Trial) -> bool:
        """Let a trial that was lost be the next one, unless that happened too often.

        Returns whether it will be; its record then counts one more failure.
        """
        if row.failures >= self.config.cluster.max_failures:
            return False
        row.failures += 1
        self.interrupted.append(row)
        self.save(row)
        return True

    def may_give_again(self) -> bool:
        """Whether a trial that runs may be lost and given again."""
        return not self.exhausted() and any(row.status is Status.running for row in self.rows)

    def save(self, row: Trial) -> None:
        """Update a trial's times and write its record."""
        now = time.monotonic()
        row.search_seconds = self.seconds()
        row.seconds += now - self.clocks.get(row.number, now)
        self.clocks[row.number] = now
        record = row.to_json()
        retry(partial(self.storage.write_json, f"trials/{row.number:04d}.json", record))

    def seconds(self) -> float:
        """How long this search has run, including its earlier attempts."""
        return self.spent + time.monotonic() - self.began

    def exhausted(self) -> bool:
        """Whether the hours or core-hours of the search are used up."""
        search, workers = self.config.search, self.config.cluster
        hours = self.seconds() / 3600
        core_hours = (
            sum(row.seconds for row in self.rows)
            * workers.max_workers
            * workers.cpus_per_worker
            / 3600
        )
        return (search.hours is not None and hours >= search.hours) or (
            search.core_hours is not None and core_hours >= search.core_hours
        )


def describe(point: Point) -> str:
    """Format a point of the space: ``window 5x2, latents 16, flow_depth 2``."""
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in point.items())


def table(config: TuneConfig, rows: Sequence[Trial]) -> list[JsonObject]:
    """A flat row for each trial, the best first.

    Finished trials come first, then those stopped early, unfinished and failed. A finished trial's
    row has its measurements; any other row has the figures of its last validation. ``front`` is the
    number of the Pareto front, from 1 for the best; ``feasible`` says whether all constraints are
    satisfied.
    """
    goals = config.search.goals

    def flat(row: Trial) -> JsonObject:
        last = row.curve[-1] if row.curve else {}
        known = row.values if row.status is Status.finished else last
        record = row.to_json()
        names = ("number", "run", "status", "images", "seconds", "failures", "error")
        return {**row.point, **(known or {}), **{n: record[n] for n in names if n in record}}

    by_status = {status: [flat(row) for row in rows if row.status is status] for status in Status}
    fronts = goals.ranked(by_status[Status.finished])
    best = [
        {**row, "front": number, "feasible": goals.violation(row) == 0}
        for number, front in enumerate(fronts, 1)
        for row in front
    ]
    stopped = [row for front in goals.ranked(by_status[Status.stopped]) for row in front]
    stopped += [row for row in by_status[Status.stopped] if row not in stopped]
    return [*best, *stopped, *by_status[Status.running], *by_status[Status.failed]]


def shortfall(config: TuneConfig, rows: Sequence[Row]) -> str | None:
    """Why fewer models are registered than ``register_best`` asks for; None if as many are.

    ``rows``: the table of trials.
    """
    finished = [row for row in rows if is_finished(row)]
    kept, wanted = sum(row["feasible"] for row in finished), config.register_best
    constraints = " and ".join(config.search.constraints)
    if kept >= wanted:
        return None
    if not finished:
        return "no trial ran to its end: nothing is registered"
    if not kept:
        return f"no finished trial keeps {constraints}: nothing is registered"
    reason = f"{len(finished)} of {len(rows)} trials ran to their end"
    if kept < len(finished):
        reason += f", and {kept} of these {'keeps' if kept == 1 else 'keep'} {constraints}"
    return f"{kept} of {wanted} models are registered: {reason}"


def is_finished(row: Row) -> bool:
    """Whether a row of the table belongs to a finished trial."""
    return bool(row["status"] == Status.finished.value)
