"""Synchronous SGD with backup workers: the coordinator's half.

Source: J. Chen et al., "Revisiting Distributed Synchronous SGD", 2016, algorithms 3 and 4: of N + b
workers the first N gradients of a step make one update, and whoever is later drops his. The update
is that of one process with a batch of N · B examples.

    hand out ─▶ claim ─▶ accept (the first N) ─▶ contribute ─▶ report ─▶ all N: commit ─▶ next
                  └─▶ wait ─▶ late, once the step is made

A gradient is pushed only once it is accepted, so a late worker sends nothing, and all shards have
the same N. Without backup workers nobody can be late, and everybody is accepted when he is given
his batch. Each worker is also given his batch of the next step, which he begins when he sees the
update in the parameters; he need not hear of it.

The contributions of a step are summed under the number of a *round*: if one of those accepted dies
before his has reached every shard, the next round begins: the survivors contribute theirs once
more, which starts the sums anew, and a claimant who waits, or whoever is free, takes the place. A
batch that was not used goes back to the front of the queue, so that every example counts once in
each epoch, whoever computes it. While fewer than N workers live, they compute more than one batch
of a step, and the steps stay what they are. At the end of the examples a step is of as many batches
as are left. Where hosts have different examples, a batch is computed by those who have its
partition.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from dsgd_cli.engine.algorithms.base import Left, Reached, Strategy
from dsgd_cli.engine.events import (
    Accept,
    Answered,
    Claimed,
    Commit,
    Committed,
    Decision,
    FromStrategyWorker,
    Late,
    Measure,
    Measured,
    Report,
    Work,
)
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import Remainder, Task, TaskQueue

MEMORY = 0.2  # of how long a batch takes a worker: the weight of the newest


@dataclass(slots=True, eq=False)
class Batch:
    """A batch that somebody has, and what became of it."""

    task: Task
    worker: int
    step: int  # whose update it is for
    since_s: float
    computed: bool = False  # it has claimed, or reported
    part: int | None = None  # in the round, if it is accepted
    reported: bool = False  # every shard has it
    finite: bool = True
    gone: bool = False  # the worker is: it can contribute nothing once more


@dataclass(slots=True)
class Synchronous(Strategy):
    """`queue`: its workers are the partitions (`Partitions.owners`), for a batch belongs to its
    step and not to who computes it; `needed`: the gradients of a step; `clip_norm`: of the
    update's gradient.

    When TRAINING ends, what is being committed still is.
    """

    queue: TaskQueue
    partitions: Partitions
    needed: int
    backups: int = 0
    clip_norm: float | None = None
    _step: int = 1
    _round: int = 1
    _batches: dict[int, Batch] = field(default_factory=dict)  # by task
    _held: dict[int, list[Batch]] = field(default_factory=dict)  # by worker, of those who are here
    _waiting: list[int] = field(default_factory=list)  # tasks that have claimed, in order
    _here: set[int] = field(default_factory=set)
    _updates: int = 0  # that are made
    _usual_s: dict[int, float] = field(default_factory=dict)
    _committing: bool = False
    _squares: float | None = None  # of the round, if it has been measured
    _measuring: bool = False
    _again: bool = False  # the round has changed: tell those who are in it
    _skipped: int = 0  # rounds that the next step shall not use
    _pending: int = 0  # batches that nobody may be given before their worker is fenced
    _drop: list[Late] = field(default_factory=list)

    def __post_init__(self) -> None:
        for partition in range(len(self.partitions.sizes)):
            self.queue.join(partition)

    @property
    def epochs(self) -> int:
        return self.queue.complete

    # ── who is there ───────────────────────────────────────────────────────────────────────────

    def join(self, worker: int) -> None:
        self._here.add(worker)

    def leave(self, worker: int) -> Left:
        self._here.discard(worker)
        self._away.discard(worker)
        self._drop = [late for late in self._drop if late.worker != worker]
        left: Left = ()
        for batch in self._held.pop(worker, []):
            batch.gone = True
            if not (self._in_step(batch) and (batch.reported or self._committing)):
                left += self._forget(batch)
        self._pending += len(left)
        return left

    def put_back(self, left: Left) -> None:
        self._pending -= len(left)
        self.queue.put_back(left)

    def withdraw(self, worker: int) -> None:
        for batch in tuple(self._of(worker)):
            if not (self._in_step(batch) and self._committing):
                self.queue.put_back(self._forget(batch))

    def expects(self, worker: int) -> bool:
        mine = [batch for batch in self._of(worker) if batch.step <= self._step]
        return any(not batch.computed or self._owes(batch) for batch in mine)

    def batch_s(self, worker: int) -> float | None:
        known = self._usual_s.get(worker)
        return known if known is not None else min(self._usual_s.values(), default=None)

    # ── what happened ──────────────────────────────────────────────────────────────────────────

    def epoch_of(self, report: Report) -> int | None:
        batch = self._batches.get(report.task_id)
        return batch.task.epoch if batch is not None and batch.worker == report.worker else None

    def report(self, report: Report, now_s: float) -> None:
        """Every shard has the batch's gradient, or it was not finite."""
        batch = self._batches[report.task_id]
        self._computed(batch, now_s)
        batch.finite = report.round != 0
        if batch.part is not None and report.round in (0, self._round_of(batch)):
            batch.reported = True

    def take(self, event: FromStrategyWorker | Answered, now_s: float) -> None:
        match event:
            case Claimed():
                self._claimed(event, now_s)
            case Measured(round_, squares) if round_ == self._round:
                self._squares = squares
            case Committed(round_) if round_ == self._round and self._committing:
                self._updates += 1
                self._stepped()

    def _claimed(self, event: Claimed, now_s: float) -> None:
        batch = self._batches.get(event.task_id)
        if batch is None or batch.worker != event.worker:
            self._drop.append(Late(event.worker, event.task_id))
            return
        self._computed(batch, now_s)
        if batch.part is not None:
            return  # it has been accepted meanwhile
        if batch.step > self._step or (batch.step == self._step and not self._committing):
            self._waiting.append(event.task_id)
        else:
            self._give_up(batch)

    def _computed(self, batch: Batch, now_s: float) -> None:
        if not batch.computed:
            batch.computed = True
            took_s, usual_s = now_s - batch.since_s, self._usual_s.get(batch.worker)
            weight = 1.0 if usual_s is None else MEMORY
            self._usual_s[batch.worker] = (usual_s or 0.0) * (1 - weight) + took_s * weight

    def _stepped(self) -> None:
        """The step is made: its batches count, which may have been reported in vain till now, and
        whoever waits was too late."""
        for batch in self._parts():
            self._remove(batch)
            self._steps += 1
            task, owner = batch.task, batch.task.partition
            self._complete += self.queue.report(owner, task.id, task.stop, _rows(batch), 0.0)
        for task_id in tuple(self._waiting):
            if self._batches[task_id].step == self._step:
                self._give_up(self._batches[task_id])
        self._committing = False
        self._step += 1
        self._begin_round()

    # ── what to do about it ────────────────────────────────────────────────────────────────────

    def work(self, members: Sequence[Member], reached: Reached) -> Iterator[Decision]:
        while True:
            yield from self._tell_late()
            if self._committing:
                return
            yield from self._tell_again()
            yield from self._accept_waiting()
            dry = yield from self._hand_out(members, reached)
            yield from self._tell_late()
            parts = self._complete_parts(dry)
            if not parts:
                return
            finite = [batch for batch in parts if batch.finite]
            if finite:
                yield from self._make_update(finite)
                return
            for batch in tuple(self._batches.values()):  # they wait for an update that never comes
                if batch.step > self._step:
                    self._give_up(batch)
            self._stepped()

    def _tell_late(self) -> Iterator[Decision]:
        dropped, self._drop = self._drop, []
        yield from dropped

    def _accept_waiting(self) -> Iterator[Decision]:
        if self.backups == 0:  # nobody need ask
            for batch in self._of_step(self._step):
                if batch.part is None:
                    yield self._accept(batch)
        for task_id in tuple(self._waiting):
            batch = self._batches[task_id]
            if batch.step == self._step and len(self._parts()) < self.needed:
                self._waiting.remove(task_id)
                yield self._accept(batch)

    def _accept(self, batch: Batch) -> Accept:
        if batch.part is None:
            batch.part = self._next_part(batch.step)
        return Accept(batch.worker, batch.task.id, self._round_of(batch), batch.part)

    def _tell_again(self) -> Iterator[Decision]:
        """After somebody died: all who are still there contribute to the new round."""
        if not self._again:
            return
        self._again = False
        for batch in self._batches.values():
            if batch.part is not None:
                batch.reported = False
                yield self._accept(batch)

    def _hand_out(
        self, members: Sequence[Member], reached: Reached
    ) -> Generator[Decision, None, bool]:
        """Returns whether the step will have no more batches than it has: nothing is left for
        somebody who is free, or what there is has been measured."""
        if self._measuring:
            return True
        short, dry = len(members) < self.needed, False
        for step in (self._step, self._step + 1):
            while not self._has_enough(step, short):
                free = [m for m in members if self._is_free(m.worker, step, short)]
                if not free:
                    break
                if self._pending:  # they come first, so that the steps stay what they are
                    return False
                free.sort(key=lambda m: (len(self._of(m.worker)), m.turn))
                allowed = self._batches_allowed(reached)
                found = self._find([member.worker for member in free], step, allowed)
                if found is None:
                    dry = dry or step == self._step
                    break
                yield self._work(*found, step, reached.now_s)
            if not dry and len(self._of_step(step)) < self.needed:
                return False  # what is missing comes before the next
        return dry

    def _has_enough(self, step: int, short: bool) -> bool:
        """Whether another batch of this step would be of no use."""
        if self.backups == 0 or short:
            return len(self._of_step(step)) >= self.needed
        return step == self._step and len(self._parts()) >= self.needed

    def _work(self, task: Task, worker: int, step: int, now_s: float) -> Work:
        batch = self._batches[task.id] = Batch(task, worker, step, now_s)
        self._held.setdefault(worker, []).append(batch)
        if self.backups == 0 and step == self._step:
            batch.part = self._next_part(step)
        needs = self._updates + step - self._step
        return Work(worker, task, self._round_of(batch), batch.part, needs)

    def _find(self, workers: Sequence[int], step: int, allowed: int) -> tuple[Task, int] | None:
        """A batch of the first worker's partition, or else of the next one's, and whose it is."""
        dry: set[int] = set()
        for worker in workers:
            partition = self.partitions.of(worker)
            if partition in dry:
                continue
            task = self.queue.lease(partition, allowed)
            if task is None and step == self._step:
                task = self._steal(partition, allowed)
            if task is not None:
                return task, worker
            dry.add(partition)
        return None

    def _steal(self, partition: int, allowed: int) -> Task | None:
        """Nothing is free: what a straggler still has of an earlier step, or somebody of the
        next."""
        mine = [batch for batch in self._batches.values() if batch.task.partition == partition]
        for steps in (range(self._step), (self._step + 1,)):
            others = [batch for batch in mine if batch.step in steps]
            for batch in others:
                self._give_up(batch)
            if others:
                return self.queue.lease(partition, max(allowed, 1))
        return None

    def _complete_parts(self, dry: bool) -> list[Batch]:
        """The parts of the step, if all of them are in all shards; `dry`: no more will come."""
        parts = self._parts()
        enough = len(parts) >= self.needed or (dry and not self._under_way())
        return parts if enough and all(batch.reported for batch in parts) else []

    def _make_update(self, finite: list[Batch]) -> Iterator[Decision]:
        scale = self.queue.batch_size / sum(map(_rows, finite))
        if self.clip_norm is not None:
            if self._squares is None:
                if not self._measuring:
                    self._measuring = True
                    yield Measure(self._round, len(finite), scale)
                return
            norm = math.sqrt(self._squares)
            scale *= self.clip_norm / norm if norm > self.clip_norm else 1.0
        self._committing = True
        yield Commit(self._round, len(finite), scale)
        if self.backups == 0:  # nobody can be late: they need not ask
            for batch in self._of_step(self._step + 1):
                yield self._accept(batch)

    # ── the pieces ─────────────────────────────────────────────────────────────────────────────

    def _of(self, worker: int) -> Sequence[Batch]:
        return self._held.get(worker, ())

    def _remove(self, batch: Batch) -> None:
        del self._batches[batch.task.id]
        if not batch.gone:
            self._held[batch.worker].remove(batch)

    def _of_step(self, step: int) -> list[Batch]:
        return [batch for batch in self._batches.values() if batch.step == step]

    def _parts(self) -> list[Batch]:
        """The batches that are accepted for this step."""
        return [batch for batch in self._of_step(self._step) if batch.part is not None]

    def _in_step(self, batch: Batch) -> bool:
        return batch.part is not None and batch.step == self._step

    def _owes(self, batch: Batch) -> bool:
        return self._in_step(batch) and not batch.reported

    def _round_of(self, batch: Batch) -> int:
        """The round that the batch is for, as far as that is known."""
        ahead = batch.step - self._step
        return self._round + ahead + (self._skipped if ahead > 0 else 0)

    def _next_part(self, step: int) -> int:
        taken = [batch.part for batch in self._of_step(step) if batch.part is not None]
        return max(taken, default=-1) + 1

    def _under_way(self) -> bool:
        """Whether somebody still computes something for this step."""
        return any(
            batch.step == self._step and not batch.computed for batch in self._batches.values()
        )

    def _is_free(self, worker: int, step: int, short: bool) -> bool:
        """Has no batch of the step, nor of an earlier one; while workers are missing, it may have
        contributed some of this step already."""
        if worker in self._away or worker not in self._here:
            return False
        mine = [batch for batch in self._of(worker) if batch.step <= step]
        if step == self._step:
            return all(short and batch.step == step and batch.reported for batch in mine)
        return all(batch.step == self._step for batch in mine)

    def _batches_allowed(self, reached: Reached) -> int:
        """At most one; none once `max_steps` is met by what is out for this step."""
        if reached.max_steps is None:
            return 1
        steps = reached.steps + self._steps
        return min(1, reached.max_steps - steps - self.queue.outstanding_batches())

    def _give_up(self, batch: Batch) -> None:
        """The batch is free again; its worker, if it is there, drops it."""
        self.queue.put_back(self._forget(batch))
        if not batch.gone:
            self._drop.append(Late(batch.worker, batch.task.id))

    def _forget(self, batch: Batch) -> tuple[Remainder, ...]:
        """Out of the step, whatever it was in it; its positions are nobody's now."""
        if batch.task.id not in self._batches:
            return ()
        self._remove(batch)
        if batch.task.id in self._waiting:
            self._waiting.remove(batch.task.id)
        if self._in_step(batch):
            self._spoil_round()
        elif batch.part is not None:  # it may have begun the next step before we heard of it
            self._skipped += 1
            self._again = True
        return self.queue.cancel(batch.task.partition, batch.task.id)

    def _spoil_round(self) -> None:
        """A part is missing that may have reached some shards: once more, without it."""
        if not self._again:  # else nobody has heard of this round yet
            self._begin_round()
            self._again = True
        for batch in self._parts():
            batch.reported = False
            if batch.gone:  # it cannot contribute again; of this round it has not even heard
                self.queue.put_back(self._forget(batch))

    def _begin_round(self) -> None:
        self._round += 1 + self._skipped
        self._skipped = 0
        self._squares, self._measuring = None, False


def _rows(batch: Batch) -> int:
    return batch.task.stop - batch.task.start
