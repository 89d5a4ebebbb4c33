"""What makes a step of synchronous training, and when it counts, one decision at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsgd_cli.engine.algorithms.base import Reached
from dsgd_cli.engine.algorithms.synchronous import Synchronous
from dsgd_cli.engine.events import Commit, Committed, Report, Work
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import TaskQueue

BATCH = 10
Decisions = list[object]


class Steps:
    """A strategy, its workers, and how far the run is."""

    def __init__(self, workers: int, max_steps: int | None = None) -> None:
        whole = Partitions.whole(100 * BATCH)
        self.strategy = Synchronous(TaskQueue(whole.owners(), BATCH), whole, needed=workers)
        self.members = [Member(worker, 1) for worker in range(workers)]
        self.max_steps = max_steps
        self.steps = 0
        self.has: dict[int, list[Work]] = {worker: [] for worker in range(workers)}
        for worker in range(workers):
            self.strategy.join(worker)

    def work(self) -> Decisions:
        self.steps += self.strategy.steps()
        reached = Reached(0.0, 0.0, self.steps, 0, self.max_steps)
        decisions: Decisions = list(self.strategy.work(self.members, reached))
        for decision in decisions:
            if isinstance(decision, Work):
                self.has[decision.worker].append(decision)
        return decisions

    def report(self, worker: int) -> Decisions:
        work = self.has[worker].pop(0)
        report = Report(
            worker, 1, work.task.id, work.task.stop, steps=1, examples=BATCH, round=work.round
        )
        self.strategy.report(report, 0.0)
        return self.work()

    def handed_out(self) -> list[tuple[int, int]]:
        """(batch, worker) of what nobody has reported, in the order of the batches."""
        works = [work for held in self.has.values() for work in held]
        return sorted((work.task.start // BATCH, work.worker) for work in works)


@pytest.fixture
def two() -> Iterator[Steps]:
    steps = Steps(workers=2)
    steps.work()
    yield steps


def test_a_batch_counts_when_its_update_is_made(two: Steps) -> None:
    """Not when it is reported: at `max_steps` the run would end before the last update."""
    assert two.report(0) == []
    assert two.report(1)[0] == Commit(1, 2, 0.5)
    two.work()
    assert two.steps == 0
    two.strategy.take(Committed(1), 0.0)
    two.work()
    assert two.steps == 2


def test_nothing_of_the_next_step_is_handed_out_before_all_of_this_one() -> None:
    """Whoever evaluates gets the batch that is his when he is back."""
    steps = Steps(workers=3)
    steps.strategy.away(1)
    steps.work()
    assert steps.handed_out() == [(0, 0), (1, 2)]
    steps.strategy.back(1)
    steps.work()
    assert steps.handed_out() == [(0, 0), (1, 2), (2, 1), (3, 0), (4, 1), (5, 2)]


def test_the_last_steps_are_as_large_as_the_others() -> None:
    """What is reported and not made yet is under way: it is not counted twice."""
    steps = Steps(workers=2, max_steps=4)
    steps.work()
    steps.report(0)
    steps.report(1)
    steps.strategy.take(Committed(1), 0.0)
    steps.work()
    assert steps.handed_out() == [(2, 0), (3, 1)]
    assert not any(isinstance(decision, Commit) for decision in steps.report(0))
    assert [d for d in steps.report(1) if isinstance(d, Commit)] == [Commit(2, 2, 0.5)]
