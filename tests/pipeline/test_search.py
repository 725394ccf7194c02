"""A search proposes every point once, uses what it has been told, can be repeated and continued, and outlives trials that fail."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipeline import config, tune
from pipeline.search import SEARCHED, OptunaSearcher

BUDGET = 1000
Point = dict[str, Any]
PLAIN = config.to_dict(config.load("tune", ["model=tiny"]))


def options(**values: Any) -> config.Search:
    return config.Search(**PLAIN["search"] | {"searcher": config.Searcher.optuna} | values)


def run_search(searcher: OptunaSearcher, outcome: Callable[[Point], float | None], stop: int = 1000) -> list[Point]:
    """Run trials one after the other until none is left; ``outcome`` none is a trial that fails."""
    points: list[Point] = []
    while len(points) < stop and (point := searcher.suggest(f"trial-{len(points)}")) != Searcher.FINISHED:
        assert isinstance(point, dict)
        value = outcome(point)
        name = f"trial-{len(points)}"
        if value is None:
            searcher.on_trial_complete(name, error=True)
        else:
            searcher.on_trial_result(name, {"loss": value + 1, "images": BUDGET // 2})
            searcher.on_trial_complete(name, {"loss": value, "images": BUDGET})
        points.append(point)
    return points


def distance(point: Point) -> float:
    """Best at one point of the standard space, and smooth around it."""
    windows = PLAIN["search"]["windows"]
    return (
        abs(windows.index(point["model.window"]) - 1)
        + abs(math.log2(point["model.latents"] / 32))
        + abs(point["model.flow_depth"] - 2) / 2
    )


@pytest.mark.filterwarnings("ignore:The value nan is not acceptable")
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_repeated_values_failed_trials_and_few_points_do_not_disturb_it(data: st.DataObject) -> None:
    search = options(
        searcher=data.draw(st.sampled_from(config.Searcher)),
        windows=data.draw(st.lists(st.sampled_from(["0x0", "3x1", "5x2", "full"]), min_size=1, max_size=4)),
        latents=data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)),
        flow_depths=data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        num_trials=data.draw(st.integers(1, 50)),
    )
    outcomes = st.one_of(st.none(), st.just(math.nan), st.floats(0, 100))
    searcher = OptunaSearcher(search, "loss", BUDGET, data.draw(st.integers(0, 9)))
    points = run_search(searcher, lambda point: data.draw(outcomes))
    found = {tuple(point[key] for key in SEARCHED) for point in points}
    expected = [
        (window, latents, depth)
        for window in set(search.windows)
        for latents in set(search.latents)
        for depth in set(search.flow_depths)
    ]
    assert len(points) == len(found)
    assert found == set(expected)
    assert searcher.suggest("another") == Searcher.FINISHED
    assert not searcher.asked


@pytest.mark.parametrize("kind", config.Searcher)
def test_a_seed_decides_the_whole_search_and_another_makes_another(kind: config.Searcher) -> None:
    searches = [run_search(OptunaSearcher(options(searcher=kind), "loss", BUDGET, seed), distance, 12) for seed in (0, 0, 1, 2)]
    assert searches[0] == searches[1]
    assert searches[0] != searches[2] != searches[3]


def test_optuna_finds_the_best_point_sooner_than_chance_does() -> None:
    def trials_until_found(kind: config.Searcher, seed: int) -> int:
        found = run_search(OptunaSearcher(options(searcher=kind), "loss", BUDGET, seed), distance)
        return [distance(point) for point in found].index(0)

    optuna, chance = ([trials_until_found(kind, seed) for seed in range(3)] for kind in config.Searcher)
    assert sum(optuna) < 0.75 * sum(chance)


def test_optuna_knows_every_value_and_what_became_of_each_trial() -> None:
    searcher = OptunaSearcher(options(), "loss", BUDGET, 0)
    points = [searcher.suggest(name) for name in ("best", "worse", "stopped", "failed", "silent", "running")]
    searcher.on_trial_result("best", {"loss": 95.0, "images": 500})
    searcher.on_trial_complete("best", {"loss": 90.0, "images": BUDGET})
    searcher.on_trial_complete("worse", {"loss": 91.0, "images": BUDGET})
    searcher.on_trial_result("stopped", {"loss": 99.0, "images": 250})
    searcher.on_trial_result("stopped", {"loss": 80.0, "images": 500})
    searcher.on_trial_complete("stopped", {"loss": 80.0, "images": 500})
    searcher.on_trial_complete("failed", {"loss": 1.0, "images": BUDGET}, error=True)
    searcher.on_trial_complete("silent", {"time_total_s": 3.0})
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]
    assert [trial.state for trial in searcher.study.trials] == states
    assert [trial.params for trial in searcher.study.trials] == points
    assert searcher.study.best_value == 90.0
    assert searcher.study.best_params == points[0]
    assert searcher.study.trials[0].intermediate_values == {500: 95.0}
    assert searcher.study.trials[2].intermediate_values == {250: 99.0, 500: 80.0}


def test_what_is_known_from_an_earlier_search_is_used_and_not_proposed_again() -> None:
    known = run_search(OptunaSearcher(options(), "loss", BUDGET, 0), distance, 9)
    rows = [{**point, "loss": distance(point), "images": BUDGET} for point in known]
    rows[3] |= {"images": BUDGET // 2}  # stopped early
    searcher = OptunaSearcher(options(), "loss", BUDGET, 0, rows)
    assert [trial.state for trial in searcher.study.trials].count(TrialState.PRUNED) == 1
    assert searcher.study.best_value == min(distance(point) for number, point in enumerate(known) if number != 3)
    found = run_search(searcher, distance)
    assert not [point for point in found if point in known]
    assert len(found) + len(known) == 45
    full = OptunaSearcher(options(), "loss", BUDGET, 0, [{**point, "loss": 1.0, "images": BUDGET} for point in known + found])
    assert full.suggest("another") == Searcher.FINISHED


def test_earlier_trials_of_another_space_are_passed_over() -> None:
    row = {"model.window": "9x9", "model.latents": 16, "model.flow_depth": 2, "loss": 1.0, "images": BUDGET}
    searcher = OptunaSearcher(options(), "loss", BUDGET, 0, [row])
    assert not searcher.study.trials
    assert len(run_search(searcher, distance)) == 45


# --- the trials of a search --------------------------------------------------------------------------------------------


def tune_config(**values: Any) -> config.TuneConfig:
    return config.build(config.TuneConfig, PLAIN, values)


def test_every_point_is_a_run_of_its_own_with_nothing_else_changed() -> None:
    loaded = tune_config()
    runs = {}
    for window in ("0x0", "5x2", "full"):
        for latents in (1, 11):
            for depth in (1, 0):
                point = {"model.window": window, "model.latents": latents, "model.flow_depth": depth}
                trial = tune.trial_config(loaded, point)
                runs[trial.run_name] = trial
                assert trial.run_name.startswith(tune.search_name(loaded))
                assert (trial.model.window, trial.model.latents, trial.model.flow_depth) == (window, latents, depth)
                for section in ("dataset", "optim", "train", "cluster", "storage"):
                    assert getattr(trial, section) == getattr(loaded, section)
    assert len(runs) == 12
    assert all("/" not in name and " " not in name for name in runs)


def test_a_search_is_another_if_what_its_trials_depend_on_changes() -> None:
    names = [
        tune.search_name(tune_config(**{key: value}))
        for key, value in {
            "train.images": 8000, "search.latents": [16], "search.searcher": "random", "dataset.binarization": "static",
            "train.valid_images": 77,
        }.items()
    ]  # fmt: skip
    assert len({tune.search_name(tune_config()), *names}) == 6
    for key, value in {
        "search.num_trials": 3,
        "search.max_concurrent": 7,
        "search.min_rate_bits": 3.0,
        "cluster.num_workers": 2,
    }.items():
        assert tune.search_name(tune_config(**{key: value})) == tune.search_name(tune_config())
    assert tune.search_name(tune_config(name="mine")) == "mine"


ROW: Point = {
    "model.window": "3x1", "model.latents": 16, "model.flow_depth": 2, "images": 40_000, "elbo_nats": 101.25,
    "elbo_nats_se": 0.5, "rate_nats": 14.0, "rate_bits": 20.2, "num_images": 1000, "status": "finished", "run": "a",
}  # fmt: skip


def test_the_table_shows_finished_stopped_and_failed_trials_alike() -> None:
    measured = ("images", "elbo_nats", "elbo_nats_se", "rate_nats", "rate_bits", "num_images")
    failed = {**ROW, **dict.fromkeys(measured), "model.window": "full", "status": "failed", "error": "ValueError: no"}
    stopped = {**ROW, "images": 10_000, "status": "stopped early"}
    failed_late = {**stopped, "status": "failed", "error": "OutOfMemoryError"}
    lines = tune.format_table([ROW, stopped, failed_late, failed]).splitlines()
    assert len(lines) == 5
    assert [re.split(" {2,}", line)[-1] for line in lines] == ["status", "finished", "stopped early", "failed", "failed"]
    assert lines[1].split() == ["3x1", "16", "2", "40,000", "101.25", "nats", "20.2", "bits", "finished"]
    assert lines[4].split() == ["full", "16", "2", "failed"]
    assert len({line.rindex("  ") for line in lines}) == 1


def test_without_a_finished_trial_of_enough_rate_nothing_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**ROW, "rate_bits": 7.9}, {**ROW, "status": "stopped early"}, {**ROW, "status": "failed"}]
    assert tune.register(tune_config(**{"search.min_rate_bits": 8.0}), None, rows) == []  # type: ignore[arg-type]
    assert "search.min_rate_bits=8.0" in capsys.readouterr().out
