"""Who is handed tasks, when, and how many: warm start, max_steps, evaluations."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from dsgd_cli.engine import events as e
from dsgd_cli.engine.algorithms.base import Reached
from dsgd_cli.engine.algorithms.stale_synchronous import Clocks
from dsgd_cli.engine.algorithms.streaming import TASKS_HELD, Streaming, WarmStart
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import Task, TaskQueue
from dsgd_cli.engine.training import Phase, Training

BATCH = 10
TENSORS = (("W", (4, 2)),)


def warm(until: tuple[float, str], then: tuple[float, str]) -> WarmStart:
    return WarmStart(until, then)


@dataclass
class Cluster:
    """A strategy, and members that hold what they were granted."""

    strategy: Streaming
    members: dict[int, Member] = field(default_factory=dict)
    tasks: dict[int, list[Task]] = field(default_factory=dict)
    steps: int = 0
    elapsed_s: float = 0.0
    max_steps: int | None = None
    turns: int = 0

    def join(self, *workers: int) -> None:
        for worker in workers:
            self.members[worker] = Member(worker, 1)
            self.tasks[worker] = []
            self.strategy.join(worker)

    def leave(self, worker: int) -> None:
        del self.members[worker], self.tasks[worker]
        self.strategy.put_back(self.strategy.leave(worker))

    def work(self) -> list[e.Decision]:
        reached = Reached(0.0, self.elapsed_s, self.steps, self.strategy.epochs, self.max_steps)
        out = []
        for decision in self.strategy.work(list(self.members.values()), reached):
            out.append(decision)
            if isinstance(decision, e.Grant):
                self.tasks[decision.worker].append(decision.task)
                self.turns += 1
                self.members[decision.worker].turn = self.turns
        return out

    def trains(self) -> set[int]:
        """Who is given tasks now."""
        granted = [d.worker for d in self.work() if isinstance(d, e.Grant)]
        return set(granted)

    def finish(self, worker: int) -> None:
        """The worker's first task."""
        task = self.tasks[worker].pop(0)
        size = task.stop - task.start
        steps = -(-size // BATCH)
        self.steps += steps
        self.strategy.report(e.Report(worker, 1, task.id, task.stop, steps, size), 0.0)


def cluster(
    examples: int = 10_000,
    warm_start: WarmStart | None = None,
    clocks: Clocks | None = None,
    max_steps: int | None = None,
) -> Cluster:
    queue = TaskQueue(Partitions.whole(examples), BATCH)
    return Cluster(Streaming(queue, clocks, warm_start), max_steps=max_steps)


# ── tasks ──────────────────────────────────────────────────────────────────────────────────────


def test_everybody_gets_two_tasks_those_without_any_first() -> None:
    made = cluster()
    made.join(0, 1, 2)
    grants = [d.worker for d in made.work() if isinstance(d, e.Grant)]
    assert grants == [0, 1, 2, 0, 1, 2]
    made.finish(1)
    assert made.trains() == {1}
    assert all(len(tasks) == TASKS_HELD for tasks in made.tasks.values())


def test_whose_partition_is_dry_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a host for each of many workers that would cost more than all the rest of an event."""
    partitions = Partitions((*(BATCH for _ in range(9)), 10_000), tuple(range(10)))
    made = Cluster(Streaming(TaskQueue(partitions, BATCH)))
    made.join(*range(10))
    made.work()
    for worker in range(9):
        while made.tasks[worker]:
            made.finish(worker)
            made.work()
    made.finish(9)
    asked, lease = [], TaskQueue.lease

    def counted(self: TaskQueue, worker: int, max_batches: int | None = None) -> Task | None:
        asked.append(worker)
        return lease(self, worker, max_batches)

    monkeypatch.setattr(TaskQueue, "lease", counted)
    assert made.trains() == {9}
    assert asked == [9]


def test_a_worker_is_expected_at_work_while_it_holds_a_task() -> None:
    made = cluster(examples=20)
    made.join(0)
    assert not made.strategy.expects(0)
    made.work()
    assert made.strategy.expects(0)
    made.strategy.withdraw(0)
    assert not made.strategy.expects(0)
    assert not made.strategy.expects(9)


@pytest.mark.parametrize("max_steps", [1, 7, 13, 50])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_max_steps_is_met_exactly(workers: int, max_steps: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        made = cluster(examples=rng.choice([5, 64, 1001]), max_steps=max_steps)
        made.join(*range(workers))
        while made.steps < max_steps:
            made.work()
            at_work = [worker for worker, tasks in made.tasks.items() if tasks]
            assert at_work, f"{made.steps} of {max_steps}, and nobody has a task"
            worker = rng.choice(at_work)
            if rng.random() < 0.1:  # it dies, and comes back
                made.leave(worker)
                made.join(worker)
            else:
                made.finish(worker)
        assert made.steps == max_steps
        made.work()
        assert not any(made.tasks.values())


# ── clocks ─────────────────────────────────────────────────────────────────────────────────────


def advances(decisions: list[e.Decision]) -> list[tuple[int, int]]:
    return [(d.worker, d.limit) for d in decisions if isinstance(d, e.Advance)]


def test_who_is_blocked_is_not_expected_to_do_anything() -> None:
    made = cluster(clocks=Clocks(1))
    made.join(0, 1)
    assert advances(made.work()) == [(0, 1), (1, 1)]
    made.strategy.take(e.Ticked(0, 1, 2), 0.0)
    made.work()
    assert not made.strategy.expects(0) and made.strategy.expects(1)
    made.strategy.take(e.Ticked(1, 1, 1), 0.0)
    assert advances(made.work()) == [(0, 2), (1, 2)]
    assert made.strategy.expects(0)


def test_nobody_waits_for_who_evaluates_and_it_is_told_when_it_counts_again() -> None:
    made = cluster(clocks=Clocks(0))
    made.join(0, 1)
    made.work()
    made.strategy.away(1)
    made.strategy.take(e.Ticked(1, 1, 0), 0.0)  # it has no clock in hand
    made.strategy.take(e.Ticked(0, 1, 1), 0.0)
    assert advances(made.work()) == [(0, 1)]
    made.strategy.take(e.Ticked(0, 1, 5), 0.0)
    made.work()
    made.strategy.back(1)
    assert advances(made.work()) == [(1, 0)]  # it goes on where the other one is


def test_who_is_to_evaluate_is_waited_for_while_it_has_a_clock_in_hand() -> None:
    made = cluster(clocks=Clocks(0))
    made.join(0, 1)
    assert advances(made.work()) == [(0, 0), (1, 0)]
    made.strategy.away(1)  # in the middle of its first gradient
    made.strategy.take(e.Ticked(0, 1, 1), 0.0)
    assert advances(made.work()) == []
    made.strategy.take(e.Ticked(1, 1, 1), 0.0)
    assert advances(made.work()) == [(0, 1)]  # and nothing new for who is to evaluate
    made.strategy.take(e.Ticked(0, 1, 2), 0.0)
    assert advances(made.work()) == []
    made.strategy.take(e.Ticked(1, 1, 1), 0.0)
    assert advances(made.work()) == [(0, 2)]
    made.strategy.back(1)
    assert advances(made.work()) == [(1, 1)]  # its own second clock, where the other one is


def test_who_is_away_twice_in_a_row_is_told_again() -> None:
    made = cluster(clocks=Clocks(0))
    made.join(0)
    made.work()
    for _ in range(2):  # judging: nothing is handed out between the two
        made.strategy.away(0)
        made.strategy.take(e.Ticked(0, 1, 0), 0.0)
        made.strategy.back(0)
    assert advances(made.work()) == [(0, 0)]


def test_who_drains_instead_of_evaluating_counts_again() -> None:
    made = cluster(clocks=Clocks(0))
    made.join(0)
    made.work()
    made.strategy.away(0)
    made.strategy.withdraw(0)
    made.strategy.back(0)
    made.tasks[0].clear()
    assert advances(made.work()) == [(0, 0)]


def test_who_has_no_task_does_not_count() -> None:
    made = cluster(examples=10, clocks=Clocks(0))
    made.join(0, 1)
    first = made.work()
    busy = {d.worker for d in first if isinstance(d, e.Grant)}
    assert {worker for worker, _ in advances(first)} == busy


# ── warm start ─────────────────────────────────────────────────────────────────────────────────


def test_the_options_of_the_yaml() -> None:
    options = {
        "until": {"count": 1.0, "unit": "epoch"},
        "then_add_every": {"count": 10.0, "unit": "s"},
    }
    assert WarmStart.of(options) == warm((1, "epoch"), (10, "s"))


@pytest.mark.parametrize(
    ("unit", "so_far"), [("step", "steps"), ("s", "elapsed_s"), ("epoch", "epochs")]
)
def test_one_alone_then_one_more_every_so_often(unit: str, so_far: str) -> None:
    start = warm((5, unit), (2, unit))

    def reached(count: float) -> Reached:
        given: dict[str, Any] = {"now_s": 0.0, "elapsed_s": 0.0, "steps": 0, "epochs": 0}
        return Reached(**{**given, so_far: count})

    assert [start.ends(reached(count)) for count in (0, 4, 5, 9)] == [False, False, True, True]
    assert start.admitted(None, reached(99)) == 1
    begun = reached(6)  # noticed late: the others follow from there
    found = [start.admitted(begun, reached(count)) for count in (6, 7, 8, 9, 10, 16)]
    assert found == [2, 2, 3, 3, 4, 7]


def test_units_may_differ() -> None:
    made = cluster(examples=40, warm_start=warm((1, "epoch"), (10, "s")))
    made.join(0, 1, 2)
    made.elapsed_s = 1000.0
    while made.strategy.epochs < 1:
        assert made.trains() == {0}
        made.finish(0)
    assert 1 in made.trains()
    made.elapsed_s += 9.9
    made.finish(0)
    assert 2 not in made.trains()
    made.elapsed_s += 0.2
    assert 2 in made.trains()


def test_the_first_alone_is_given_all_the_work() -> None:
    made = cluster(examples=40, warm_start=warm((100, "step"), (1, "step")))
    made.join(0, 1)
    made.work()
    assert made.tasks[0] and not made.tasks[1]
    assert not made.strategy.expects(1)
    assert made.tasks[0][0].stop == 40  # who waits has no share in the epoch


def test_when_the_first_dies_the_next_one_takes_over() -> None:
    made = cluster(warm_start=warm((100, "step"), (1, "step")))
    made.join(0, 1, 2)
    assert made.trains() == {0}
    lost = made.tasks[0][0]
    made.leave(0)
    assert made.trains() == {1}
    assert made.tasks[1][0].start == lost.start


def test_who_took_over_stays_when_the_first_comes_back() -> None:
    made = cluster(warm_start=warm((100, "step"), (1, "step")))
    made.join(0, 1)
    made.work()
    made.leave(0)
    made.work()
    made.join(0)
    made.finish(1)
    assert made.trains() == {1}
    assert not made.tasks[0]


def test_who_was_admitted_stays_and_the_dead_make_room() -> None:
    made = cluster(warm_start=warm((1, "step"), (1000, "step")))
    made.join(1, 2, 3)
    made.work()
    made.finish(1)
    assert made.trains() == {1, 2}
    made.join(0)
    for worker in (1, 2):
        made.finish(worker)
    assert made.trains() == {1, 2}
    made.leave(1)
    assert made.trains() == {0}  # the lowest of those that wait


def test_who_waits_is_asked_to_evaluate() -> None:
    options = {
        "until": {"count": 100, "unit": "step"},
        "then_add_every": {"count": 1, "unit": "step"},
    }
    algorithm = {"name": "downpour", "warm_start": options}
    until = e.Until(max_steps=10**6)
    machine = Training(e.Settings(0, BATCH, until, e.Every(1, "step"), algorithm))
    for worker in (0, 1):
        machine.on(e.WorkerJoined(worker, 1), 0.0)
        machine.on(e.Prepared(worker, 1, TENSORS, "float32", 1000, "d"), 0.0)
    machine.on(e.Configured(), 0.0)
    out = machine.on(e.Initialised(0, 1), 0.0)
    assert machine.phase is Phase.TRAINING
    assert e.Start(1) in out
    assert {d.worker for d in out if isinstance(d, e.Grant)} == {0}
    asked = []
    for upto in (10, 20, 30):
        out = machine.on(e.Report(0, 1, 1, upto, steps=1, examples=10), 0.1)
        (order,) = [d for d in out if isinstance(d, e.Evaluate)]
        asked.append(order.worker)
        machine.on(e.Evaluated(order.worker, 1, order.evaluation_id, {"loss": 1.0}), 0.2)
    assert asked[0] == 1


def test_a_waiting_worker_is_not_taken_for_hung() -> None:
    made = cluster(warm_start=warm((100, "step"), (1, "step")))
    made.join(0, 1)
    made.work()
    assert made.strategy.expects(0) and not made.strategy.expects(1)
    assert made.strategy.leave(1) == ()
