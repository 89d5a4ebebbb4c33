"""What the scenarios do not show: records, progress, pace. Scenarios tell the rest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from dsgd_cli.engine import events as e
from dsgd_cli.engine.ledger import WINDOW_S
from dsgd_cli.engine.schedule import Schedule
from dsgd_cli.engine.training import PROGRESS_S, Phase, Training

TENSORS = (("W", (4, 2)),)


def settings(every: e.Every | None = None, **until: Any) -> e.Settings:
    return e.Settings(0, 10, e.Until(**until), every or e.Every())


def trained(workers: int, examples: int, now_s: float = 0.0, **until: Any) -> Training:
    """A machine in TRAINING, with its first tasks granted."""
    machine = Training(settings(**until))
    for worker in range(workers):
        machine.on(e.WorkerJoined(worker, 1), now_s)
    for worker in range(workers):
        machine.on(e.Prepared(worker, 1, TENSORS, "float32", examples, "d"), now_s)
    machine.on(e.Configured(), now_s)
    machine.on(e.Initialised(0, 1), now_s)
    assert machine.phase is Phase.TRAINING
    return machine


def report(worker: int, task: int, upto: int, **more: Any) -> e.Report:
    plain = e.Report(worker, 1, task, upto, steps=1, examples=10, loss_sum=5.0, loss_count=10)
    return replace(plain, **more)


def records(decisions: list[e.Decision], kind: str) -> list[dict[str, Any]]:
    found = [d.fields for d in decisions if isinstance(d, e.Record)]
    return [fields for fields in found if fields["kind"] == kind]


def only(decisions: list[e.Decision], kind: type[e.Decision]) -> list[Any]:
    return [decision for decision in decisions if isinstance(decision, kind)]


def test_reports_of_a_worker_are_summed_into_one_record() -> None:
    machine = trained(2, 1000, now_s=10.0)
    first = report(0, 1, 10, staleness={4: 1}, shard_bytes=(60, 40), pull_s=0.1)
    assert records(machine.on(first, 10.0), "report") == []
    other = report(1, 2, 50, loss_sum=100.0)
    assert records(machine.on(other, 10.0 + WINDOW_S / 2), "report") == []
    second = report(
        *(0, 1, 20),
        staleness={1: 2},
        shard_bytes=(30, 20),
        compute_s=0.2,
        push_s=0.3,
        loss_sum=15.0,
    )
    assert records(machine.on(second, 10.0 + WINDOW_S), "report") == [
        {
            "kind": "report",
            "time": WINDOW_S,
            "step": 3,
            "epoch": 1,
            "worker": 0,
            "steps": 2,
            "examples": 20,
            "loss": 1.0,
            "staleness": 2.0,
            "staleness_max": 4,
            "dropped": 0,
            "bytes": 150,
            "shard_bytes": [90, 60],
            "pull_s": 0.1,
            "compute_s": 0.2,
            "push_s": 0.3,
        }
    ]


def test_what_is_left_of_the_reports_is_written_before_the_end() -> None:
    machine = trained(1, 1000)
    machine.on(report(0, 1, 10), 0.0)
    failure = e.Failure("server/0", "gone")
    last = machine.on(e.RunFailed(failure), 0.1)
    assert [line["steps"] for line in records(last, "report")] == [1]
    assert isinstance(last[-1], e.Finish)
    assert last[-1].failure is failure
    assert machine.on(e.Tick(), 9.0) == []


def test_progress_comes_four_times_a_second_whatever_happens() -> None:
    machine = trained(1, 100_000, accuracy=0.9, max_epochs=7)
    seen = []
    for hundredth in range(1, 201):
        now = hundredth / 100
        seen += only(machine.on(report(0, 1, 10), now), e.Progress)
        seen += only(machine.on(e.Tick(), now), e.Progress)
    assert len(seen) in (int(2 / PROGRESS_S) - 1, int(2 / PROGRESS_S))
    last = seen[-1].fields
    assert last["loss"] == 0.5
    assert last["examples_per_s"] == pytest.approx(1000, rel=0.05)
    assert last["limits"] == {"accuracy": 0.9, "max_epochs": 7}
    assert (last["metric"], last["value"], last["workers"]) == ("accuracy", None, 1)


def test_everything_for_people_is_strict_json() -> None:
    machine = trained(1, 10, every=e.Every(1, "epoch"))
    out = machine.on(report(0, 1, 10, loss_sum=math.nan), 1.0)
    out += machine.on(e.Evaluated(0, 1, 1, {"loss": 1.0, "odd": math.inf}), 1.0)
    out += machine.on(e.StopRequested("enough"), 2.0)
    out += machine.on(e.Drained(0, 1), 2.0) + machine.on(e.Frozen(), 2.0)
    out += machine.on(e.Evaluated(0, 1, 2, {"loss": math.nan}), 2.0) + machine.on(e.Exported(), 2.0)
    finish = out[-1]
    assert isinstance(finish, e.Finish)
    assert finish.outcome == "diverged"
    assert dict(finish.metrics) == {}
    for decision in out:
        if isinstance(decision, (e.Record, e.Progress)):
            json.dumps(decision.fields, allow_nan=False)


def test_time_that_goes_back_is_ignored() -> None:
    machine = trained(1, 1000, now_s=5.0, max_time_s=2.0)
    machine.on(e.Tick(), 6.9)
    assert only(machine.on(e.Tick(), 3.0), e.Drain) == []
    assert only(machine.on(e.Tick(), 7.0), e.Drain) == [e.Drain(0)]


def test_a_limit_that_passes_while_the_frozen_vector_is_judged_ends_the_run() -> None:
    machine = trained(1, 10, accuracy=0.9, max_time_s=1.0)
    machine.on(report(0, 1, 10), 0.5)
    assert machine.on(e.Evaluated(0, 1, 1, {"accuracy": 0.95}), 0.6)[-1] == e.Drain(0)
    machine.on(e.Drained(0, 1), 0.7)
    machine.on(e.Frozen(), 0.8)
    out = machine.on(e.Evaluated(0, 1, 2, {"accuracy": 0.85}), 1.1)
    assert only(out, e.Export)
    finish = machine.on(e.Exported(), 1.2)[-1]
    assert isinstance(finish, e.Finish)
    assert (finish.outcome, finish.value) == ("stopped", 0.85)
    assert finish.reason == "max_time 1 s reached: accuracy 0.85 < 0.9"
    assert finish.seconds == 0.7


def test_a_worker_with_work_and_no_word_yet_keeps_a_run_from_diverging() -> None:
    machine = trained(2, 80)
    streak = report(0, 1, 30, steps=3, nonfinite_streak=3, nonfinite_where="W")
    assert only(machine.on(streak, 0.1), e.Freeze) == []
    assert only(machine.on(e.WorkerLost(1, 1), 0.2), e.Freeze) == []
    again = report(0, 1, 40, nonfinite_streak=4, nonfinite_where="W")
    assert only(machine.on(again, 0.3), e.Freeze) == [e.Freeze()]


def test_answers_that_nobody_asked_for_change_nothing() -> None:
    machine = trained(1, 100)
    for event in (
        e.Configured(),
        e.Frozen(),
        e.Thawed(),
        e.Exported(),
        e.Initialised(0, 1),
        e.Drained(0, 1),
        e.Fenced(0, 7),
        e.Prepared(0, 1, TENSORS, "float32", 100, "d"),
        e.WorkerJoined(0, 1),
        e.WorkerJoined(0, 0),
        e.Evaluated(0, 1, 1, {"accuracy": 1.0}),
        report(0, 99, 10),
        e.WorkerLost(5, 1),
        e.WorkerFailed(5, 1, "who?"),
    ):
        assert machine.on(event, 0.0) == [], event
    assert machine.phase is Phase.TRAINING


def test_evaluations_skip_what_went_by() -> None:
    schedule = Schedule(e.Every(2, "epoch"))
    state: dict[str, Any] = {"steps": 0, "elapsed_s": 0.0}
    assert not schedule.due(epochs=1, **state)
    assert schedule.due(epochs=7, **state)
    schedule.taken(epochs=7, **state)
    assert not schedule.due(epochs=7, **state)
    assert schedule.due(epochs=8, **state)
    schedule.taken(epochs=8, **state)
    schedule.again()
    assert schedule.due(epochs=8, **state)


@pytest.mark.parametrize(
    ("every", "not_yet", "due"),
    [
        (e.Every(100, "step"), {"steps": 99}, {"steps": 100}),
        (e.Every(0.5, "s"), {"elapsed_s": 0.49}, {"elapsed_s": 0.5}),
    ],
)
def test_evaluations_go_by_steps_or_seconds(
    every: e.Every, not_yet: dict[str, Any], due: dict[str, Any]
) -> None:
    none = {"epochs": 0, "steps": 0, "elapsed_s": 0.0}
    assert not Schedule(every).due(**{**none, **not_yet})
    assert Schedule(every).due(**{**none, **due})
