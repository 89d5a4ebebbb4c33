"""The worker's loop of the asynchronous algorithms: tasks in, pushes out, one batch at a time.

A push_pull is under way while the next gradient is computed, unless `overlap` is off. Between two
fetches the worker may take steps of its own. What is sent is not touched until every shard has
answered; `done_upto` never runs ahead of what is in the parameters. With a gate (stale_synchronous)
a clock begins when the coordinator allows it, and with parameters that are new enough for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from dsgd_cli.daemons.computing import Computing, Counts, Vector, add_loss, batches, task_of
from dsgd_cli.daemons.material import Material
from dsgd_cli.daemons.parameters import Parameters
from dsgd_cli.engine import rate
from dsgd_cli.engine.algorithms.downpour import Action, Downpour
from dsgd_cli.engine.algorithms.names import steps_per_update
from dsgd_cli.engine.algorithms.stale_synchronous import Gate
from dsgd_cli.engine.rate import Scale
from dsgd_cli.engine.tasks import Task
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Operation

REPORT_S = 0.2

OPERATIONS = {
    Action.PUSH: Operation.PUSH,
    Action.PULL: Operation.PULL,
    Action.PUSH_PULL: Operation.PUSH_PULL,
}

Say = Callable[..., None]  # a report: task, done_upto, counts, streak


@dataclass(slots=True, eq=False)
class Tally:
    """What there is to report of a task."""

    task: Task
    done_upto: int
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class Manner:
    """How the worker pushes and steps; from the algorithm's and the optimizer's options."""

    overlap: bool = True
    mean: bool = False
    local_rate: float = 0.0
    clip_norm: float | None = None

    @classmethod
    def of(cls, algorithm: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Manner:
        options = optimizer.get("options", {})
        local = algorithm.get("local_learning_rate")
        if local is None:
            plain = optimizer["name"] == "sgd" and algorithm.get("fetch_every", 1) > 1
            local = options.get("learning_rate", 0.0) if plain else 0.0
        return cls(
            overlap=algorithm.get("overlap", True),
            mean=algorithm.get("reduce") == "mean",
            local_rate=local,
            clip_norm=options.get("clip_norm"),
        )


class Stream:
    """From `Start` to the end of the run."""

    def __init__(
        self,
        train: Mapping[str, Any],
        material: Material,
        parameters: Parameters,
        computing: Computing,
        say: Say,
        send: Callable[[pb.FromWorker], None],
        epoch: int,
    ) -> None:
        options = train["algorithm"]
        self._material = material
        self._shards = parameters
        self._computing = computing
        self._say_report = say
        self._send = send
        self._epoch = epoch
        self._manner = Manner.of(options, train["optimizer"])
        scale = Scale(steps_per_update(options, 1), material.examples / material.batch_size)
        self._rate = rate.make(train["optimizer"].get("options", {}), scale)
        synchronised = options["name"] == "stale_synchronous"
        every = options["push_every"]
        self._downpour = Downpour(every, every if synchronised else options["fetch_every"])
        self._gate = Gate() if synchronised else None
        self._clocks = 0  # that every shard has
        self._tasks: deque[Task] = deque()
        self._position = 0  # in the first of the tasks
        self._batches: Iterator[tuple[Vector, Vector]] = iter(())  # what is left of it
        self._tally = Tally(Task(0, 0, 0, 0), 0)  # of the first of the tasks
        self._flight: Tally | None = None  # who pays for the exchange under way
        self._marks: list[tuple[Tally, int]] = []  # positions that it covers
        self._report_at_s = 0.0

    # ── orders ──

    def obey(self, kind: str, body: Any) -> None:
        if kind == "grant":
            self._grant(task_of(body.task))
        elif kind == "advance" and self._gate is not None:
            self._gate.limit = max(self._gate.limit, body.limit)

    @property
    def busy(self) -> bool:
        return bool(self._tasks) and (self._gate is None or self._gate.open)

    def batch(self) -> None:
        """The next batch of the first task: gradient, push, pull, report, as they fall due."""
        self._freshen()
        task, tally = self._tasks[0], self._tally
        x, y = next(self._batches)
        self._position += len(x)
        ends = self._position == task.stop
        finite = self._gradient(x, y, tally.counts)
        computed_s = perf_counter()
        self._do(self._downpour.after_gradient(finite, ends))
        if self._gate is not None and self._downpour.skipped:
            self._skip(self._gate)
        self._mark()
        if ends:
            self._end_task()
        elif computed_s >= self._report_at_s:
            self._say(tally)
        if self._gate is not None and not self._gate.open:
            self._settle()  # the others may be waiting for this clock

    def drain(self) -> None:
        """Pushes what is summed, reports it, and drops the tasks."""
        self._settle()
        if self._tasks:
            self._flush()
            self._settle()
            self._say(self._tally)
            self._tasks.clear()

    def evaluated(self, evaluate: Callable[[Mapping[str, Vector], Vector], None]) -> None:
        """Hands the newest parameters over."""
        if self._gate is not None and self._downpour.summed:
            self._flush()  # others may be waiting for this clock
        self._settle()
        if self._gate is not None:
            self._say_clocks()  # once more: nothing is in hand, and nobody need wait
        if self._downpour.summed == 0:
            self._do(Action.PULL)
            self._settle()
            self._downpour.pulled()
            copy = self._shards.shown
        else:  # gradients of the parameters in hand are still being summed: keep those
            copy = self._shards.peek()
        if self._gate is not None:
            self._gate.away()
        evaluate(copy.views, copy.flat)

    # ── tasks ──

    def _grant(self, task: Task) -> None:
        self._tasks.append(task)
        if len(self._tasks) == 1:
            self._open_task()
            if self._gate is not None:
                self._gate.idled()

    def _open_task(self) -> None:
        task = self._tasks[0]
        self._position = task.start
        self._tally = Tally(task, task.start)
        rows = self._computing.order(task.epoch)[task.start : task.stop]
        self._batches = batches(self._material.data, rows, self._material.batch_size)

    def _end_task(self) -> None:
        """Its report goes out when its last push is acknowledged; the next one may begin."""
        self._tasks.popleft()
        if self._tasks:
            self._open_task()
        else:
            self._settle()

    # ── one batch ──

    def _freshen(self) -> None:
        """Parameters that may be read for the clock in hand."""
        gate = self._gate
        if gate is None or gate.fresh:
            return
        self._settle()
        if not gate.fresh:
            self._do(Action.PULL)
            self._settle()

    def _gradient(self, x: Vector, y: Vector, counts: Counts) -> bool:
        """Computes it into the push buffer, or adds it to the sum there; False: not finite."""
        shards, fresh = self._shards, self._downpour.fresh
        if fresh:
            shards.based()
        out = shards.gradient if fresh else shards.scratch
        loss, finite = self._computing.gradient(shards.shown.views, x, y, out, counts)
        counts.steps += 1
        add_loss(counts, loss)
        if not finite:
            return False
        if self._manner.local_rate:
            shards.step(out.flat, self._own_rate())
        if not fresh:
            shards.gradient.flat += out.flat
        return True

    def _own_rate(self) -> float:
        """Of the worker's own steps: it follows the servers' schedule, as of the last fetch."""
        schedule = self._rate
        factor = 1.0 if schedule is None else schedule(self._shards.shown.versions[0][0] + 1)
        return self._manner.local_rate * factor

    def _do(self, action: Action) -> None:
        """Begins an exchange, after the one before it."""
        if action is Action.NOTHING:
            return
        operation = OPERATIONS[action]
        self._settle(unsent=operation.sends)
        began_s = perf_counter()
        if operation.sends:
            self._prepare_push()
        if self._gate is not None:
            if operation.sends:
                self._gate.pushed()
            if operation.fetches:
                self._gate.fetch_begins()
        self._shards.begin(operation)
        self._flight = self._tally
        self._tally.counts.spent(operation, perf_counter() - began_s)
        if not self._manner.overlap:
            self._settle()

    def _flush(self) -> None:
        """What is summed goes out before its time."""
        self._do(self._downpour.flush())
        self._mark()

    def _prepare_push(self) -> None:
        """The sum of the gradients becomes what is pushed."""
        flat, manner = self._shards.gradient.flat, self._manner
        scale = 1.0 / self._downpour.pushed if manner.mean else 1.0
        if manner.clip_norm is not None:
            scale *= clip(norm(flat) * scale, manner.clip_norm)
        if scale != 1.0:
            flat *= scale

    def _settle(self, unsent: bool = False) -> None:
        """Waits for the exchange under way, if there is one; what it covers is done.

        `unsent`: a sum is about to be sent that no fetch contains yet.
        """
        tally, self._flight = self._flight, None
        if tally is None:
            return
        began_s = perf_counter()
        landed = self._shards.settle()
        counts = tally.counts
        counts.spent(landed.operation, perf_counter() - began_s)
        if landed.operation.sends:
            counts.stale(landed.stale)
            counts.dropped += landed.dropped
        unsent = unsent or self._downpour.summed > 0
        if landed.operation.fetches and self._manner.local_rate and unsent:
            self._shards.step(self._shards.gradient.flat, self._own_rate())
        if self._gate is not None and landed.operation.fetches:
            self._gate.fetched()
        if self._gate is not None and landed.operation.sends:
            self._tick()
        marks, self._marks = self._marks, []
        for marked, upto in marks:
            self._done(marked, upto)

    def _skip(self, gate: Gate) -> None:
        """A clock without a finite gradient: nobody waits for a push that does not come."""
        self._settle()
        gate.pushed()
        self._tick()

    def _tick(self) -> None:
        """All shards have this clock's push."""
        self._clocks += 1
        self._say_clocks()

    def _say_clocks(self) -> None:
        self._send(pb.FromWorker(ticked=pb.Ticked(epoch=self._epoch, clock=self._clocks)))

    def _mark(self) -> None:
        """Where nothing is summed, all up to here is in the parameters, or will be on landing."""
        if self._downpour.summed:
            return
        if self._flight is None:
            self._done(self._tally, self._position)
        else:
            self._marks.append((self._tally, self._position))

    def _done(self, tally: Tally, upto: int) -> None:
        tally.done_upto = upto
        if upto == tally.task.stop:
            self._say(tally)

    def _say(self, tally: Tally) -> None:
        counts, tally.counts = tally.counts, Counts()
        self._say_report(tally.task.id, tally.done_upto, counts, self._computing.streak)
        self._report_at_s = perf_counter() + REPORT_S


def norm(vector: Vector) -> float:
    """The Euclidean norm, in float64 where the dtype's own would overflow."""
    squares = float(vector.dot(vector))
    if not math.isfinite(squares):
        squares = float(np.square(vector, dtype=np.float64).sum())
    return math.sqrt(squares)


def clip(size: float, most: float) -> float:
    """What a gradient of this norm is multiplied by."""
    return most / size if size > most else 1.0
