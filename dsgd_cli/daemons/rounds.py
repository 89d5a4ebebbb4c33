"""The worker's loop of the algorithms whose workers contribute to one update together.

`synchronous` gets a batch at a time, `sandblaster` a portion of all examples, which is computed in
pieces so that it can be called off between two of them. The gradient is the mean over a batch of
the usual size, or the sum over the examples of a portion. It is contributed to a round as a part
when that is allowed, and kept, because the round may be tried again, until newer parameters are
asked for. What comes too late is dropped by the shards, and no harm is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from dsgd_cli.daemons.computing import Computing, Counts, Vector, add_loss, task_of
from dsgd_cli.daemons.material import Material
from dsgd_cli.daemons.parameters import Buffer, Parameters
from dsgd_cli.daemons.streams import Say
from dsgd_cli.engine.shard import all_finite
from dsgd_cli.engine.tasks import Task
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Operation, Reason, Refused

PAUSE_S = (100e-6, 2e-3)  # between two looks for an update: at first, and at most
GROWTH = 1.3


@dataclass(slots=True, eq=False)
class Job:
    """A batch or a portion, and how far it is."""

    task: Task
    round: int
    part: int | None
    needs: int  # updates in the parameters
    at: int = 0  # positions before it are computed
    buffer: Buffer | None = None
    finite: bool = True
    streak: int = 0  # gradients in a row that were not finite, up to this one
    contributed: bool = False
    counts: Counts = field(default_factory=Counts)

    @property
    def computed(self) -> bool:
        return self.at == self.task.stop


class Rounds:
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
        self._material = material
        self._shards = parameters
        self._computing = computing
        self._say = say
        self._send = send
        self._epoch = epoch
        # None: the mean over a batch; else the sum over a portion, in pieces of so many rows
        self._rows: int | None = train["algorithm"].get("rows")
        self._jobs: dict[int, Job] = {}  # by task; those that are computed are kept
        self._todo: list[Job] = []
        self._free = list(parameters.buffers)
        self._version = 0  # updates in the parameters in hand
        self._fetch = False  # them as they are now, whatever becomes of the job that said so
        self._pause_s = PAUSE_S[0]

    # ── orders ──

    def obey(self, kind: str, body: Any) -> None:
        if kind == "work":
            self._work(body)
        elif kind == "accept":
            job = self._jobs.get(body.task)
            if job is not None:
                job.round, job.part, job.contributed = body.round, body.part, False
                if job.computed:
                    self._contribute(job)
        elif kind == "late":
            self._drop(body.task)

    def _work(self, body: pb.Work) -> None:
        task = task_of(body.task)
        part = body.part if body.HasField("part") else None
        job = Job(task, body.round, part, body.needs, at=task.start)
        self._fetch = self._fetch or body.fetch
        self._jobs[task.id] = job
        self._todo.append(job)
        self._pause_s = PAUSE_S[0]

    def _drop(self, task_id: int) -> None:
        job = self._jobs.pop(task_id, None)
        if job is None:
            return
        if job in self._todo:
            self._todo.remove(job)
        if job.buffer is not None:
            self._free.append(job.buffer)

    @property
    def busy(self) -> bool:
        return bool(self._todo)

    def batch(self) -> None:
        """A batch, or the next piece of a portion; what is complete is contributed or claimed."""
        job = min(self._todo, key=lambda job: job.needs)
        if not self._has_parameters(job):
            return
        self._compute(job)
        if not job.computed:
            return
        self._todo.remove(job)
        if job.part is not None:
            self._contribute(job)
        else:
            self._send(pb.FromWorker(claimed=pb.Claimed(epoch=self._epoch, task=job.task.id)))

    def _has_parameters(self, job: Job) -> bool:
        """Fetches what the job needs; False where it is not there yet."""
        if not self._fetch and job.needs <= self._version:
            return True
        began_s = perf_counter()
        if self._fetch:
            self._shards.pull()
            self._fetch = False
        elif not self._shards.catch_up(job.needs):
            time.sleep(self._pause_s)  # then the inbox is looked at, too
            self._pause_s = min(GROWTH * self._pause_s, PAUSE_S[1])
            job.counts.spent(Operation.PULL, perf_counter() - began_s)
            return False
        else:
            self._version = job.needs
            self._forget_contributed()
        self._pause_s = PAUSE_S[0]
        job.counts.spent(Operation.PULL, perf_counter() - began_s)
        return True

    def _forget_contributed(self) -> None:
        """Their step is made: they will not be asked for once more."""
        for task_id, job in tuple(self._jobs.items()):
            if job.contributed and job.needs < self._version:
                self._drop(task_id)

    def drain(self) -> None:
        for task_id in tuple(self._jobs):
            self._drop(task_id)

    def evaluated(self, evaluate: Callable[[Mapping[str, Vector], Vector], None]) -> None:
        """Hands the newest parameters over; those that a job needs stay in hand."""
        copy = self._shards.peek()
        evaluate(copy.views, copy.flat)

    # ── a gradient ──

    def _compute(self, job: Job) -> None:
        if job.buffer is None:
            job.buffer = self._free.pop() if self._free else Buffer(self._shards.layout)
        if self._rows is None:
            self._mean(job, job.buffer)
        else:
            self._sum(job, job.buffer, self._rows)

    def _mean(self, job: Job, buffer: Buffer) -> None:
        """Of a whole batch. One of another size than usual weighs accordingly."""
        task, size = job.task, self._material.batch_size
        rows = self._computing.order(task.epoch)[task.start : task.stop]
        data = self._material.data
        x, y = data.x.take(rows, 0), data.y.take(rows, 0)
        views = self._shards.shown.views
        loss, job.finite = self._computing.gradient(views, x, y, buffer, job.counts)
        job.streak = self._computing.streak
        add_loss(job.counts, loss)
        job.counts.steps += 1
        if len(rows) != size:
            buffer.flat *= len(rows) / size
        job.at = task.stop

    def _sum(self, job: Job, buffer: Buffer, rows: int) -> None:
        """A further piece of a portion, in the order of the data set."""
        stop = min(job.at + rows, job.task.stop)
        data, first = self._material.data, job.at == job.task.start
        out = buffer if first else self._shards.scratch
        x, y = data.x[job.at : stop], data.y[job.at : stop]
        views = self._shards.shown.views
        loss, finite = self._computing.gradient(views, x, y, out, job.counts)
        out.flat *= len(x)
        if not first:
            buffer.flat += out.flat
        job.counts.loss_sum += loss * len(x)
        job.counts.loss_count += len(x)
        job.finite = job.finite and finite and math.isfinite(loss)
        job.at = stop
        if job.computed:
            self._end_sum(job, buffer)

    def _end_sum(self, job: Job, buffer: Buffer) -> None:
        """Where it is not finite, the parameters are a trial's that leads nowhere: the search turns
        back, and the run has not diverged."""
        if not (job.finite and all_finite(buffer.flat)):
            buffer.flat[:] = 0.0
            job.counts.loss_sum = math.inf

    # ── rounds ──

    def _contribute(self, job: Job) -> None:
        """Sends it as its part, and reports. A round that is over is not worth a word."""
        assert job.buffer is not None
        assert job.part is not None
        round_ = job.round if job.finite or self._rows is not None else 0
        if round_:
            began_s = perf_counter()
            try:
                self._shards.contribute(job.buffer, round_, job.part)
            except Refused as refused:
                if refused.reason is not Reason.ROUND_OVER:
                    raise
                return
            job.counts.spent(Operation.CONTRIBUTE, perf_counter() - began_s)
        job.contributed = True
        counts, job.counts = job.counts, Counts()
        self._say(job.task.id, job.task.stop, counts, job.streak, round_)
        if self._rows is not None:  # a portion is not asked for twice of one worker
            self._drop(job.task.id)
