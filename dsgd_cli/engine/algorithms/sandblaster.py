"""Sandblaster: batch methods whose gradients come from all workers, portion by portion.

Source: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, section 4.2. The method
(`search`) says what it needs next: operations on the shards' vectors, or a pass over all examples,
for which portions are handed out (`portions`). Each portion is a part of a round of sums, so it
counts once, whichever copy of it came first; the pass is complete when all shards have every part.
Losses are summed here, from the copies that count.

The method rests after each step, when the parameters are those of the step: then, and only then,
the run may evaluate them. When training ends in the middle of a step, the parameters are set back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsgd_cli.engine.algorithms import search
from dsgd_cli.engine.algorithms.base import Left, Reached, Strategy
from dsgd_cli.engine.events import (
    Answered,
    Decision,
    FromStrategyWorker,
    Late,
    Operate,
    Operated,
    Report,
    Work,
)
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.portions import Paces, Portions
from dsgd_cli.engine.tasks import EpochRecord, Task
from dsgd_cli.engine.vectors import PARAMETERS, Combine, Op

HELD = 2  # portions of a worker: the one in hand and the next


@dataclass(frozen=True, slots=True)
class Copy:
    """A portion as one worker has it."""

    task: Task
    worker: int
    portion: int
    round: int


class Sandblaster(Strategy):
    """`share`: portions of a pass for each worker."""

    def __init__(
        self, settings: search.Settings, partitions: Partitions, workers: int, share: int
    ) -> None:
        super().__init__()
        self._method = search.search(settings)
        self._partitions = partitions
        numbers = range(len(partitions.sizes))
        self._counts = [share * partitions.workers(number, workers) for number in numbers]
        self._request: search.Request | None = next(self._method)
        self._over: str | None = None
        self._asked = False  # the shards are at the operations of the request
        self._restoring = False
        self._number = 0  # of the operations
        self._round = 0  # of the pass
        self._portions: Portions | None = None
        self._loss = 0.0
        self._last_task = 0
        self._copies: dict[int, Copy] = {}  # by task
        self._fetched: dict[int, int] = {}  # worker -> round of its parameters
        self._overtaken: set[int] = set()  # a copy was dropped; nothing was heard since
        self._drop: list[Late] = []
        self._paces = Paces()
        self._passes = 0

    @property
    def epochs(self) -> int:
        return self._passes

    @property
    def stands_still(self) -> bool:
        return True

    @property
    def rests(self) -> bool:
        return isinstance(self._request, search.Step) or self._request is None

    # ── who is there ───────────────────────────────────────────────────────────────────────────

    def join(self, worker: int) -> None:
        self._fetched[worker] = 0

    def leave(self, worker: int) -> Left:
        self.withdraw(worker)
        self._fetched.pop(worker, None)
        self._away.discard(worker)
        self._overtaken.discard(worker)
        return ()  # a portion counts once, whoever else still contributes it

    def put_back(self, left: Left) -> None:
        """Nothing is ever held back."""

    def withdraw(self, worker: int) -> None:
        for task_id, copy in tuple(self._copies.items()):
            if copy.worker == worker:
                del self._copies[task_id]
        if self._portions is not None:
            self._portions.leave(worker)

    def back(self, worker: int) -> None:
        super().back(worker)
        self._overtaken.discard(worker)

    def expects(self, worker: int) -> bool:
        return any(copy.worker == worker for copy in self._copies.values())

    def lags(self, worker: int) -> bool:
        return worker in self._overtaken

    def batch_s(self, worker: int) -> float | None:
        return self._paces.of(worker)

    # ── what happened ──────────────────────────────────────────────────────────────────────────

    def epoch_of(self, report: Report) -> int | None:
        copy = self._copies.get(report.task_id)
        return copy.task.epoch if copy is not None and copy.worker == report.worker else None

    def report(self, report: Report, now_s: float) -> None:
        copy = self._copies[report.task_id]
        self._overtaken.discard(copy.worker)
        if report.done_upto < copy.task.stop:
            return
        del self._copies[report.task_id]
        if self._portions is None or copy.round != self._round:
            return
        counts, others = self._portions.done(copy.worker, copy.portion, now_s)
        if counts:
            self._loss += report.loss_sum
            self._cancel(copy.portion, others)
        if self._portions.complete:
            self._passed(self._portions)

    def take(self, event: FromStrategyWorker | Answered, now_s: float) -> None:
        if isinstance(event, Operated) and event.number == self._number and self._asked:
            self._asked = False
            if self._restoring:
                self._restoring = False
            else:
                self._answer(event.numbers)

    def _cancel(self, portion: int, workers: Sequence[int]) -> None:
        for task_id, copy in tuple(self._copies.items()):
            if copy.portion == portion and copy.round == self._round and copy.worker in workers:
                del self._copies[task_id]
                self._overtaken.add(copy.worker)
                self._drop.append(Late(copy.worker, task_id))

    def _passed(self, portions: Portions) -> None:
        self._portions = None
        self._passes += 1
        n = self._partitions.examples
        self._complete.append(EpochRecord(self._passes, n, n, n))
        self._answer(search.Passed(self._loss, n, self._round, portions.count))

    def _answer(self, answer: search.Answer) -> None:
        try:
            self._request = self._method.send(answer)
        except StopIteration as end:
            self._request, self._over = None, end.value
        if isinstance(self._request, search.Step) and self._request.number > 0:
            self._steps += 1

    # ── what to do about it ────────────────────────────────────────────────────────────────────

    def work(self, members: Sequence[Member], reached: Reached) -> Iterator[Decision]:
        dropped, self._drop = self._drop, []
        yield from dropped
        if isinstance(self._request, search.Step):  # nobody wants to evaluate it now
            self._answer(None)
        if isinstance(self._request, search.Compute) and not self._asked:
            yield self._operate(self._request.ops)
        elif isinstance(self._request, search.Pass):
            yield from self._hand_out(members, reached.now_s)

    def _operate(self, ops: tuple[Op, ...]) -> Operate:
        self._asked = True
        self._number += 1
        return Operate(self._number, ops)

    def _hand_out(self, members: Sequence[Member], now_s: float) -> Iterator[Decision]:
        if self._portions is None:
            self._round += 1
            self._loss = 0.0
            self._portions = Portions(self._partitions, self._counts, self._paces)
        free = [m for m in members if m.worker not in self._away and m.worker in self._fetched]
        held = Counter(copy.worker for copy in self._copies.values())
        while hungry := [m for m in free if held[m.worker] < HELD]:
            member = min(hungry, key=lambda m: (held[m.worker], m.turn))
            portion = self._portions.next(member.worker, now_s)
            if portion is None:
                free.remove(member)
                continue
            held[member.worker] += 1
            yield self._work(self._portions, member.worker, portion, now_s)

    def _work(self, portions: Portions, worker: int, portion: int, now_s: float) -> Work:
        self._last_task += 1
        partition = self._partitions.of(worker)
        task = Task(self._last_task, self._passes + 1, *portions.bounds(portion), partition)
        self._copies[task.id] = Copy(task, worker, portion, self._round)
        fetch = self._fetched[worker] != self._round
        self._fetched[worker] = self._round
        return Work(worker, task, self._round, portion, fetch=fetch)

    def end(self) -> Iterator[Decision]:
        """In the middle of a step the parameters are a trial's: back to the step before."""
        if not self.rests and self._number > 1:
            self._restoring = True
            yield self._operate((Combine(PARAMETERS, ((1.0, "x0"),)),))

    def over(self) -> str | None:
        return self._over
