"""Plateaus of a held-out metric."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.engine.plateau import Plateau, improves, metric_of

NAN = math.nan


@pytest.mark.parametrize(
    ("metric", "value", "best", "by", "better"),
    [
        ("accuracy", 0.6, 0.5, 0.0, True),
        ("accuracy", 0.5, 0.5, 0.0, False),
        ("accuracy", 0.55, 0.5, 0.1, False),
        ("loss", 0.4, 0.5, 0.0, True),
        ("loss", 0.5, 0.5, 0.0, False),
        ("loss", 0.45, 0.5, 0.1, False),
        ("loss", 7.0, NAN, 0.1, True),
        ("loss", NAN, 0.5, 0.0, False),
        ("loss", NAN, NAN, 0.0, False),
        ("loss", math.inf, 0.5, 0.0, False),
    ],
)
def test_what_is_better(metric: str, value: float, best: float, by: float, better: bool) -> None:
    assert improves(metric, value, best, by) is better


def test_the_metric_is_the_one_wanted_else_accuracy_else_loss() -> None:
    both = {"loss": 1.0, "accuracy": 0.5, "odd": 1.0}
    assert metric_of(both) == "accuracy"
    assert metric_of(both, "loss") == "loss"
    assert metric_of({"loss": 1.0}) == "loss"
    assert metric_of({"loss": 1.0}, "accuracy") is None
    assert metric_of({"odd": 1.0}) is None


def ends(plateau: Plateau, metric: str, values: list[float]) -> list[int]:
    """Where the patience ended."""
    return [at for at, value in enumerate(values) if plateau.reached({metric: value})]


def test_so_many_evaluations_without_a_new_best_end_the_patience() -> None:
    assert ends(Plateau(2), "accuracy", [0.5, 0.4, 0.5, 0.6, 0.6, 0.7, 0.7, 0.7]) == [2, 7]


def test_the_count_begins_anew_when_the_patience_has_ended() -> None:
    assert ends(Plateau(2), "loss", [1, 2, 2, 2, 2, 2]) == [2, 4]


def test_a_loss_falls() -> None:
    assert ends(Plateau(1), "loss", [3, 2, 1, 1, 0.5, 0.75]) == [3, 5]


def test_small_improvements_are_none_but_add_up() -> None:
    values = [1.0, 0.96, 0.92, 0.88, 0.84, 0.83]
    assert ends(Plateau(3, min_delta=0.1), "loss", values) == []
    assert ends(Plateau(2, min_delta=0.1), "loss", values) == [2, 5]


def test_a_value_that_is_not_a_number_is_no_improvement() -> None:
    assert ends(Plateau(2), "loss", [NAN, NAN, 1.0, NAN, 0.5]) == [1]


def test_a_metric_that_is_not_there_counts_for_nothing() -> None:
    plateau = Plateau(1, metric="accuracy")
    assert not plateau.reached({"loss": 1.0})
    assert not plateau.reached({"loss": 1.0})
    assert not plateau.reached({"accuracy": 0.5})
    assert plateau.reached({"accuracy": 0.5})


def test_of_its_options() -> None:
    options = {"patience": 4, "min_delta": 0.5, "metric": "loss", "factor": 0.1}
    assert Plateau.of(options) == Plateau(4, 0.5, "loss")


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 5))
def test_no_patience_ends_sooner_than_it_may(values: list[float], patience: int) -> None:
    before = 0  # the first is always a new best
    for at in ends(Plateau(patience), "accuracy", values):
        assert at - before >= patience
        assert max(values[at - patience + 1 : at + 1]) <= max(values[: at - patience + 1])
        before = at
