"""A search proposes every point once, stops what lags behind, and both depend on nothing but what
is known of its trials.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from pipeline.commands import load
from pipeline.commands.models.tune import format_result, format_table, register
from pipeline.config.compose import build
from pipeline.config.options import to_dict
from pipeline.config.search import Sampler, SearchOptions, Stopping, TuneConfig
from pipeline.search.proposals import is_outperformed, known, propose
from pipeline.search.runner import Proposer
from pipeline.search.trial import Point, Status, Trial
from pipeline.search.trials import Trials, shortfall, table, trial_config
from pipeline.storage import open_storage

BUDGET = 1000
Row = dict[str, Any]
PLAIN = to_dict(load("tune", ["model=tiny"]))
SPACE = {
    "window": ["0x0", "3x1", "5x2", "5x3", "7x4"],
    "latents": [16, 32, 64],
    "flow_depth": [0, 2, 4],
}


def options(**values: Any) -> SearchOptions:
    defaults = {"space": {"model": SPACE}, "num_trials": 20, "constraints": []}
    return SearchOptions(**{**defaults, **values})


def made(**values: Any) -> Trial:
    """A trial of which only some things matter."""
    return Trial(**{"number": 0, "point": {}, "run": "", **values})


def finished(point: Point, loss: float, **values: float) -> Trial:
    return made(
        point=point,
        status=Status.finished,
        images=BUDGET,
        curve=[{"images": BUDGET, "nll": loss}],
        values={"nll": loss, **values},
    )


def run_search(
    search: SearchOptions, seed: int, outcome: Callable[[Point], Trial], stop: int = 1000
) -> list[Trial]:
    """Run trials one after the other until none is left."""
    rows: list[Trial] = []
    while len(rows) < stop and (point := propose(search, seed, rows)):
        rows.append(outcome(point))
    return rows


def distance(point: Point) -> float:
    """Best at one point of the space, and smooth around it."""
    window = abs(SPACE["window"].index(point["model.window"]) - 1)
    return (
        window
        + abs(math.log2(point["model.latents"] / 32))
        + abs(point["model.flow_depth"] - 2) / 2
    )


def by_distance(point: Point) -> Trial:
    return finished(point, distance(point))


# --- what is tried next ---------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_point_is_proposed_once_whatever_becomes_of_the_trials(data: st.DataObject) -> None:
    space = {
        "window": data.draw(
            st.lists(st.sampled_from(["0x0", "3x1", "5x2", "full"]), min_size=1, max_size=4)
        ),
        "latents": data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    }
    objectives = data.draw(st.sampled_from([["min nll"], ["min rate_bits", "max probe_accuracy"]]))
    constraints = data.draw(st.sampled_from([[], ["3 <= rate_bits <= 5"]]))
    search = options(
        space={"model": space},
        sampler=data.draw(st.sampled_from(Sampler)),
        objectives=objectives,
        constraints=constraints,
        num_trials=data.draw(st.integers(1, 50)),
    )

    def outcome(point: Point) -> Trial:
        status = data.draw(st.sampled_from(Status))
        numbers = [data.draw(st.floats(0, 100)) for _ in range(3)]
        curve = (
            [{"images": BUDGET // 2, "nll": numbers[0], "rate_bits": numbers[1]}]
            if data.draw(st.booleans())
            else []
        )
        trial = made(point=point, status=status, curve=curve)
        if status is Status.finished:
            trial.values = dict(zip(("nll", "rate_bits", "probe_accuracy"), numbers, strict=True))
        return trial

    points = [row.point for row in run_search(search, data.draw(st.integers(0, 9)), outcome)]
    expected = itertools.product(dict.fromkeys(space["window"]), dict.fromkeys(space["latents"]))
    key = str
    assert sorted(points, key=key) == sorted(
        ({"model.window": w, "model.latents": z} for w, z in expected), key=key
    )


@pytest.mark.parametrize("sampler", Sampler)
def test_the_next_point_is_a_function_of_the_seed_and_of_what_is_known(sampler: Sampler) -> None:
    searches = [
        run_search(options(sampler=sampler), seed, by_distance, 12) for seed in (0, 0, 1, 2)
    ]
    assert searches[0] == searches[1]
    if sampler is not Sampler.grid:
        assert searches[0] != searches[2] != searches[3]
    # So a search that goes on from its record proposes what it would have proposed without a break.
    assert propose(options(sampler=sampler), 0, searches[0][:7]) == searches[0][7].point


def test_a_grid_is_tried_in_its_own_order() -> None:
    search = options(sampler=Sampler.grid)
    assert [row.point for row in run_search(search, 0, by_distance)] == list(search.points())


def test_optuna_finds_the_best_point_sooner_than_chance_does() -> None:
    def trials_until_found(sampler: Sampler, seed: int) -> int:
        found = run_search(options(sampler=sampler), seed, by_distance, 30)
        return [*(distance(row.point) for row in found), 0].index(0)

    optuna, chance = (
        [trials_until_found(each, seed) for seed in range(3)]
        for each in (Sampler.tpe, Sampler.random)
    )
    assert sum(optuna) < 0.75 * sum(chance)


def test_with_several_objectives_optuna_finds_the_front_sooner_than_chance_does() -> None:
    """The front of a trade-off in the window has few latents and no flow."""

    def outcome(point: Point) -> Trial:
        window, rest = (
            SPACE["window"].index(point["model.window"]),
            math.log2(point["model.latents"] / 16) + point["model.flow_depth"],
        )
        return finished(point, window + rest, rate_bits=4 - window + rest)

    def found(sampler: Sampler, seed: int) -> int:
        search = options(sampler=sampler, objectives=["min nll", "min rate_bits"])
        rows = run_search(search, seed, outcome, 20)
        return sum(
            row.point["model.latents"] == 16 and row.point["model.flow_depth"] == 0 for row in rows
        )

    optuna, chance = (
        sum(found(each, seed) for seed in range(6)) for each in (Sampler.tpe, Sampler.random)
    )
    assert optuna > 1.2 * chance


def test_optuna_looks_where_the_constraint_is_kept() -> None:
    """The best likelihood is where the rate is too low: at every window but the narrowest."""

    def outcome(point: Point) -> Trial:
        window = SPACE["window"].index(point["model.window"])
        return finished(point, 100.0 - window, rate_bits=30.0 - 10 * window)

    free, bound = (
        sum(
            row.point["model.window"] == "0x0"
            for seed in range(4)
            for row in run_search(options(constraints=constraints), seed, outcome, 16)
        )
        for constraints in ([], ["rate_bits >= 25"])
    )
    assert bound > 1.5 * free


def test_optuna_knows_what_became_of_each_trial() -> None:
    search = options(constraints=["rate_bits >= 10"])
    points = list(search.points())
    rows = [
        finished(points[0], 90.0, rate_bits=12.0),
        finished(points[1], 80.0, rate_bits=7.0),
        made(
            point=points[2],
            status=Status.stopped,
            curve=[{"images": 250, "nll": 99.0}, {"images": 500, "nll": 80.0}],
        ),
        made(point=points[3], status=Status.failed, curve=[{"images": 250, "nll": 1.0}]),
        made(point=points[4]),
    ]
    trials = known(search, search.goals, rows).trials
    assert [trial.state.name for trial in trials] == [
        "COMPLETE",
        "COMPLETE",
        "PRUNED",
        "FAIL",
        "FAIL",
    ]
    assert [trial.params for trial in trials] == points[:5]
    assert trials[2].intermediate_values == {250: 99.0, 500: 80.0}
    assert [max(trial.constraints.values()) <= 0 for trial in trials[:2]] == [True, False]
    assert trials[0].state is TrialState.COMPLETE


# --- what is stopped ------------------------------------------------------------------------------


def trial(*losses: float, every: int = 100, **values: Sequence[float]) -> Trial:
    """A trial with a validation after every so many images."""
    curve = [{"images": every * number, "nll": loss} for number, loss in enumerate(losses, 1)]
    for name, column in values.items():
        for entry, value in zip(curve, column, strict=True):
            entry[name] = value
    return made(curve=curve)


def stopped(search: SearchOptions, row: Trial, others: list[Trial]) -> bool:
    return is_outperformed(search, BUDGET, search.grace_fraction * BUDGET, row, [*others, row])


def test_halving_lets_one_in_three_go_on_at_its_rungs_and_looks_at_no_other_validation() -> None:
    search = options(grace_fraction=0.2, reduction=3)  # rungs at 200 and 600 images
    others = [trial(*[loss] * 10) for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    assert not stopped(search, trial(9.0), others)
    assert stopped(search, trial(9.0, 9.0), others)
    assert not stopped(search, trial(9.0, 9.0, 9.0), others)
    assert [stopped(search, trial(*[loss] * 6), others) for loss in (2.5, 3.5)] == [False, True]
    assert not stopped(search, trial(*[9.0] * 10), others), (
        "a trial that has run to its end is not stopped"
    )
    assert not stopped(search, trial(9.0, 9.0), [*others[:1], trial(1.0)]), (
        "only one other has come so far"
    )
    assert stopped(search, trial(9.0, 9.0), others[:2])


def test_the_median_rule_looks_at_every_validation_behind_the_grace() -> None:
    search = options(stopping=Stopping.median, grace_fraction=0.2)
    others = [trial(*[loss] * 10) for loss in (1.0, 2.0, 3.0, 4.0)]
    assert not stopped(search, trial(9.0), others)
    assert [
        stopped(search, trial(*[loss] * count), others)
        for count in (2, 3, 9)
        for loss in (2.5, 3.5)
    ] == [False, True] * 3
    assert not stopped(search, trial(*[9.0] * 10), others)


def test_without_stopping_nothing_is_stopped() -> None:
    others = [trial(*[loss] * 10) for loss in (1.0, 2.0, 3.0)]
    assert not stopped(options(stopping=Stopping.none), trial(9.0, 9.0, 9.0), others)


def test_trials_are_compared_at_the_same_number_of_images() -> None:
    search = options(grace_fraction=0.2, reduction=2)
    ahead = trial(30.0, 20.0, 10.0, 5.0, 2.0, 1.0)
    assert not stopped(search, trial(29.0, 19.0), [ahead])
    assert stopped(search, trial(31.0, 21.0), [ahead])


def test_a_rung_between_two_validations_is_decided_at_the_second() -> None:
    search = options(grace_fraction=0.25, reduction=2)  # a rung at 250
    others = [trial(1.0, 1.0, 1.0), trial(1.0, 1.0, 1.0)]
    assert [stopped(search, trial(*[9.0] * count), others) for count in (1, 2, 3, 4)] == [
        False,
        False,
        True,
        False,
    ]


def test_with_several_objectives_only_what_is_worse_in_all_of_them_lags() -> None:
    search = options(
        objectives=["min rate_bits", "min distortion_nats"], grace_fraction=0.2, reduction=3
    )

    def at(rate: float, distortion: float) -> Trial:
        return trial(0.0, 0.0, rate_bits=[rate] * 2, distortion_nats=[distortion] * 2)

    others = [at(10, 90), at(20, 80), at(30, 70)]
    assert not stopped(search, at(5, 100), others)
    assert not stopped(search, at(15, 95), others)  # one of three is better
    assert stopped(search, at(25, 95), others)  # two are


def test_what_breaks_a_constraint_lags_behind_what_keeps_it() -> None:
    search = options(constraints=["rate_bits >= 10"], grace_fraction=0.2, reduction=3)
    others = [trial(5.0, 5.0, rate_bits=[12.0] * 2), trial(6.0, 6.0, rate_bits=[11.0] * 2)]
    assert stopped(search, trial(1.0, 1.0, rate_bits=[9.0] * 2), others)
    assert not stopped(search, trial(1.0, 1.0, rate_bits=[12.0] * 2), others)


def test_halving_finds_the_best_of_many_curves_with_less_than_half_of_the_images() -> None:
    draw = random.Random(0)
    search, rows, finals = options(grace_fraction=0.1, reduction=3), list[Trial](), list[float]()
    for _ in range(40):
        final, row = draw.uniform(80, 120), made()
        finals.append(final)
        rows.append(row)
        for images in range(100, BUDGET + 1, 100):
            row.curve.append(
                {
                    "images": images,
                    "nll": final + 100 * math.exp(-images / 200) + draw.gauss(0, 0.5),
                }
            )
            if is_outperformed(search, BUDGET, search.grace_fraction * BUDGET, row, rows):
                break
    seen = sum(row.curve[-1]["images"] for row in rows)
    runs = zip(finals, rows, strict=True)
    complete = [final for final, row in runs if row.curve[-1]["images"] == BUDGET]
    assert min(complete) == min(finals)
    assert seen < 0.5 * len(rows) * BUDGET


@pytest.mark.parametrize(
    ("values", "grace"),
    [
        ({}, 0.6),  # the preset's floor lasts for 0.4 of a run, and then falls for another 0.2
        ({"train.free_fraction": 0.1}, 0.3),
        ({"train.free_fraction": 0.1, "search.grace_fraction": 0.5}, 0.5),
        ({"train.free_nats": 0}, 0.25),
        ({"train.free_nats": 0, "train.rate_warmup_fraction": 0.5}, 0.5),
        ({"train.free_bits": "soft"}, 0.25),
        ({"train.free_fraction": 0.9}, 1),
        ({"search.space.train.free_fraction": [0.1, 0.3, 0.2]}, 0.5),
        ({"train.free_nats": 0, "search.space.train.free_nats": [0, 5]}, 0.6),
        ({"train.free_nats": 0, "search.space.train.rate_warmup_fraction": [0.1, 0.7]}, 0.7),
    ],
)
@pytest.mark.parametrize("stopping", [Stopping.asha, Stopping.median])
def test_no_trial_is_stopped_while_the_loss_of_any_holds_the_rate_up(
    values: Row, grace: float, stopping: Stopping
) -> None:
    """Under the floor every trial has the same rate. The one that keeps it has the worse bound, for
    its window is narrower; it is the only one that satisfies the constraint in the end.
    """
    loaded = tune_config(
        **{"search.constraints": ["rate_bits >= 8"], "search.stopping": stopping.value, **values}
    )
    assert loaded.train.images == BUDGET * 40
    every, grace_images = loaded.train.images // 20, loaded.grace_images
    held = round(20 * grace)

    def validated(bound: float, freed: float, count: int) -> Trial:
        rates = [14.4] * (held - 1) + [freed] * (21 - held)
        return trial(*[bound] * count, every=every, rate_bits=rates[:count])

    others = [validated(90.0, 2.0, 20) for _ in range(4)]

    def is_stopped(row: Trial) -> bool:
        rows = [*others, row]
        return is_outperformed(loaded.search, loaded.train.images, grace_images, row, rows)

    assert not any(is_stopped(validated(95.0, 12.0, count)) for count in range(1, 21))
    if held < 20:
        others = [validated(90.0, 12.0, 20) for _ in range(4)]
        fate = [is_stopped(validated(85.0, 2.0, count)) for count in range(1, 20)]
        assert fate.index(True) == held - 1, "at the first validation without the floor"


# --- the trials of a search -----------------------------------------------------------------------


def tune_config(**values: Any) -> TuneConfig:
    return build(TuneConfig, PLAIN, values)


def test_every_point_is_a_run_of_its_own_with_nothing_else_changed() -> None:
    loaded = tune_config(**{"search.space.optim.learning_rate": [1e-30, 1e30]})
    runs = {}
    for window, latents, rate in itertools.product(
        ("0x0", "5x2-grey", "full"), (1, 11), (1e-30, 1e30)
    ):
        trial = trial_config(
            loaded, {"model.window": window, "model.latents": latents, "optim.learning_rate": rate}
        )
        runs[trial.run_name] = trial
        assert trial.run_name.startswith(loaded.search_name)
        assert (trial.model.window, trial.model.latents, trial.optim.learning_rate) == (
            window,
            latents,
            rate,
        )
        for section in ("dataset", "train", "cluster", "storage"):
            assert getattr(trial, section) == getattr(loaded, section)
    assert len(runs) == 12
    assert all("/" not in name and " " not in name for name in runs)


def test_a_search_is_another_if_what_its_trials_depend_on_changes() -> None:
    names = [
        tune_config(**{key: value}).search_name
        for key, value in {
            "train.images": 8000,
            "search.space.model.latents": [16],
            "search.sampler": "random",
            "dataset.binarization": "static",
            "train.valid_images": 77,
            "search.objectives": ["max rate_bits"],
            "search.constraints": ["nll <= 3"],
            "search.space.model.flow_hidden": [64, 128],
        }.items()
    ]
    assert len({tune_config().search_name, *names}) == 9
    for key, value in {
        "search.num_trials": 3,
        "search.max_concurrent": 7,
        "search.hours": 3.0,
        "cluster.num_workers": 2,
    }.items():
        assert tune_config(**{key: value}).search_name == tune_config().search_name
    assert tune_config(name="mine").search_name == "mine"


def test_what_was_begun_comes_first_and_a_point_whose_record_is_deleted_is_tried_again(
    tmp_path: Path,
) -> None:
    loaded, storage = tune_config(**{"search.sampler": "grid"}), open_storage(str(tmp_path))
    trials = Trials.load(loaded, storage)
    begun = []
    for _ in range(3):
        row = trials.next()
        assert row is not None
        trials.begin(row)
        begun.append(row)
    for row in begun[1:]:
        row.status = Status.failed
        trials.save(row)
    storage.delete(["trials/0002.json"])

    again = Trials.load(loaded, storage)
    first = again.next()
    assert first is not None
    assert (first.number, first.point) == (1, begun[0].point)
    again.begin(first)
    second = again.next()
    assert second is not None
    assert (second.number, second.point) == (4, begun[1].point)
    assert again.seconds() >= begun[2].search_seconds, "time goes on from where it was"


def test_a_trial_that_is_lost_is_given_again_as_often_as_allowed(tmp_path: Path) -> None:
    values = {"search.num_trials": 2, "cluster.max_failures": 2}
    trials = Trials.load(tune_config(**values), open_storage(str(tmp_path)))
    proposer = Proposer(trials)

    def given() -> Any:
        found = proposer.suggest("trial")
        return found["number"] if isinstance(found, dict) else found

    assert [given(), given()] == [1, 2]
    assert given() is None, "those that run may be lost"
    lost, other = trials.rows
    for failures in (1, 2):
        assert trials.give_again(lost)
        assert (given(), given()) == (1, None)
        assert trials.storage.read_json("trials/0001.json")["failures"] == failures
    assert not trials.give_again(lost)
    lost.status = Status.failed
    assert given() is None
    other.status = Status.finished
    assert given() == Proposer.FINISHED


def test_a_budget_of_time_counts_what_was_spent_before(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    trials = Trials.load(tune_config(), storage)
    row = trials.next()
    assert row is not None
    row.seconds = 7200.0
    trials.begin(row)
    for hours, cores, over in ((1.9, 1, True), (2.1, 1, False), (3.9, 2, True)):
        values = {"search.core_hours": hours, "cluster.cpus_per_worker": cores}
        assert (Trials.load(tune_config(**values), storage).next() is None) == over
    assert Trials.load(tune_config(**{"search.hours": 1.0}), storage).next() is not None


def rows_of_every_kind() -> list[Trial]:
    """Trials of a search for the least rate and distortion, whose rate is to be at least 8 bits."""

    def row(number: int, status: str, images: int, rate: float, distortion: float) -> Row:
        entry = {
            "images": images,
            "nll": 100.0 + number,
            "rate_bits": rate,
            "distortion_nats": distortion,
        }
        point = {"model.window": "3x1", "model.latents": number, "model.flow_depth": 2}
        kept = {
            "number": number,
            "run": f"run-{number}",
            "status": status,
            "images": images,
            "seconds": 1.0,
            "failures": 0,
        }
        values = {key: value for key, value in entry.items() if key != "images"} | {
            "probe_accuracy": 0.5,
            "images_per_s": 400.0,
        }
        return {
            "point": point,
            "curve": [entry],
            **kept,
            **({"values": values} if status == "finished" else {}),
        }

    records = [
        row(1, "stopped early", 10_000, 12, 90),
        {**row(2, "failed", 0, 0, 0), "curve": [], "error": "OutOfMemoryError"},
        row(3, "finished", 40_000, 30, 70),
        row(4, "finished", 40_000, 7, 60),
        row(5, "finished", 40_000, 16, 79),
        row(6, "finished", 40_000, 31, 71),
        {**row(7, "unfinished", 0, 0, 0), "curve": []},
        row(8, "finished", 40_000, 9, 84),
    ]
    return [Trial.from_json(record) for record in records]


def test_the_table_is_ordered_by_what_the_search_is_after() -> None:
    wanted = {
        "search.objectives": ["min rate_bits", "min distortion_nats"],
        "search.constraints": ["rate_bits >= 8"],
    }
    rows = table(tune_config(**wanted), rows_of_every_kind())
    assert {row["number"] for row in rows[:3]} == {3, 5, 8}, "nobody beats these"
    assert rows[0]["number"] == 5, "the best compromise of them"
    assert [(row["number"], row["front"], row["feasible"]) for row in rows[3:5]] == [
        (6, 2, True),
        (4, 3, False),
    ]
    assert [row["number"] for row in rows[5:]] == [1, 7, 2]
    single = table(tune_config(**{"search.constraints": []}), rows_of_every_kind())
    assert [row["number"] for row in single] == [3, 4, 5, 6, 8, 1, 7, 2]


def test_the_table_shows_finished_stopped_and_failed_trials_alike() -> None:
    loaded = tune_config()
    lines = format_table(loaded, table(loaded, rows_of_every_kind())).splitlines()
    assert len(lines) == 9
    assert lines[1].split() == [
        "3x1",
        "3",
        "2",
        "40,000",
        "103.00",
        "30.0",
        "70.00",
        "50.0%",
        "400",
        "1",
        "finished",
    ]
    assert lines[-1].split() == ["3x1", "2", "2", "0", "failed"]
    assert len({len(line) for line in lines}) == 1


def test_without_a_finished_trial_that_keeps_the_constraints_nothing_is_registered() -> None:
    loaded = tune_config(**{"search.constraints": ["rate_bits >= 80"]})
    rows = table(loaded, rows_of_every_kind())
    assert register(loaded, None, rows) == []  # type: ignore[arg-type]
    result = {"name": "a", "reused": False, "trials": rows, "registered": [], "report": "x"}
    result["shortfall"] = shortfall(loaded, rows)
    assert "no finished trial keeps rate_bits >= 80" in format_result(loaded, result)


@pytest.mark.parametrize(
    ("bound", "asked", "reason"),
    [
        (8, 4, None),
        (8, 5, "4 of 5 models are registered: 5 of 8 trials ran to their end, and 4 of these keep"),
        (31, 2, "1 of 2 models are registered: 5 of 8 trials ran to their end, and 1 of these ke"),
        (5, 9, "5 of 9 models are registered: 5 of 8 trials ran to their end"),
    ],
)
def test_the_result_says_why_fewer_models_are_registered_than_asked(
    bound: int, asked: int, reason: str | None
) -> None:
    loaded = tune_config(**{"search.constraints": [f"rate_bits >= {bound}"]}, register_best=asked)
    rows = table(loaded, rows_of_every_kind())
    told = shortfall(loaded, rows)
    assert (told is None) == (reason is None)
    assert (told or "").startswith(reason or "")
