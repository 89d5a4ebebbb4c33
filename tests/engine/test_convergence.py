"""Targets, limits, divergence."""

from __future__ import annotations

import math

import pytest

from dsgd_cli.engine import convergence as c
from dsgd_cli.engine.convergence import Streak
from dsgd_cli.engine.events import Until


@pytest.mark.parametrize(
    ("until", "metrics", "holds", "said"),
    [
        (Until(accuracy=0.9), {"accuracy": 0.9, "loss": 9}, True, "accuracy 0.9 >= 0.9"),
        (Until(accuracy=0.9), {"accuracy": 0.89}, False, "accuracy 0.89 < 0.9"),
        (Until(loss=0.1), {"loss": 0.1}, True, "loss 0.1 <= 0.1"),
        (Until(loss=0.1), {"loss": 0.2, "accuracy": 1.0}, False, "loss 0.2 > 0.1"),
        (
            Until(loss=0.1, accuracy=0.9),
            {"loss": 0.05, "accuracy": 0.8},
            False,
            "accuracy 0.8 < 0.9, loss 0.05 <= 0.1",
        ),
        (Until(loss=0.1, accuracy=0.9), {"loss": 0.05, "accuracy": 0.95}, True, None),
        (Until(max_epochs=1), {"loss": 0.0}, False, ""),
        (Until(loss=0.1), {"loss": math.nan}, False, "loss nan > 0.1"),
        (Until(accuracy=0.5), {"accuracy": math.nan}, False, "accuracy nan < 0.5"),
        (Until(accuracy=0.5), {}, False, "accuracy unknown < 0.5"),
        (Until(accuracy=0.0, loss=0.0), {"accuracy": 0.0, "loss": 0.0}, True, None),
    ],
)
def test_targets(until: Until, metrics: dict[str, float], holds: bool, said: str | None) -> None:
    assert c.holds(until, metrics) is holds
    if said is not None:
        assert c.describe(until, metrics) == said


def test_a_target_without_a_metric_is_noticed() -> None:
    assert c.missing(Until(accuracy=0.9, loss=0.1), {"loss": 1.0}) == ("accuracy",)
    assert c.missing(Until(max_steps=3), {}) == ()


@pytest.mark.parametrize(
    ("until", "reached"),
    [
        (Until(max_epochs=3), "max_epochs 3 reached"),
        (Until(max_epochs=4), None),
        (Until(max_steps=100), "max_steps 100 reached"),
        (Until(max_steps=101), None),
        (Until(max_time_s=2.5), "max_time 2.5 s reached"),
        (Until(max_time_s=2.6), None),
        (Until(), None),
        (Until(max_epochs=0), "max_epochs 0 reached"),
    ],
)
def test_limits(until: Until, reached: str | None) -> None:
    assert c.limit(until, epochs=3, steps=100, elapsed_s=2.5) == reached


def test_limits_for_people_leave_out_what_is_not_set() -> None:
    assert c.limits(Until(accuracy=0.9, max_epochs=3)) == {"accuracy": 0.9, "max_epochs": 3}


def test_gradients_diverge_when_every_worker_has_a_streak() -> None:
    bad, worse = Streak(0, 3, 17, "W1"), Streak(1, 5, 16, "b1")
    said = c.diverged_gradients([bad, worse])
    assert said is not None
    assert "last 3 gradients" in said
    assert "step 17, worker/0, tensor W1" in said
    assert c.diverged_gradients([bad, worse, Streak(2, 2, 18, "W1")]) is None
    assert c.diverged_gradients([]) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_not_finite_diverges(loss: float) -> None:
    said = c.diverged_evaluation({"loss": loss, "accuracy": 0.1}, step=7, worker=2)
    assert said is not None
    assert "step 7" in said
    assert "worker/2" in said


def test_other_metrics_may_be_what_they_are() -> None:
    assert c.diverged_evaluation({"loss": 1.0, "ratio": math.nan}, step=7, worker=2) is None
    assert c.diverged_evaluation({}, step=7, worker=2) is None
