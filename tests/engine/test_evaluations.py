"""Evaluations: which is the best, and what plateaus of them do to the rate and to the run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dsgd_cli.engine import events as e
from dsgd_cli.engine.evaluations import Evaluations
from dsgd_cli.engine.tasks import FIRST_BATCHES
from dsgd_cli.engine.training import Phase, Training

TENSORS = (("W", (4, 2)),)
NAN = math.nan


def kept(name: str) -> e.Kept:
    return e.Kept(f"/run/{name}", 8, "0" * 64)


def settings(until: e.Until | None = None, **more: Any) -> e.Settings:
    until = until or e.Until(max_steps=10**6)
    return e.Settings(0, 10, until, e.Every(1, "step"), **more)


def decay(patience: int = 2, factor: float = 0.5, metric: str | None = None) -> dict[str, Any]:
    options = {"patience": patience, "min_delta": 0.0, "metric": metric, "factor": factor}
    return {"decay": {"name": "plateau", "options": options}}


def answer(
    evaluations: Evaluations,
    metrics: dict[str, float],
    keeps: str | None = None,
    frozen: bool = False,
) -> e.Evaluate:
    """One evaluation, begun and answered."""
    reached = {"epochs": 0, "steps": 1, "elapsed_s": 0.0}
    (order,) = evaluations.begin({0: 1}, frozen, 0.0, reached)
    where = None if keeps is None else kept(keeps)
    event = e.Evaluated(0, 1, order.evaluation_id, metrics, where)
    assert evaluations.answer(event, 1.0, step=order.evaluation_id) is not None
    return order


def test_the_best_is_kept_with_its_step_and_the_next_is_told_of_it() -> None:
    evaluations = Evaluations(settings(e.Until(accuracy=0.9)))
    assert math.isnan(answer(evaluations, {"accuracy": 0.5, "loss": 3.0}, "a").best)
    assert answer(evaluations, {"accuracy": 0.7, "loss": 4.0}, "b").best == 0.5
    assert answer(evaluations, {"accuracy": 0.6, "loss": 1.0}).best == 0.7
    metrics = {"accuracy": 0.7, "loss": 4.0}
    assert evaluations.best == e.Best("accuracy", 0.7, 2, 0, kept("b"), metrics)


def test_with_a_loss_to_reach_the_best_has_the_least() -> None:
    evaluations = Evaluations(settings(e.Until(loss=0.1)))
    for name, loss in [("a", 3.0), ("b", 1.0), ("c", NAN), ("d", 2.0)]:
        answer(evaluations, {"accuracy": 0.5 + loss, "loss": loss}, name)
    assert evaluations.best is not None
    assert (evaluations.best.metric, evaluations.best.kept) == ("loss", kept("b"))


def test_what_nobody_kept_is_not_the_best() -> None:
    evaluations = Evaluations(settings())
    answer(evaluations, {"accuracy": 0.9})
    assert evaluations.best is None
    answer(evaluations, {"odd": 0.9}, "a")
    assert evaluations.best is None
    answer(evaluations, {"accuracy": 0.8}, "b")
    assert evaluations.best is not None and evaluations.best.value == 0.8


def test_a_frozen_vector_may_be_the_best_and_is_on_no_plateau() -> None:
    evaluations = Evaluations(settings(optimizer=decay(patience=1)))
    answer(evaluations, {"accuracy": 0.5}, "a")
    answer(evaluations, {"accuracy": 0.4}, frozen=True)
    assert evaluations.judged and evaluations.rate == 1.0
    answer(evaluations, {"accuracy": 0.6}, "b", frozen=True)
    assert evaluations.best is not None and evaluations.best.kept == kept("b")
    answer(evaluations, {"accuracy": 0.5})
    assert evaluations.rate == 0.5 and not evaluations.judged


def test_each_plateau_multiplies_the_rate() -> None:
    evaluations = Evaluations(settings(optimizer=decay(patience=2, factor=0.5)))
    rates = []
    for accuracy in (0.5, 0.5, 0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5):
        answer(evaluations, {"accuracy": accuracy})
        rates.append(evaluations.rate)
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("optimizer", [{}, {"decay": None}, {"decay": {"name": "constant"}}])
def test_without_a_plateau_the_rate_stays(optimizer: dict[str, Any]) -> None:
    evaluations = Evaluations(settings(optimizer=optimizer))
    for _ in range(9):
        answer(evaluations, {"accuracy": 0.5})
    assert evaluations.rate == 1.0 and evaluations.ended_by is None


@pytest.mark.parametrize(
    ("metric", "metrics", "absent"),
    [
        ("accuracy", {"loss": 1.0}, ["optimizer.decay.plateau"]),
        (None, {"perplexity": 3.0}, ["optimizer.decay.plateau"]),
        (None, {"loss": 1.0}, []),
        ("loss", {"loss": 1.0, "accuracy": 0.5}, []),
    ],
)
def test_a_plateau_of_what_the_model_does_not_measure_is_named(
    metric: str | None, metrics: dict[str, float], absent: list[str]
) -> None:
    assert Evaluations(settings(optimizer=decay(metric=metric))).missing(metrics) == absent


def test_all_that_waits_for_a_metric_is_named() -> None:
    plateau = {"patience": 2, "min_delta": 0.0, "metric": None}
    evaluations = Evaluations(settings(e.Until(accuracy=0.9, plateau=plateau)))
    assert evaluations.missing({}) == ["until.accuracy", "until.plateau"]


def test_answers_to_what_is_not_under_way_are_none() -> None:
    evaluations = Evaluations(settings())
    reached = {"epochs": 0, "steps": 1, "elapsed_s": 0.0}
    (order,) = evaluations.begin({3: 1}, False, 0.0, reached)
    assert evaluations.is_with(3) and not evaluations.is_with(0)
    for worker, number in [(3, order.evaluation_id + 1), (0, order.evaluation_id)]:
        stray = e.Evaluated(worker, 1, number, {"accuracy": 1.0}, kept("x"))
        assert evaluations.answer(stray, 1.0, step=1) is None
    assert evaluations.now is not None and evaluations.best is None
    assert not evaluations.due({**reached, "steps": 9})
    evaluations.drop(again=True)
    assert evaluations.due(reached)


@pytest.mark.parametrize("weights", [(10, 17, 34), (240, 120), (7,)])
def test_where_all_hosts_are_right_so_is_their_mean(weights: tuple[int, ...]) -> None:
    evaluations = Evaluations(settings())
    of = dict(enumerate(weights))
    for order in evaluations.begin(of, True, 0.0, {"epochs": 0, "steps": 1, "elapsed_s": 0.0}):
        event = e.Evaluated(order.worker, 1, order.evaluation_id, {"accuracy": 1.0}, None)
        evaluations.answer(event, 1.0, step=1)
    assert evaluations.metrics == {"accuracy": 1.0}


# ── in the run ─────────────────────────────────────────────────────────────────────────────────


class Run:
    """A machine in TRAINING whose only worker is asked to evaluate after each step."""

    def __init__(self, until: e.Until, optimizer: dict[str, Any] | None = None) -> None:
        self.machine = Training(settings(until, optimizer=optimizer or {}))
        self.out: list[e.Decision] = []
        self.done = 0
        self.feed(e.WorkerJoined(0, 1))
        self.feed(e.Prepared(0, 1, TENSORS, "float32", 10_000, "d"))
        self.feed(e.Configured())
        self.feed(e.Initialised(0, 1))

    def feed(self, event: e.Event) -> list[e.Decision]:
        self.out = self.machine.on(event, 0.0)
        return self.out

    def only(self, kind: type[e.Decision]) -> list[Any]:
        return [decision for decision in self.out if isinstance(decision, kind)]

    def batch(self) -> None:
        task = 1 + self.done // (FIRST_BATCHES * 10)
        self.done += 10
        self.feed(e.Report(0, 1, task, self.done, steps=1, examples=10))

    def step(self) -> e.Evaluate:
        """One more batch, and the evaluation that it makes due."""
        self.batch()
        (order,) = self.only(e.Evaluate)
        return order  # type: ignore[no-any-return]

    def answer(self, order: e.Evaluate, keeps: str | None = None, **metrics: float) -> None:
        where = None if keeps is None else kept(keeps)
        self.feed(e.Evaluated(0, 1, order.evaluation_id, metrics, where))

    def evaluate(self, keeps: str | None = None, **metrics: float) -> None:
        self.answer(self.step(), keeps, **metrics)

    def judged(self, keeps: str | None = None, **metrics: float) -> None:
        """From Drain to the answer on the frozen vector."""
        self.feed(e.Drained(0, 1))
        self.feed(e.Frozen())
        (order,) = self.only(e.Evaluate)
        assert order.frozen
        self.answer(order, keeps, **metrics)

    def finish(self) -> e.Finish:
        self.feed(e.Exported())
        (finish,) = self.only(e.Finish)
        return finish  # type: ignore[no-any-return]


def test_a_plateau_tells_the_servers_a_lower_rate_once() -> None:
    run = Run(e.Until(max_steps=1000), decay(patience=2, factor=0.5))
    told = []
    for accuracy in (0.5, 0.5, 0.5, 0.5, 0.5, 0.6):
        run.evaluate(accuracy=accuracy)
        told.append(run.only(e.SetRate))
        records = [r.fields for r in run.only(e.Record) if r.fields.get("event") == "rate"]
        assert [fields["factor"] for fields in records] == [rate.factor for rate in told[-1]]
    assert told == [[], [], [e.SetRate(0.5)], [], [e.SetRate(0.25)], []]


def plateau(patience: int = 2) -> dict[str, Any]:
    return {"patience": patience, "min_delta": 0.0, "metric": None}


def test_a_plateau_ends_a_run_without_targets_as_finished() -> None:
    run = Run(e.Until(plateau=plateau()))
    for accuracy in (0.5, 0.6, 0.6):
        run.evaluate(accuracy=accuracy)
        assert run.machine.phase is Phase.TRAINING
    run.evaluate(accuracy=0.4)
    assert run.only(e.Drain)
    run.judged(accuracy=0.55)
    finish = run.finish()
    assert (finish.outcome, finish.value) == ("finished", 0.55)
    assert finish.reason == "plateau: no better accuracy in 2 evaluations"


def test_a_plateau_before_the_target_stops_the_run() -> None:
    run = Run(e.Until(loss=0.1, plateau=plateau(1)))
    run.evaluate(loss=1.0)
    run.evaluate(loss=1.0)
    run.judged(loss=1.0)
    finish = run.finish()
    assert finish.outcome == "stopped"
    assert finish.reason == "plateau: no better loss in 1 evaluations: loss 1 > 0.1"


def test_a_plateau_does_not_hide_a_target_that_is_reached() -> None:
    run = Run(e.Until(accuracy=0.6, plateau={**plateau(1), "metric": "loss"}))
    run.evaluate(accuracy=0.5, loss=1.0)
    run.evaluate(accuracy=0.7, loss=1.0)  # both at once
    run.judged(accuracy=0.65, loss=1.0)
    assert run.finish().outcome == "converged"


def test_who_thaws_may_still_end_by_a_plateau() -> None:
    run = Run(e.Until(accuracy=0.6, plateau={**plateau(1), "metric": "loss"}))
    run.evaluate(accuracy=0.7, loss=1.0)
    run.judged(accuracy=0.5, loss=9.0)  # counts for no plateau
    run.feed(e.Thawed())
    assert run.machine.phase is Phase.TRAINING


def test_the_best_comes_home_with_the_last() -> None:
    run = Run(e.Until(max_steps=3))
    run.evaluate("a", accuracy=0.5)
    run.evaluate("b", accuracy=0.8)
    run.batch()
    run.judged(accuracy=0.7)
    finish = run.finish()
    assert (finish.value, finish.steps) == (0.7, 3)
    assert finish.best == e.Best("accuracy", 0.8, 2, 0, kept("b"), {"accuracy": 0.8})


def test_dropped_and_stale_pushes_are_in_the_summary() -> None:
    run = Run(e.Until(max_steps=2))
    run.feed(e.Report(0, 1, 1, 10, steps=1, examples=10, staleness={2: 1}, dropped=1))
    run.feed(e.Report(0, 1, 1, 20, steps=1, examples=10, staleness={0: 1, 2: 1}, dropped=2))
    run.feed(e.RunFailed(e.Failure("server/0", "gone")))
    (finish,) = run.only(e.Finish)
    assert (finish.dropped, finish.staleness) == (3, {0: 1, 2: 2})
