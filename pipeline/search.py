"""How a search chooses its next trial: Optuna's samplers over the finite space of ``search``, without repeats."""

import itertools
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipeline.config import Search
from pipeline.config import Searcher as Sampler

SEARCHED = {"model.window": "windows", "model.latents": "latents", "model.flow_depth": "flow_depths"}
"""Each searched option, and the option of ``search`` that lists its values."""

ATTEMPTS = 32
"""How often the sampler may propose something already tried before an untried point is drawn at random."""


class OptunaSearcher(Searcher):
    """Proposes points of the space, each once: a trial is deterministic, so that a repeat would teach nothing.

    A trial that the scheduler stopped early is told to Optuna as pruned, with its values on the way, so that it is compared with others
    at the same number of images. The searcher keeps no state of its own on disk: a search that is started again proposes afresh.
    """

    def __init__(self, search: Search, metric: str, budget: int, seed: int, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """``metric`` is minimised; a trial is complete if it has seen ``budget`` images.

        ``earlier`` trials are known from the start, and not proposed again: rows with their point's options, ``metric`` and ``images``.
        """
        super().__init__(metric=metric, mode="min")
        self.budget = budget
        self.space = {key: list(dict.fromkeys(getattr(search, name))) for key, name in SEARCHED.items()}
        points = [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]
        random.Random(seed).shuffle(points)
        self.untried = {_key(point): point for point in points}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        startup = min(10, max(1, search.num_trials // 2))
        self.study = optuna.create_study(
            sampler=optuna.samplers.RandomSampler(seed)
            if search.searcher is Sampler.random
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        )
        self.asked: dict[str, optuna.Trial] = {}
        for row in earlier:
            self._learn(row)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next point, as dotted options; FINISHED when all have been proposed."""
        if not self.untried:
            return Searcher.FINISHED
        for attempt in range(ATTEMPTS):
            if attempt == ATTEMPTS - 1:
                self.study.enqueue_trial(next(iter(self.untried.values())))
            trial = self.study.ask(self._distributions())
            if self.untried.pop(_key(trial.params), None):
                self.asked[trial_id] = trial
                return trial.params
            self.study.tell(trial, state=TrialState.FAIL)
        raise AssertionError("an enqueued point is proposed as it is")

    def _learn(self, row: Mapping[str, Any]) -> None:
        point = {key: row[key] for key in self.space}
        if self.untried.pop(_key(point), None) is None:
            return  # the space is another now
        finished = row["images"] >= self.budget
        self.study.add_trial(
            optuna.trial.create_trial(
                params=point,
                distributions=self._distributions(),
                value=row[self.metric] if finished else None,
                intermediate_values={} if finished else {row["images"]: row[self.metric]},
                state=TrialState.COMPLETE if finished else TrialState.PRUNED,
            )
        )

    def _distributions(self) -> dict[str, CategoricalDistribution]:
        return {key: CategoricalDistribution(values) for key, values in self.space.items()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.asked[trial_id].report(result[self.metric], result["images"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.asked.pop(trial_id)
        if error or not result or self.metric not in result:
            self.study.tell(trial, state=TrialState.FAIL)
        elif result["images"] < self.budget:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, result[self.metric])

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is continued from its trials' own runs")


def _key(point: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(point[key]) for key in SEARCHED)
