"""Which point a search tries next, and which trials it stops early.

Pure functions of the search's trials so far.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.goals import Goals
from pipeline.config.search import Sampler, SearchOptions, Stopping
from pipeline.search.trial import Point, Status, Trial

# Imported where it is used: the processes of trials import this module, and need no Optuna.
if TYPE_CHECKING:
    import optuna

ATTEMPTS = 32
"""Proposals asked of the sampler before an untried point is drawn at random."""


def propose(search: SearchOptions, seed: int, rows: Sequence[Trial]) -> Point | None:
    """The point of the space to try next, or None if every point has been tried.

    No point is tried twice, since trials are deterministic. The same seed and trials give the same
    point.
    """
    tried = [row.point for row in rows]
    untried = [point for point in search.points() if point not in tried]
    if not untried or search.sampler is Sampler.grid:
        return untried[0] if untried else None
    draw = random.Random(f"{seed} {len(rows)}")
    if search.sampler is Sampler.tpe:
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState

        study = known(search, search.goals, rows, draw.getrandbits(32))
        distributions = {
            key: CategoricalDistribution(values) for key, values in search.axes.items()
        }
        for _ in range(ATTEMPTS):
            trial = study.ask(distributions)
            if trial.params in untried:
                return trial.params
            study.tell(trial, state=TrialState.FAIL)
    return draw.choice(untried)


def known(
    search: SearchOptions, goals: Goals, rows: Iterable[Trial], seed: int = 0
) -> "optuna.Study":
    """An Optuna study of the trials, with the objectives of ``goals``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize" if each.maximize else "minimize" for each in goals.objectives],
        sampler=optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=min(10, max(1, search.num_trials // 4))
        ),
    )
    study.add_trials([_as_optuna_sees(search, goals, row) for row in rows])
    return study


def _as_optuna_sees(search: SearchOptions, goals: Goals, row: Trial) -> "optuna.trial.FrozenTrial":
    """The Optuna trial: finished ones are complete, stopped ones pruned, others failed.

    Pruned trials are compared at equal numbers of images.
    """
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    values = row.values or {}
    complete = all(each.name in values for each in goals.objectives)
    pruned = row.status is Status.stopped and len(goals.objectives) == 1
    name = goals.objectives[0].name
    # Without them Optuna would take a stopped trial for one that keeps every constraint.
    judged = values if complete else row.curve[-1] if pruned and row.curve else {}
    return create_trial(
        params=row.point,
        distributions={
            key: CategoricalDistribution(choices) for key, choices in search.axes.items()
        },
        values=[values[each.name] for each in goals.objectives] if complete else None,
        intermediate_values={entry["images"]: entry[name] for entry in row.curve if name in entry}
        if pruned
        else None,
        constraints={
            str(each): each.violation(judged) for each in goals.constraints if each.name in judged
        },
        state=TrialState.COMPLETE if complete else TrialState.PRUNED if pruned else TrialState.FAIL,
    )


def is_outperformed(
    search: SearchOptions, budget: int, grace: float, row: Trial, rows: Iterable[Trial]
) -> bool:
    """Whether to stop a trial at its newest validation.

    Its full run has ``budget`` images; before ``grace`` images, no trial is stopped.

    ``asha`` (asynchronous successive halving, Li et al., 2018) compares trials at rungs: the first
    is at ``grace`` images, each later one at ``reduction`` times the images of the one before. A
    trial continues at a rung if at most one in ``reduction`` of the other trials that have reached
    it, whatever their status, was better there; the first ``reduction - 1`` always continue.
    ``median`` compares at every validation from ``grace`` images on, and stops a trial if more than
    half of the others were better. All are compared at the same number of images by
    ``Goals.beats``: with several objectives, a trial is better only if it is no worse in any of
    them.
    """
    images = row.curve[-1]["images"]
    before = row.curve[-2]["images"] if len(row.curve) > 1 else 0
    rungs = [rung for rung in _rungs(search, grace, images) if before < rung <= images]
    if search.stopping is Stopping.none or not rungs or images >= budget:
        return False
    mine = row.curve[-1]
    others = [
        entry for other in rows if other is not row for entry in [_at(other, rungs[-1])] if entry
    ]
    better = sum(search.goals.beats(other, mine) for other in others)
    reduction = search.reduction if search.stopping is Stopping.asha else 2
    return len(others) >= reduction - 1 and better > len(others) / reduction


def _rungs(search: SearchOptions, grace: float, images: float) -> list[float]:
    """The numbers of images, up to the newest validation's, at which trials are compared."""
    if search.stopping is Stopping.median:
        return [images] if images >= grace else []
    count = math.floor(math.log(max(1.0, images / grace), search.reduction) + 1e-9) + 1
    return [grace * search.reduction**number for number in range(count)]


def _at(row: Trial, images: float) -> Mapping[str, Any] | None:
    """A trial's first validation at or after this number of images."""
    return next((entry for entry in row.curve if entry["images"] >= images), None)
