"""One run on a worker: batches in, pushes out, one batch at a time on the caller's thread.

A push_pull is under way while the next gradient is computed, unless `overlap` is off.
Invariant: a gradient is checked for finiteness before it gets a `seq`; what is sent is not touched
until every shard has answered; `done_upto` never runs ahead of what is in the parameters.
The worker decides between two batches what comes next (`worker`), so nothing here waits for orders.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from dsgd_cli.daemons import material
from dsgd_cli.daemons.material import Files, Material
from dsgd_cli.daemons.parameters import Parameters, open_channels
from dsgd_cli.engine.algorithms.downpour import Action, Downpour
from dsgd_cli.engine.layout import cut
from dsgd_cli.engine.shard import all_finite
from dsgd_cli.engine.tasks import Task, order
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.evaluate import evaluate
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Operation
from dsgd_cli.wire.channels.choose import Wanted

REPORT_S = 0.2

OPERATIONS = {
    Action.PUSH: Operation.PUSH,
    Action.PULL: Operation.PULL,
    Action.PUSH_PULL: Operation.PUSH_PULL,
}

Vector = np.ndarray[Any, Any]
Send = Callable[[pb.FromWorker], None]


@dataclass(slots=True)
class Counts:
    """What was done since the last report: fields of the wire's `Report`, by its names."""

    steps: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    stale_count: int = 0
    stale_sum: int = 0
    stale_max: int = 0
    bytes_moved: int = 0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0

    def spent(self, operation: Operation, seconds: float) -> None:
        """What an exchange costs: the time in which the worker could not compute."""
        if operation.sends:
            self.push_s += seconds
        else:
            self.pull_s += seconds


@dataclass(slots=True, eq=False)
class Tally:
    """What there is to report of a task."""

    task: Task
    done_upto: int
    counts: Counts = field(default_factory=Counts)


def quiet() -> AbstractContextManager[Any]:
    """Numbers may overflow: a gradient that is not finite is dealt with, not warned of."""
    return np.errstate(all="ignore")


class Trainer:
    """From `Prepare` to `RunOver`."""

    def __init__(
        self, prepare: pb.Prepare, files: Files, worker: int, incarnation: int, send: Send
    ) -> None:
        self.epoch = prepare.epoch
        self.over = False
        self._seed = prepare.seed
        self._train: dict[str, Any] = json.loads(prepare.train_json)
        self._worker = worker
        self._incarnation = incarnation
        self._send = send
        self._wanted = Wanted(**json.loads(prepare.channel_json or "{}"))
        self._material: Material = material.load(self._train, prepare.seed, files)
        options = self._train["algorithm"]
        self._downpour = Downpour(options["push_every"], options["fetch_every"])
        self._overlap: bool = options["overlap"]
        self._tasks: deque[Task] = deque()
        self._position = 0  # in the first of the tasks
        self._batches: Iterator[tuple[Vector, Vector]] = iter(())  # what is left of it
        self._orders: dict[int, Vector] = {}
        self._parameters: Parameters | None = None
        self._tally = Tally(Task(0, 0, 0, 0), 0)  # of the first of the tasks
        self._flight: Tally | None = None  # who pays for the exchange under way
        self._marks: list[tuple[Tally, int]] = []  # positions that it covers
        self._report_at_s = 0.0
        self._streak = 0
        self._where = ""

    # ── before the first batch ──

    def prepared(self) -> None:
        """Says what the model and the data are."""
        data = self._material.data
        tensors = material.tensors(self._material.initial())
        self._send(
            pb.FromWorker(
                prepared=pb.Prepared(
                    epoch=self.epoch,
                    tensors=[pb.Tensor(name=name, shape=shape) for name, shape in tensors],
                    dtype=self._material.dtype,
                    examples=data.examples,
                    digest=self._material.digest,
                )
            )
        )

    def connect(self, cut_: pb.Cut, identity: ids.Identity, addresses: Sequence[str]) -> None:
        """Opens the channels to the shards of this run."""
        if self._parameters is not None:
            return
        shapes = [(tensor.name, tuple(tensor.shape)) for tensor in cut_.tensors]
        layout = cut(shapes, cut_.dtype, cut_.servers, cut_.max_block_bytes)
        me = (self._worker, self._incarnation)
        channels = open_channels(layout, self._wanted, identity, addresses, self.epoch, me)
        self._parameters = Parameters(layout, channels)
        if self.over:
            self._parameters.close()

    def initialise(self) -> None:
        """Writes the first parameters into every shard."""
        self._shards.write(self._material.initial())
        self._send(pb.FromWorker(initialised=pb.Initialised(epoch=self.epoch)))

    def start(self) -> None:
        self._shards.pull()

    def abort(self) -> None:
        """The run is over; called from any thread, and breaks off what is in flight."""
        self.over = True
        if self._parameters is not None:
            self._parameters.close()

    # ── tasks ──

    def grant(self, task: Task) -> None:
        self._tasks.append(task)
        if len(self._tasks) == 1:
            self._open_task()

    @property
    def busy(self) -> bool:
        return bool(self._tasks) and not self.over

    def batch(self) -> None:
        """The next batch of the first task: gradient, push, pull, report, as they fall due."""
        task, tally = self._tasks[0], self._tally
        x, y = next(self._batches)
        self._position += len(x)
        ends = self._position == task.stop
        began_s = perf_counter()
        finite = self._gradient(x, y, tally.counts)
        computed_s = perf_counter()
        tally.counts.compute_s += computed_s - began_s
        self._do(self._downpour.after_gradient(finite, ends))
        self._mark()
        if ends:
            self._end_task()
        elif computed_s >= self._report_at_s:
            self._say(tally)

    def drain(self) -> None:
        """Pushes what is summed, reports it, and drops the tasks."""
        self._settle()
        if self._tasks:
            self._do(self._downpour.flush())
            self._mark()
            self._settle()
            self._say(self._tally)
            self._tasks.clear()
        self._send(pb.FromWorker(drained=pb.Drained(epoch=self.epoch)))

    def evaluate(self, evaluation: int) -> None:
        """The metrics of the newest parameters on the held-out examples."""
        self._settle()
        if self._downpour.summed == 0:
            self._do(Action.PULL)
            self._settle()
            self._downpour.pulled()
            values = self._evaluated(self._shards.views)
        else:  # gradients of the parameters in hand are still being summed: keep those
            values = self._evaluated(self._shards.peek())
        self._send(
            pb.FromWorker(
                evaluated=pb.Evaluated(epoch=self.epoch, evaluation=evaluation, metrics=values)
            )
        )

    def _evaluated(self, views: dict[str, Vector]) -> dict[str, float]:
        data = self._material.data
        with quiet():
            return evaluate(self._material.model, views, data.x_test, data.y_test)

    def _open_task(self) -> None:
        task = self._tasks[0]
        self._position = task.start
        self._tally = Tally(task, task.start)
        rows = self._order(task.epoch)[task.start : task.stop]
        self._batches = batches(self._material.data, rows, self._material.batch_size)

    def _end_task(self) -> None:
        """Its report goes out when its last push is acknowledged; the next one may begin."""
        self._tasks.popleft()
        if self._tasks:
            self._open_task()
        else:
            self._settle()

    # ── one batch ──

    @property
    def _shards(self) -> Parameters:
        assert self._parameters is not None
        return self._parameters

    def _gradient(self, x: Vector, y: Vector, counts: Counts) -> bool:
        """Computes it into the push buffer, or adds it to the sum there; False: not finite."""
        shards, fresh = self._shards, self._downpour.fresh
        out = shards.gradient if fresh else shards.scratch
        loss = self._material.model.gradients(shards.views, x, y, out.views)
        finite = all_finite(out.flat)
        if finite and not fresh:
            shards.gradient.flat += out.flat
        counts.steps += 1
        counts.examples += len(x)
        if math.isfinite(loss):
            counts.loss_sum += loss
            counts.loss_count += 1
        if finite:
            self._streak = 0
        else:
            self._streak += 1
            element = int(np.argmin(np.isfinite(out.flat)))
            self._where = shards.layout.tensor_at(element).name
        return finite

    def _do(self, action: Action) -> None:
        """Begins an exchange, after the one before it."""
        if action is Action.NOTHING:
            return
        self._settle()
        began_s = perf_counter()
        operation = OPERATIONS[action]
        self._shards.begin(operation)
        self._flight = self._tally
        counts = self._tally.counts
        counts.bytes_moved += self._shards.nbytes * (operation.sends + operation.fetches)
        counts.spent(operation, perf_counter() - began_s)
        if not self._overlap:
            self._settle()

    def _settle(self) -> None:
        """Waits for the exchange under way, if there is one; what it covers is done."""
        tally, self._flight = self._flight, None
        if tally is None:
            return
        began_s = perf_counter()
        operation, stale = self._shards.settle()
        counts = tally.counts
        counts.spent(operation, perf_counter() - began_s)
        if operation.sends:
            counts.stale_count += 1
            counts.stale_sum += stale
            counts.stale_max = max(counts.stale_max, stale)
        marks, self._marks = self._marks, []
        for marked, upto in marks:
            self._done(marked, upto)

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
        report = pb.Report(
            epoch=self.epoch,
            task=tally.task.id,
            done_upto=tally.done_upto,
            nonfinite_streak=self._streak,
            nonfinite_where=self._where,
            **asdict(tally.counts),
        )
        tally.counts = Counts()
        self._send(pb.FromWorker(report=report))
        self._report_at_s = perf_counter() + REPORT_S

    def _order(self, epoch: int) -> Vector:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order(self._seed, epoch, self._material.data.examples)
        return self._orders[epoch]


def batches(data: Dataset, rows: Vector, batch_size: int) -> Iterator[tuple[Vector, Vector]]:
    """The examples of these rows, a batch at a time."""
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        yield data.x.take(some, 0), data.y.take(some, 0)
