"""One run on the coordinator: feeds the pure state machine and carries its decisions out.

Messages become events, decisions become messages. What goes to workers is queued at once, what goes
to the servers is done by one task in the order of the decisions, so that order is never lost.
Everything that leaves bears the run's epoch; what comes back with another is dropped.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.contract.names import COORDINATOR
from dsgd_cli.daemons.lifecycle import Message, one_sentence
from dsgd_cli.daemons.peers import SLOW_CALL_TIMEOUT_S, Peers
from dsgd_cli.engine import events as ev
from dsgd_cli.engine.layout import Layout, cut
from dsgd_cli.engine.training import Training
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.identity import PeerUnreachable

MAX_BLOCK_BYTES = 1 << 20
TICK_S = 0.2

ToWorker = Callable[[int, pb.FromCoordinator], None]
Expel = Callable[[int, int, str], None]  # worker, incarnation, why: end its session
Report = Callable[[Message], None]


class Run:
    """From the launcher's `run` to `finished`."""

    def __init__(
        self,
        order: Message,
        epoch: int,
        peers: Peers,
        to_worker: ToWorker,
        expel: Expel,
        report: Report,
        incarnations: Callable[[], Mapping[int, int]],
        fatal: Callable[[Exception], NoReturn],
    ) -> None:
        self.epoch = epoch
        self.finished = asyncio.Event()
        self._id: str = order["run_id"]
        self._seed = int(order["seed"])
        self._train: dict[str, Any] = order["train"]
        self._channel: dict[str, Any] = order.get("channel") or {"name": "auto", "options": {}}
        self._workers = int(order["workers"])
        self._max_block_bytes = int(order.get("max_block_bytes", MAX_BLOCK_BYTES))
        self._peers = peers
        self._to_worker = to_worker
        self._expel = expel
        self._report = report
        self._incarnations = incarnations
        self._fatal = fatal
        self._training = Training(settings(self._seed, self._train))
        self._layout: Layout | None = None
        self._cut: pb.Cut | None = None
        self._slices: list[Message] = []
        self._jobs: asyncio.Queue[Callable[[], Awaitable[ev.Event]]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._tick())]

    def stop(self) -> None:
        """Drops everything that is under way."""
        for task in self._tasks:
            task.cancel()
        self.finished.set()

    def feed(self, event: ev.Event) -> None:
        if self.finished.is_set():
            return
        try:
            for decision in self._training.on(event, time.monotonic()):
                self._do(decision)
        except Exception as error:  # a bug: gRPC would only log it and end one session
            self._fatal(error)

    def take(self, worker: int, incarnation: int, message: pb.FromWorker) -> None:
        """A message of a worker about a run; of another run it is dropped."""
        kind = message.WhichOneof("kind") or ""
        body = getattr(message, kind)
        if body.epoch == self.epoch:
            self.feed(event_of(worker, incarnation, kind, body))

    def fail(
        self, error: str, details: str = "", process: str = "", kind: str = "internal"
    ) -> None:
        self.feed(ev.RunFailed(ev.Failure(process, error, details, kind)))

    # ── decisions ──

    def _do(self, decision: ev.Decision) -> None:
        match decision:
            case ev.Prepare(worker):
                self._to_worker(worker, pb.FromCoordinator(prepare=self._prepare()))
            case ev.Initialise(worker):
                message = pb.Initialise(epoch=self.epoch, cut=self._cut)
                self._to_worker(worker, pb.FromCoordinator(initialise=message))
            case ev.Start(worker):
                message_start = pb.Start(epoch=self.epoch, cut=self._cut)
                self._to_worker(worker, pb.FromCoordinator(start=message_start))
            case ev.Grant(worker, task):
                wire = pb.Task(id=task.id, start=task.start, stop=task.stop)
                setattr(wire, "pass", task.epoch)
                grant = pb.Grant(epoch=self.epoch, task=wire)
                self._to_worker(worker, pb.FromCoordinator(grant=grant))
            case ev.Evaluate(worker, evaluation_id):
                evaluate = pb.Evaluate(epoch=self.epoch, evaluation=evaluation_id)
                self._to_worker(worker, pb.FromCoordinator(evaluate=evaluate))
            case ev.Drain(worker):
                self._to_worker(worker, pb.FromCoordinator(drain=pb.Drain(epoch=self.epoch)))
            case ev.Expel(worker, incarnation, why):
                self._expel(worker, incarnation, why)
            case ev.Record(fields):
                self._report({"type": "record", "record": finite(fields)})
            case ev.Progress(fields):
                self._report({"type": "progress", **finite(fields)})
            case ev.Finish():
                self._finish(decision)
            case _:
                self._jobs.put_nowait(self._job(decision))

    def _prepare(self) -> pb.Prepare:
        return pb.Prepare(
            epoch=self.epoch,
            run_id=self._id,
            seed=self._seed,
            train_json=json.dumps(self._train),
            workers=self._workers,
            channel_json=json.dumps(self._channel),
        )

    def _finish(self, finish: ev.Finish) -> None:
        if finish.failure is not None:
            failure = finish.failure
            self._report(
                {
                    "type": "run_error",
                    "error": failure.error,
                    "traceback": failure.traceback,
                    "process": failure.process,
                    "kind": failure.kind,
                }
            )
        layout = None
        if self._layout is not None:
            tensors = [[tensor.name, list(tensor.shape)] for tensor in self._layout.tensors]
            layout = {"dtype": self._layout.dtype, "tensors": tensors}
        fields = {
            name: getattr(finish, name)
            for name in (
                *("outcome", "reason", "metric", "value", "loss", "steps", "examples"),
                *("seconds", "epochs"),
            )
        }
        slices = self._slices if finish.exported else []
        metrics = dict(finish.metrics)
        about = {"run_id": self._id, "layout": layout, "slices": slices, "metrics": metrics}
        self._report({"type": "finished", **finite({**fields, **about})})
        self.stop()

    # ── the servers ──

    def _job(self, decision: ev.Decision) -> Callable[[], Awaitable[ev.Event]]:
        match decision:
            case ev.ConfigureShards(tensors, dtype):
                return lambda: self._configure(tensors, dtype)
            case ev.Fence(worker, incarnation):
                return lambda: self._fence(worker, incarnation)
            case ev.Freeze():
                request = pb.FreezeRequest(epoch=self.epoch)
                return lambda: self._simple("Freeze", request, ev.Frozen())
            case ev.Thaw():
                thaw = pb.ThawRequest(epoch=self.epoch)
                return lambda: self._simple("Thaw", thaw, ev.Thawed())
            case ev.Export():
                return self._export
            case _:
                raise AssertionError(decision)

    async def _work(self) -> None:
        """The jobs, one after the other."""
        while True:
            job = await self._jobs.get()
            try:
                event = await job()
            except SpecError as error:
                text = f"{error.message} ({error.remedy})" if error.remedy else error.message
                self.fail(text, kind="spec")
            except PeerUnreachable as error:
                why = f"{COORDINATOR} lost {error}"
                self.fail(why, process=error.process, kind=error.kind)
            except Exception as error:
                self.fail(one_sentence(error), traceback.format_exc())
            else:
                self.feed(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.feed(ev.Tick())

    async def _configure(self, tensors: ev.Tensors, dtype: str) -> ev.Event:
        servers = len(self._peers.addresses)
        self._layout = layout = cut(tensors, dtype, servers, self._max_block_bytes)
        self._cut = pb.Cut(
            tensors=[pb.Tensor(name=name, shape=shape) for name, shape in tensors],
            dtype=dtype,
            servers=servers,
            max_block_bytes=self._max_block_bytes,
        )
        fences = dict(self._incarnations())
        request = configuration(layout, self.epoch, self._id, self._train["optimizer"], fences)
        await self._peers.all("Configure", request, SLOW_CALL_TIMEOUT_S)
        return ev.Configured()

    async def _fence(self, worker: int, incarnation: int) -> ev.Event:
        request = pb.FenceRequest(epoch=self.epoch, worker=worker, incarnation=incarnation)
        return await self._simple("Fence", request, ev.Fenced(worker, incarnation))

    async def _simple(self, method: str, request: Any, answer: ev.Event) -> ev.Event:
        await self._peers.all(method, lambda _: request)
        return answer

    async def _export(self) -> ev.Event:
        request = pb.ExportRequest(epoch=self.epoch, run_id=self._id)
        replies = await self._peers.all("Export", lambda _: request, SLOW_CALL_TIMEOUT_S)
        self._slices = [
            {
                "server": index,
                "host_path": reply.path,
                "bytes": reply.bytes,
                "sha256": reply.sha256,
            }
            for index, reply in enumerate(replies)
        ]
        return ev.Exported()


def configuration(
    layout: Layout,
    epoch: int,
    run_id: str,
    optimizer: Mapping[str, Any],
    fences: Mapping[int, int],
) -> Callable[[int], pb.ConfigureRequest]:
    """server's index -> what its shard is."""

    def request(index: int) -> pb.ConfigureRequest:
        shard = layout.shards[index]
        return pb.ConfigureRequest(
            epoch=epoch,
            run_id=run_id,
            start=shard.start,
            stop=shard.stop,
            block_elements=layout.block_elements,
            dtype=layout.dtype,
            optimizer=optimizer["name"],
            options_json=json.dumps(optimizer.get("options", {})),
            fences=fences,
        )

    return request


def settings(seed: int, train: Mapping[str, Any]) -> ev.Settings:
    """What the machine needs of the `train` section (a dump of the specification)."""
    until = train["until"]
    every = train["evaluate"]["every"]
    return ev.Settings(
        seed=seed,
        batch_size=train["batch_size"],
        until=ev.Until(
            loss=until.get("loss"),
            accuracy=until.get("accuracy"),
            max_epochs=until.get("max_epochs"),
            max_steps=until.get("max_steps"),
            max_time_s=until.get("max_time"),
        ),
        every=ev.Every(every["count"], every["unit"]),
    )


def event_of(worker: int, incarnation: int, kind: str, body: Any) -> ev.Event:
    """What a worker said, as an event."""
    who = (worker, incarnation)
    if kind == "prepared":
        tensors = tuple((tensor.name, tuple(tensor.shape)) for tensor in body.tensors)
        return ev.Prepared(*who, tensors, body.dtype, body.examples, body.digest)
    if kind == "initialised":
        return ev.Initialised(*who)
    if kind == "evaluated":
        return ev.Evaluated(*who, body.evaluation, dict(body.metrics))
    if kind == "drained":
        return ev.Drained(*who)
    if kind == "failed":
        return ev.WorkerFailed(*who, body.error, body.traceback, body.kind)
    assert kind == "report", kind
    return ev.Report(
        *who,
        task_id=body.task,
        done_upto=body.done_upto,
        steps=body.steps,
        examples=body.examples,
        loss_sum=body.loss_sum,
        loss_count=body.loss_count,
        staleness=(body.stale_count, body.stale_sum, body.stale_max),
        bytes_moved=body.bytes_moved,
        pull_s=body.pull_s,
        compute_s=body.compute_s,
        push_s=body.push_s,
        nonfinite_streak=body.nonfinite_streak,
        nonfinite_where=body.nonfinite_where,
    )


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
