"""One run on a worker: batches in, pushes out, one batch at a time on the caller's thread.

Invariant: a gradient is checked for finiteness before it gets a `seq`; the push buffer is not
touched until every shard has answered; `done_upto` never runs ahead of what is in the parameters.
The worker decides between two batches what comes next (`worker`), so nothing here waits for orders.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsgd_cli.daemons import material
from dsgd_cli.daemons.material import Files, Material
from dsgd_cli.engine.algorithms.downpour import Action, Downpour
from dsgd_cli.engine.layout import Layout, cut, flatten, unflatten
from dsgd_cli.engine.shard import all_finite
from dsgd_cli.engine.tasks import Task, order
from dsgd_cli.learning.evaluate import evaluate
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels import base
from dsgd_cli.wire.channels.base import Exchange, Operation, Route, Shape
from dsgd_cli.wire.channels.grpc import GrpcChannel

REPORT_S = 0.2

Vector = np.ndarray[Any, Any]
Send = Callable[[pb.FromWorker], None]


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
        self._material: Material = material.load(self._train, prepare.seed, files)
        options = self._train["algorithm"]
        self._downpour = Downpour(options["push_every"], options["fetch_every"])
        self._tasks: deque[Task] = deque()
        self._position = 0  # in the first of the tasks
        self._orders: dict[int, Vector] = {}
        self._parameters: Parameters | None = None
        self._report = pb.Report(epoch=self.epoch)
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
        self._parameters = Parameters(layout, identity, addresses, self.epoch, me)
        if self.over:
            self._parameters.close()

    def initialise(self) -> None:
        """Writes the first parameters into every shard."""
        self._shards.write(self._material.initial())
        self._send(pb.FromWorker(initialised=pb.Initialised(epoch=self.epoch)))

    def start(self) -> None:
        self._pull()

    def abort(self) -> None:
        """The run is over; called from any thread, and breaks off what is in flight."""
        self.over = True
        if self._parameters is not None:
            self._parameters.close()

    # ── tasks ──

    def grant(self, task: Task) -> None:
        if not self._tasks:
            self._position = self._report.done_upto = task.start
        self._tasks.append(task)

    @property
    def busy(self) -> bool:
        return bool(self._tasks) and not self.over

    def batch(self) -> None:
        """The next batch of the first task: gradient, push, pull, report, as they fall due."""
        task = self._tasks[0]
        stop = min(self._position + self._material.batch_size, task.stop)
        rows = self._order(task.epoch)[self._position : stop]
        self._position = stop
        finite = self._gradient(rows)
        self._do(self._downpour.after_gradient(finite))
        ends = stop == task.stop
        if ends:
            self._do(self._downpour.flush())
        if self._downpour.summed == 0:
            self._report.done_upto = stop
        if ends or time.monotonic() >= self._report_at_s:
            self._say(task)
        if ends:
            self._next_task()

    def drain(self) -> None:
        """Pushes what is summed, reports it, and drops the tasks."""
        if self._tasks:
            self._do(self._downpour.flush())
            self._report.done_upto = self._position  # the flush may have moved it without a step
            self._say(self._tasks[0])
            self._tasks.clear()
        self._send(pb.FromWorker(drained=pb.Drained(epoch=self.epoch)))

    def evaluate(self, evaluation: int) -> None:
        """The metrics of the newest parameters on the held-out examples."""
        if self._downpour.summed == 0:
            self._pull()
            values = self._evaluated(self._shards.views)
        else:  # gradients of the parameters in hand are still being summed: keep those
            flat = np.empty_like(self._shards.flat)
            self._shards.pull(flat)
            values = self._evaluated(unflatten(self._shards.layout, flat))
        self._send(
            pb.FromWorker(
                evaluated=pb.Evaluated(epoch=self.epoch, evaluation=evaluation, metrics=values)
            )
        )

    def _evaluated(self, views: dict[str, Vector]) -> dict[str, float]:
        data = self._material.data
        with np.errstate(all="ignore"):
            return evaluate(self._material.model, views, data.x_test, data.y_test)

    # ── one batch ──

    @property
    def _shards(self) -> Parameters:
        assert self._parameters is not None
        return self._parameters

    def _gradient(self, rows: Vector) -> bool:
        """Computes it into the push buffer, or adds it to the sum there; False: not finite."""
        shards, data, report = self._shards, self._material.data, self._report
        fresh = self._downpour.fresh
        began_s = time.perf_counter()
        out = shards.gradient if fresh else shards.scratch
        with np.errstate(all="ignore"):
            loss = self._material.model.gradients(
                shards.views, data.x[rows], data.y[rows], out.views
            )
        finite = all_finite(out.flat)
        if finite and not fresh:
            shards.gradient.flat += out.flat
        report.compute_s += time.perf_counter() - began_s
        report.steps += 1
        report.examples += len(rows)
        if math.isfinite(loss):
            report.loss_sum += loss
            report.loss_count += 1
        self._judge(out.flat, finite)
        return finite

    def _judge(self, flat: Vector, finite: bool) -> None:
        if finite:
            self._streak = 0
        else:
            self._streak += 1
            self._where = self._shards.layout.tensor_at(int(np.argmin(np.isfinite(flat)))).name

    def _do(self, action: Action) -> None:
        if action is Action.PULL:
            self._pull()
        elif action is not Action.NOTHING:
            self._push(pulls=action is Action.PUSH_PULL)

    def _pull(self) -> None:
        began_s = time.perf_counter()
        self._shards.pull()
        self._downpour.pulled()
        self._report.pull_s += time.perf_counter() - began_s
        self._report.bytes_moved += self._shards.flat.nbytes

    def _push(self, pulls: bool) -> None:
        report = self._report
        began_s = time.perf_counter()
        stale = self._shards.push(pulls)
        report.push_s += time.perf_counter() - began_s
        report.stale_count += 1
        report.stale_sum += stale
        report.stale_max = max(report.stale_max, stale)
        report.bytes_moved += self._shards.flat.nbytes * (2 if pulls else 1)

    def _say(self, task: Task) -> None:
        report = self._report
        report.task = task.id
        report.nonfinite_streak = self._streak
        report.nonfinite_where = self._where
        self._send(pb.FromWorker(report=report))
        self._report = pb.Report(epoch=self.epoch, done_upto=report.done_upto)
        self._report_at_s = time.monotonic() + REPORT_S

    def _next_task(self) -> None:
        self._tasks.popleft()
        self._report.done_upto = 0
        if self._tasks:
            self._position = self._report.done_upto = self._tasks[0].start

    def _order(self, epoch: int) -> Vector:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order(self._seed, epoch, self._material.data.examples)
        return self._orders[epoch]


class Buffer:
    """A vector, its named views, and the bytes of each shard in it."""

    def __init__(self, layout: Layout) -> None:
        self.flat = np.zeros(layout.size, layout.dtype)
        self.views = unflatten(layout, self.flat)
        self.parts = parts(layout, self.flat)


def parts(layout: Layout, flat: Vector) -> list[memoryview]:
    """The bytes of each shard."""
    return [flat[shard.start : shard.stop].data.cast("B") for shard in layout.shards]


class Parameters:
    """The worker's copy of the parameters and its channels: all shards at once."""

    def __init__(
        self,
        layout: Layout,
        identity: ids.Identity,
        addresses: Sequence[str],
        epoch: int,
        me: tuple[int, int],
    ) -> None:
        self.layout = layout
        self.gradient = Buffer(layout)
        self.flat = np.zeros(layout.size, layout.dtype)
        self._parts = parts(layout, self.flat)
        user = self.flat.view()
        user.flags.writeable = False  # the servers change the parameters, nobody else
        self.views = unflatten(layout, user)
        self._scratch: Buffer | None = None
        self._seq = 0
        self._pushed = 0  # own pushes since the last fetch
        self._fetched: list[list[int]] = []  # versions of the last fetch
        self._channels = [
            GrpcChannel(identity, address, self._route(identity, epoch, index, me), shape)
            for index, (address, shape) in enumerate(zip(addresses, shapes(layout), strict=True))
        ]

    @property
    def scratch(self) -> Buffer:
        """For a gradient that is added to the sum; needed with push_every > 1 only."""
        if self._scratch is None:
            self._scratch = Buffer(self.layout)
        return self._scratch

    def write(self, params: dict[str, Vector]) -> None:
        flatten(self.layout, params, self.gradient.flat)
        self._run([Exchange(Operation.WRITE, data=part) for part in self.gradient.parts])

    def pull(self, into: Vector | None = None) -> None:
        """Fetches into this copy, or into another vector."""
        targets = self._parts if into is None else parts(self.layout, into)
        done = self._run([Exchange(Operation.PULL, into=part) for part in targets])
        if into is None:
            self._remember(done)

    def push(self, pulls: bool) -> int:
        """Sends the push buffer; returns the staleness: updates by others since the fetch."""
        self._seq += 1
        self._pushed += 1
        operation = Operation.PUSH_PULL if pulls else Operation.PUSH
        done = self._run(
            [
                Exchange(operation, self._seq, data, into if pulls else None)
                for data, into in zip(self.gradient.parts, self._parts, strict=True)
            ]
        )
        stale = max(
            after - before - self._pushed
            for exchange, fetched in zip(done, self._fetched, strict=True)
            for after, before in zip(exchange.versions, fetched, strict=True)
        )
        if pulls:
            self._remember(done)
        return max(0, stale)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _run(self, exchanges: list[Exchange]) -> list[Exchange]:
        base.run(self._channels, exchanges)
        return exchanges

    def _remember(self, exchanges: list[Exchange]) -> None:
        self._fetched = [exchange.versions for exchange in exchanges]
        self._pushed = 0

    @staticmethod
    def _route(identity: ids.Identity, epoch: int, shard: int, me: tuple[int, int]) -> Route:
        worker, incarnation = me
        return Route(identity.cluster_id, epoch, shard, worker, incarnation)


def shapes(layout: Layout) -> list[Shape]:
    """How each shard's bytes are cut."""
    item_bytes = np.dtype(layout.dtype).itemsize
    return [
        Shape((shard.stop - shard.start) * item_bytes, layout.block_elements * item_bytes)
        for shard in layout.shards
    ]
