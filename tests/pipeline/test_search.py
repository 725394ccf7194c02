"""A search proposes every point at most once, and tells Optuna what came of it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipeline import config, tune
from pipeline.search import OptunaSearcher


def options(**values: object) -> config.Search:
    loaded = config.load("tune", [f"search.{key}={value}" for key, value in values.items()])
    return loaded.search  # type: ignore[no-any-return]


def proposals(searcher: OptunaSearcher) -> list[dict[str, object]]:
    found = []
    while (point := searcher.suggest(str(len(found)))) != Searcher.FINISHED:
        assert isinstance(point, dict)
        found.append(point)
        score = 80 + point["model.latents"] / 10
        searcher.on_trial_result(str(len(found) - 1), {"loss": score, "images": 10})
        searcher.on_trial_complete(str(len(found) - 1), {"loss": score, "images": 10})
    return found


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["optuna", "random"]),
    st.lists(st.sampled_from(["3x1", "5x2", "full"]), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    st.integers(0, 5),
)
def test_the_whole_space_is_proposed_each_point_once(
    searcher: str, windows: list[str], latents: list[int], depths: list[int], seed: int
) -> None:
    search = options(searcher=searcher, windows=windows, latents=latents, flow_depths=depths)
    found = proposals(OptunaSearcher(search, "loss", budget=10, seed=seed))
    keys = [tuple(str(value) for value in point.values()) for point in found]
    assert len(set(keys)) == len(keys) == math.prod(map(len, (windows, latents, depths)))


def test_the_same_seed_proposes_the_same() -> None:
    search = options()
    assert proposals(OptunaSearcher(search, "loss", 10, 3)) == proposals(OptunaSearcher(search, "loss", 10, 3))


def test_optuna_hears_how_trials_ended() -> None:
    searcher = OptunaSearcher(options(), "loss", budget=10, seed=0)
    for name in ("good", "stopped", "failed"):
        searcher.suggest(name)
    searcher.on_trial_result("good", {"loss": 84.0, "images": 10})
    searcher.on_trial_complete("good", {"loss": 84.0, "images": 10})
    searcher.on_trial_result("stopped", {"loss": 99.0, "images": 5})
    searcher.on_trial_complete("stopped", {"loss": 99.0, "images": 5})
    searcher.on_trial_complete("failed", error=True)
    states = [trial.state for trial in searcher.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert searcher.study.best_value == 84.0


def test_trials_of_different_points_are_different_runs_of_one_search() -> None:
    loaded = config.load("tune", [])
    points = [{"model.window": "3x1", "model.latents": 4, "model.flow_depth": depth} for depth in (0, 1)]
    names = [tune.trial_config(loaded, point).run_name for point in points]
    assert names[0] != names[1]
    assert all(name.startswith(tune.search_name(loaded)) for name in names)
    assert tune.trial_config(loaded, points[1]).model.flow_depth == 1


@pytest.mark.parametrize("value", [None, 85.5])
def test_the_table_shows_every_trial(value: float | None) -> None:
    row = {"model.window": "3x1", "model.latents": 4, "model.flow_depth": 0, "images": 10, "elbo_nats": value, "rate_bits": 9.0}
    text = tune.format_table([{**row, "status": "finished" if value else "failed"}])
    assert "3x1" in text
    assert ("85.50" in text) == (value is not None)
