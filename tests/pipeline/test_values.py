"""Measured figures: their text and their JSON."""

import math

import pytest

from pipeline.values import Measured

FIGURES = {"num_images": 20, "elbo_nats": 85.355, "elbo_nats_se": 0.664, "elbo_bits_per_dim": 0.1}


def test_a_figure_is_read_with_its_error_unit_and_count_and_written_as_it_was() -> None:
    elbo = Measured.from_json(FIGURES, "elbo_nats")
    assert elbo == Measured(85.355, 0.664, "nats", 20)
    assert elbo.to_json("elbo_nats") == {"elbo_nats": 85.355, "elbo_nats_se": 0.664}
    assert Measured.from_json({"accuracy": 0.5, "accuracy_se": None}, "accuracy") == Measured(0.5)


def test_the_text_has_the_error_and_the_unit_where_there_are_any() -> None:
    elbo = Measured.from_json(FIGURES, "elbo_nats")
    assert str(elbo) == "85.36 +- 0.66 nats"
    assert elbo.text(1) == "85.4 +- 0.7"
    assert str(Measured(1.0)) == Measured(1.0).text() == "1.00"
    assert str(Measured(0.971, 0.001).percent) == "97.10 +- 0.10 %"


def test_bits_are_nats_divided_by_the_logarithm_of_two() -> None:
    assert Measured(math.log(8), unit="nats").bits == pytest.approx(3)
