"""The coordinator's half of the asynchronous algorithms: tasks for whoever has none.

Downpour needs nothing else. `clocks` makes it stale-synchronous: a worker counts while it holds a
task. `warm_start` begins with one worker and lets the others follow one by one, as DistBelief did
for stability (Dean et al., 2012, section 5); those that wait have pulled and may evaluate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsgd_cli.engine.algorithms.base import Left, Reached, Strategy
from dsgd_cli.engine.algorithms.stale_synchronous import Clocks
from dsgd_cli.engine.events import (
    Advance,
    Answered,
    Decision,
    FromStrategyWorker,
    Grant,
    Report,
    Ticked,
)
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.tasks import TaskQueue

TASKS_HELD = 2  # the one in hand and the next


@dataclass(frozen=True, slots=True)
class WarmStart:
    """`until`, `then_add_every`: (count, unit)."""

    until: tuple[float, str]
    then_add_every: tuple[float, str]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> WarmStart:
        until, then = options["until"], options["then_add_every"]
        return cls((until["count"], until["unit"]), (then["count"], then["unit"]))

    def admitted(self, begun: Reached | None, reached: Reached) -> int:
        """How many workers train; `begun`: when one alone had trained for long enough."""
        if begun is None:
            return 1
        count, unit = self.then_add_every
        return 2 + int((_so_far(unit, reached) - _so_far(unit, begun)) // count)

    def ends(self, reached: Reached) -> bool:
        """Whether one worker has trained alone for long enough."""
        count, unit = self.until
        return _so_far(unit, reached) >= count


def _so_far(unit: str, reached: Reached) -> float:
    so_far = {"epoch": reached.epochs, "step": reached.steps, "s": reached.elapsed_s}
    return float(so_far[unit])


class Streaming(Strategy):
    """Who is given an evaluation counts until it says that it has no clock in hand."""

    def __init__(
        self,
        queue: TaskQueue,
        clocks: Clocks | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        super().__init__()
        self._queue = queue
        self._clocks = clocks
        self._warm_start = warm_start
        self._begun: Reached | None = None  # when the others begin to follow
        self._admitted: set[int] = set()

    @property
    def epochs(self) -> int:
        return self._queue.complete

    def join(self, worker: int) -> None:
        if self._warm_start is None:
            self._queue.join(worker)  # else when it is admitted: till then it has no share
        if self._clocks is not None:
            self._clocks.join(worker)

    def leave(self, worker: int) -> Left:
        self._away.discard(worker)
        self._admitted.discard(worker)
        if self._clocks is not None:
            self._clocks.leave(worker)
        return self._queue.leave(worker)

    def put_back(self, left: Left) -> None:
        self._queue.put_back(left)

    def withdraw(self, worker: int) -> None:
        if self._clocks is not None:
            self._clocks.pause(worker)
        self._queue.put_back(self._queue.withdraw(worker))

    def expects(self, worker: int) -> bool:
        blocked = self._clocks is not None and self._clocks.blocked(worker)
        return self._queue.held(worker) > 0 and not blocked

    def batch_s(self, worker: int) -> float | None:
        return self._queue.batch_s(worker)

    def epoch_of(self, report: Report) -> int | None:
        return self._queue.epoch_of(report.worker, report.task_id)

    def report(self, report: Report, now_s: float) -> None:
        self._steps += report.steps
        busy_s = report.pull_s + report.compute_s + report.push_s
        self._complete += self._queue.report(
            report.worker, report.task_id, report.done_upto, report.examples, busy_s
        )

    def take(self, event: FromStrategyWorker | Answered, now_s: float) -> None:
        if isinstance(event, Ticked) and self._clocks is not None:
            again = self._clocks.has(event.worker, event.clock)
            self._clocks.completed(event.worker, event.clock)
            if again and event.worker in self._away:
                self._clocks.pause(event.worker)

    def work(self, members: Sequence[Member], reached: Reached) -> Iterator[Decision]:
        """Tasks, first to those that have none, until all have two or nothing is free for them."""
        members = self._admit(members, reached)
        queue = self._queue
        partition = queue.partitions.of
        offers = queue.offers()  # first: at each event nearly all may wait for the other hosts
        hungry = [m for m in members if partition(m.worker) in offers]
        while hungry := [m for m in hungry if queue.held(m.worker) < TASKS_HELD]:
            member = min(hungry, key=lambda m: (queue.held(m.worker), m.turn))
            task = queue.lease(member.worker, self._batches_left(reached))
            if task is not None:
                yield Grant(member.worker, task)
                continue
            dry = partition(member.worker)
            hungry = [m for m in hungry if partition(m.worker) != dry]
        if self._clocks is not None:
            yield from self._tell(self._clocks, members)

    def _admit(self, members: Sequence[Member], reached: Reached) -> Sequence[Member]:
        """Those that train: who has been admitted stays so, whoever joins."""
        if self._warm_start is None:
            return members
        if self._begun is None and self._warm_start.ends(reached):
            self._begun = reached
        first = sorted(members, key=lambda m: (m.worker not in self._admitted, m.worker))
        admitted = first[: self._warm_start.admitted(self._begun, reached)]
        for member in admitted:
            self._admitted.add(member.worker)
            self._queue.join(member.worker)
        return admitted

    def _tell(self, clocks: Clocks, members: Sequence[Member]) -> Iterator[Decision]:
        """Who has a task counts. Who is to evaluate is told of no further ones."""
        here = [member.worker for member in members if member.worker not in self._away]
        for worker in here:
            (clocks.resume if self._queue.held(worker) > 0 else clocks.pause)(worker)
        for worker, limit in clocks.news():
            if worker in here:
                yield Advance(worker, limit)

    def _batches_left(self, reached: Reached) -> int | None:
        """So that `max_steps` is met, and not overrun by what is queued."""
        if reached.max_steps is None:
            return None
        return reached.max_steps - reached.steps - self._queue.outstanding_batches()
