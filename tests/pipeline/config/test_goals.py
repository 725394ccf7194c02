"""What a search is after orders its trials as the definitions say."""

import math
from itertools import chain, combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.goals import QUANTITIES, Constraint, Goals, Measurements, Objective
from pipeline.errors import UserError

NUMBERS = st.integers(0, 4).map(float)
TRIALS = st.lists(
    st.fixed_dictionaries({"nll": NUMBERS, "rate_bits": NUMBERS, "probe_accuracy": NUMBERS}),
    max_size=8,
)
GOALS = [
    Goals.parse(["min nll"]),
    Goals.parse(["max probe_accuracy"], ["1 <= rate_bits <= 3"]),
    Goals.parse(["min nll", "max rate_bits"]),
    Goals.parse(["min nll", "max rate_bits", "max probe_accuracy"], ["nll <= 3", "rate_bits >= 1"]),
]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("20 <= rate_bits <= 60", (20, 60)),
        ("60>=rate_bits>=20", (20, 60)),
        ("rate_bits >= 8", (8, math.inf)),
        ("8 <= rate_bits", (8, math.inf)),
        ("rate_bits <= 1e2", (-math.inf, 100)),
        (" .5 >= rate_bits ", (-math.inf, 0.5)),
    ],
)
def test_bounds_are_written_either_way(text: str, bounds: tuple[float, float]) -> None:
    assert Constraint.parse(text) == Constraint("rate_bits", *bounds)
    assert Constraint.parse(str(Constraint.parse(text))) == Constraint("rate_bits", *bounds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rate_bits",
        "20 <= rate_bits >= 60",
        "rate_bits < 3",
        "rate <= 3",
        "3 <= 4",
        "nll <= inf",
        "nll <= 3 <= 4",
    ],
)
def test_other_bounds_are_not_understood(text: str) -> None:
    with pytest.raises(
        UserError, match=r"is not understood; write bounds like '20 <= rate_bits <= 60'"
    ):
        Constraint.parse(text)


def test_an_objective_reads_as_it_was_written() -> None:
    for text in ("min nll", "max probe_accuracy"):
        assert str(Objective.parse(text)) == text


@given(st.sampled_from(GOALS), TRIALS)
def test_to_beat_is_a_strict_partial_order(goals: Goals, trials: list[dict[str, Any]]) -> None:
    for a in trials:
        assert not goals.beats(a, a)
        for b in trials:
            assert not (goals.beats(a, b) and goals.beats(b, a))
            for c in trials:
                assert goals.beats(a, c) or not (goals.beats(a, b) and goals.beats(b, c))


@given(st.sampled_from(GOALS), TRIALS)
def test_fronts_hold_every_trial_once_and_nobody_is_beaten_in_an_earlier_or_his_own_front(
    goals: Goals, trials: list[dict[str, Any]]
) -> None:
    fronts = goals.ranked(trials)
    assert sorted(map(id, chain(*fronts))) == sorted(map(id, trials))
    for front in fronts:
        assert not any(goals.beats(a, b) or goals.beats(b, a) for a, b in combinations(front, 2))
    for earlier, later in pairwise(fronts):
        assert all(any(goals.beats(a, b) for a in earlier) for b in later)


@given(TRIALS)
def test_whoever_keeps_the_constraints_beats_whoever_does_not(trials: list[dict[str, Any]]) -> None:
    goals = GOALS[1]
    for a in trials:
        for b in trials:
            if 1 <= a["rate_bits"] <= 3 and not 1 <= b["rate_bits"] <= 3:
                assert goals.beats(a, b)


def test_what_is_not_known_yet_is_left_out_of_the_comparison() -> None:
    goals = Goals.parse(["min nll", "max probe_accuracy"])
    assert goals.beats({"nll": 1.0}, {"nll": 2.0, "probe_accuracy": 0.9})
    assert not goals.beats({"probe_accuracy": 0.9}, {"nll": 2.0})


def test_a_code_that_keeps_no_structure_breaks_every_bound_on_the_resolution() -> None:
    goals = Goals.parse(["min nll"], ["resolution_px <= 4"])
    measure = QUANTITIES["resolution_px"].measure

    def measured(px: float | None, error: float | None = 0.1) -> dict[str, Any]:
        valid = {"resolution_px": px, "resolution_px_se": error, "resolution": {"coarsest_px": 28}}
        return {"nll": 80.0, **measure(Measurements(valid, 1, [1.0]))}

    fine, coarse, none = measured(3.5), measured(5.0), measured(None, None)
    assert (fine["resolution_px"], fine["resolution_px_se"]) == (3.5, 0.1)
    assert goals.violation(fine) == 0 < goals.violation(coarse) < goals.violation(none)
    assert [goals.beats(fine, coarse), goals.beats(coarse, none)] == [True, True]
    assert none["resolution_px"] == 28
    assert measure(Measurements({}, 1, [1.0])) == {}
