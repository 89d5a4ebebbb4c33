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
from dsgd_cli.contract.names import COORDINATOR, process_name
from dsgd_cli.daemons.lifecycle import Message, one_sentence
from dsgd_cli.daemons.peers import CALL_TIMEOUT_S, Peers
from dsgd_cli.daemons.peers import SLOW_CALL_TIMEOUT_S as SLOW
from dsgd_cli.engine import events as ev
from dsgd_cli.engine import vectors
from dsgd_cli.engine.algorithms.names import steps_per_update
from dsgd_cli.engine.layout import Layout, cut
from dsgd_cli.engine.ledger import quantile
from dsgd_cli.engine.rate import Scale
from dsgd_cli.engine.tasks import Task
from dsgd_cli.engine.training import Training
from dsgd_cli.engine.vectors import Op
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.identity import PeerUnreachable

MAX_BLOCK_BYTES = 1 << 20
TICK_S = 0.2
SAME = Scale()
SAID_AT_THE_END = (  # fields of `Finish`, as they are
    *("outcome", "reason", "metric", "value", "loss"),
    *("steps", "examples", "seconds", "epochs"),
)

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
        places = tuple(map(int, order.get("partitions") or ()))
        self._training = Training(settings(self._seed, self._train, self._workers, places))
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
            case (
                ev.Grant()
                | ev.Work()
                | ev.Accept()
                | ev.Late()
                | ev.Advance()
                | ev.Evaluate()
                | ev.Drain()
            ):
                self._to_worker(decision.worker, message_of(decision, self.epoch))
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
        fields = {name: getattr(finish, name) for name in SAID_AT_THE_END}
        about = {
            "run_id": self._id,
            "layout": layout,
            "slices": self._slices if finish.exported else [],
            "metrics": dict(finish.metrics),
            "best": best_of(finish.best),
            "staleness": staleness_of(finish),
            "classes": finish.classes,
            "columns": finish.columns,
            "label": finish.label,
        }
        self._report({"type": "finished", **finite({**fields, **about})})
        self.stop()

    # ── the servers ──

    def _job(self, decision: ev.Decision) -> Callable[[], Awaitable[ev.Event]]:
        match decision:
            case ev.ConfigureShards(tensors, dtype, examples):
                return lambda: self._configure(tensors, dtype, examples)
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
            case ev.Commit(round_, parts, scale):
                commit = pb.CommitRequest(epoch=self.epoch, round=round_, parts=parts, scale=scale)
                return lambda: self._simple("Commit", commit, ev.Committed(round_), SLOW)
            case ev.Measure(round_, parts, scale):
                return lambda: self._measure(round_, parts, scale)
            case ev.Operate(number, ops):
                return lambda: self._operate(number, ops)
            case ev.SetRate(factor):
                rate = pb.SetRateRequest(epoch=self.epoch, factor=factor)
                return lambda: self._simple("SetRate", rate, ev.Tick())
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

    async def _configure(self, tensors: ev.Tensors, dtype: str, examples: int) -> ev.Event:
        algorithm = self._train["algorithm"]
        steps_per_epoch = examples / (self._train["batch_size"] or examples)
        servers = len(self._peers.addresses)
        self._layout = layout = cut(tensors, dtype, servers, self._max_block_bytes)
        self._cut = pb.Cut(
            tensors=[pb.Tensor(name=name, shape=shape) for name, shape in tensors],
            dtype=dtype,
            servers=servers,
            max_block_bytes=self._max_block_bytes,
            examples=examples,
        )
        fences = dict(self._incarnations())
        request = configuration(
            layout,
            self.epoch,
            self._id,
            self._train["optimizer"],
            fences,
            algorithm,
            Scale(steps_per_update(algorithm, self._workers), steps_per_epoch),
        )
        await self._peers.all("Configure", request, SLOW)
        return ev.Configured()

    async def _fence(self, worker: int, incarnation: int) -> ev.Event:
        request = pb.FenceRequest(epoch=self.epoch, worker=worker, incarnation=incarnation)
        return await self._simple("Fence", request, ev.Fenced(worker, incarnation))

    async def _simple(
        self, method: str, request: Any, answer: ev.Event, timeout_s: float = CALL_TIMEOUT_S
    ) -> ev.Event:
        await self._peers.all(method, lambda _: request, timeout_s)
        return answer

    async def _measure(self, round_: int, parts: int, scale: float) -> ev.Event:
        request = pb.MeasureRequest(epoch=self.epoch, round=round_, parts=parts, scale=scale)
        replies = await self._peers.all("Measure", lambda _: request, SLOW)
        return ev.Measured(round_, sum(reply.squares for reply in replies))

    async def _operate(self, number: int, ops: tuple[Op, ...]) -> ev.Event:
        text = json.dumps(vectors.as_json(ops))
        request = pb.OperateRequest(epoch=self.epoch, number=number, ops_json=text)
        replies = await self._peers.all("Operate", lambda _: request, SLOW)
        numbers = vectors.together(ops, [list(reply.numbers) for reply in replies])
        return ev.Operated(number, numbers)

    async def _export(self) -> ev.Event:
        request = pb.ExportRequest(epoch=self.epoch, run_id=self._id)
        replies = await self._peers.all("Export", lambda _: request, SLOW)
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
    algorithm: Mapping[str, Any],
    scale: Scale = SAME,
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
            algorithm_json=json.dumps(algorithm),
            steps_per_update=scale.steps_per_update,
            steps_per_epoch=scale.steps_per_epoch,
        )

    return request


def settings(
    seed: int, train: Mapping[str, Any], workers: int, places: tuple[int, ...] = ()
) -> ev.Settings:
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
            plateau=until.get("plateau"),
        ),
        every=ev.Every(every["count"], every["unit"]),
        algorithm=train["algorithm"],
        optimizer=train["optimizer"].get("options", {}),
        workers=workers,
        dtype=train["dtype"],
        places=places,
    )


def message_of(decision: ev.Decision, epoch: int) -> pb.FromCoordinator:
    """What a worker is told."""
    match decision:
        case ev.Grant(_, task):
            return pb.FromCoordinator(grant=pb.Grant(epoch=epoch, task=_task(task)))
        case ev.Work(_, task, round_, part, needs, fetch):
            work = pb.Work(epoch=epoch, round=round_, part=part, needs=needs, fetch=fetch)
            work.task.CopyFrom(_task(task))
            return pb.FromCoordinator(work=work)
        case ev.Accept(_, task_id, round_, part):
            accept = pb.Accept(epoch=epoch, task=task_id, round=round_, part=part)
            return pb.FromCoordinator(accept=accept)
        case ev.Late(_, task_id):
            return pb.FromCoordinator(late=pb.Late(epoch=epoch, task=task_id))
        case ev.Advance(_, limit):
            return pb.FromCoordinator(advance=pb.Advance(epoch=epoch, limit=limit))
        case ev.Evaluate(_, evaluation_id, _, best, keep, kept):
            evaluate = pb.Evaluate(
                epoch=epoch, evaluation=evaluation_id, best=best, keep=keep, kept=kept
            )
            return pb.FromCoordinator(evaluate=evaluate)
        case ev.Drain():
            return pb.FromCoordinator(drain=pb.Drain(epoch=epoch))
    raise AssertionError(decision)


def _task(task: Task) -> pb.Task:
    wire = pb.Task(id=task.id, start=task.start, stop=task.stop)
    setattr(wire, "pass", task.epoch)
    return wire


def event_of(worker: int, incarnation: int, kind: str, body: Any) -> ev.Event:
    """What a worker said, as an event."""
    who = (worker, incarnation)
    if kind == "prepared":
        tensors = tuple((tensor.name, tuple(tensor.shape)) for tensor in body.tensors)
        return ev.Prepared(
            *who,
            tensors,
            body.dtype,
            body.examples,
            body.digest,
            body.data_digest,
            body.held_out,
            tuple(body.classes),
            tuple(body.columns),
            body.label,
        )
    if kind == "initialised":
        return ev.Initialised(*who)
    if kind == "evaluated":
        kept = body.kept
        where = ev.Kept(kept.path, kept.bytes, kept.sha256) if body.HasField("kept") else None
        metrics = dict(sorted(body.metrics.items()))  # on the wire they have no order
        return ev.Evaluated(*who, body.evaluation, metrics, where)
    if kind == "claimed":
        return ev.Claimed(*who, body.task)
    if kind == "ticked":
        return ev.Ticked(*who, body.clock)
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
        staleness=dict(body.staleness),
        dropped=body.dropped,
        round=body.round,
        shard_bytes=tuple(body.shard_bytes),
        pull_s=body.pull_s,
        compute_s=body.compute_s,
        push_s=body.push_s,
        nonfinite_streak=body.nonfinite_streak,
        nonfinite_where=body.nonfinite_where,
    )


def best_of(best: ev.Best | None) -> Message | None:
    """The best of all evaluations, and where its parameters are."""
    if best is None:
        return None
    return {
        "metric": best.metric,
        "value": best.value,
        "step": best.step,
        "metrics": dict(best.metrics),
        "process": process_name("worker", best.worker),
        "host_path": best.kept.path,
        "bytes": best.kept.bytes,
        "sha256": best.kept.sha256,
    }


def staleness_of(finish: ev.Finish) -> Message:
    """How late pushes were: updates by others since the fetch -> pushes."""
    return {
        "median": quantile(finish.staleness, 0.5),
        "p95": quantile(finish.staleness, 0.95),
        "histogram": {str(value): count for value, count in finish.staleness.items()},
        "dropped": finish.dropped,
    }


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
