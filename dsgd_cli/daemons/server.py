"""server/i: holds one shard behind the channels, and does what the coordinator says.

Control and the grpc channel run on one asyncio loop; the other carriers have threads of their own,
and the shard's locks keep them apart. The shard lives in a memfd, which the shm channel hands out.
numpy is imported when the first run is configured, so that the process is ready at once. The
parameters never touch a disk but through Export.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from dsgd_cli.contract import names
from dsgd_cli.daemons import lifecycle
from dsgd_cli.daemons.lifecycle import Line, Message, Setup
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import (
    DROPPED,
    Carrier,
    Data,
    Header,
    HeldShard,
    Operation,
    Reason,
    Refused,
    Route,
    Shape,
    State,
    Take,
)
from dsgd_cli.wire.channels.grpc import refusal_of, route_of, serve_exchanges
from dsgd_cli.wire.channels.memory import ShardMemory
from dsgd_cli.wire.channels.offered import make_carriers
from dsgd_cli.wire.dsgd_pb2_grpc import ServerServicer, add_ServerServicer_to_server

if TYPE_CHECKING:
    from dsgd_cli.engine.shard import Shard
    from dsgd_cli.engine.vectors import Op, Vectors

AT_ONCE_BYTES = 1 << 20
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def serve(line: Line, first: Message) -> None:
    """The role: returns never; ends by signal or by the line's end."""
    asyncio.run(_serve(line, Setup.of(first)))


async def _serve(line: Line, setup: Setup) -> None:
    _, index = names.split_process(setup.process)
    identity = ids.Identity(setup.process, setup.cluster_id, **setup.tls)
    server = ids.make_server(identity)
    service = Service(setup.cluster_id, index, setup.results, line)
    add_ServerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = ids.listen(server, identity, setup.bind)
    service.carriers = make_carriers(service, setup.bind)
    await server.start()
    line.send({"type": "ready", "port": port, "pid": os.getpid()})
    threading.Thread(target=_warm_up, daemon=True).start()
    line.listen(lambda message: _hear(line, setup.bind, message))
    await server.wait_for_termination()


def _hear(line: Line, bind: str, message: Message) -> None:
    """What the agent says: a server's orders come from the coordinator, all but `dsgd bench`'s."""
    if message.get("type") == "echo":
        from dsgd_cli.daemons.benching import offer_echo

        offer_echo(line, bind)


def _warm_up() -> None:
    """Imports what the first Configure needs, while nobody waits for it."""
    import dsgd_cli.engine.optimizers
    import dsgd_cli.engine.shard  # noqa: F401


class RunShard:
    """One run's shard as the channels see it: refusals become `Refused`."""

    def __init__(
        self, shard: Shard, shape: Shape, dtype: Any, memory: int, vectors: Vectors | None
    ) -> None:
        from numpy import frombuffer

        self.shard = shard
        self.shape = shape
        self.memory = memory
        self.frozen = False
        self._vectors = vectors
        self._judges = shard.judges
        self._dtype = dtype
        self._frombuffer = frombuffer

    def change(self, header: Header, block: int, data: Data, take: Take | None = None) -> State:
        shard, route, seq = self.shard, header.route, header.seq
        who = route.worker, route.incarnation
        try:
            values = self._frombuffer(data, self._dtype)
            if header.operation is Operation.WRITE:
                shard.write(block, values)
            elif header.operation is Operation.CONTRIBUTE:
                shard.contribute(*who, seq, header.tag, block, values)
            else:
                version, applied = shard.push(*who, seq, block, values, take, header.tag)
                if self._judges and shard.dropped(*who, seq):
                    version |= DROPPED
                return version, applied
        except Exception as error:
            raise _refused(error, block) from error
        return shard.observe(route.worker, block)

    def read(self, worker: int, block: int, take: Take | None = None) -> State:
        return self.shard.observe(worker, block, take)

    @property
    def has_vectors(self) -> bool:
        return self._vectors is not None

    def operate(self, number: int, ops: Sequence[Op]) -> tuple[float, ...]:
        assert self._vectors is not None
        return self._vectors.do(number, ops)


def _refused(error: Exception, block: int) -> Refused:
    from dsgd_cli.engine import shard as engine

    reasons: tuple[tuple[type[Exception], Reason], ...] = (
        (engine.Fenced, Reason.FENCED),
        (engine.OutOfOrder, Reason.OUT_OF_ORDER),
        (engine.NotFinite, Reason.NOT_FINITE),
        (engine.Frozen, Reason.FROZEN),
        (engine.Trained, Reason.OUT_OF_ORDER),
        (engine.RoundOver, Reason.ROUND_OVER),
        (engine.Mismatched, Reason.WRONG_SIZE),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return Refused(reason, str(error), block)
    raise error


class Service(ServerServicer):
    """The methods of `dsgd.Server`, and the `Holding` of all carriers."""

    def __init__(self, cluster_id: str, index: int, results: str, line: Line) -> None:
        self._cluster_id = cluster_id
        self._index = index
        self._results = results
        self._line = line
        self._epoch = 0
        self._run: RunShard | None = None
        self._fences: dict[int, int] = {}
        self.carriers: dict[str, Carrier] = {}

    # ── for the channels ──

    def admit(self, header: Header) -> HeldShard:
        route = header.route
        if route.cluster_id != self._cluster_id:
            raise Refused(Reason.WRONG_CLUSTER, f"this is cluster {self._cluster_id}")
        if route.shard != self._index:
            raise Refused(Reason.WRONG_SHARD, f"this is shard {self._index}, not {route.shard}")
        if self._run is None:
            raise Refused(Reason.NOT_CONFIGURED, "no run is configured")
        if route.epoch != self._epoch:
            raise Refused(Reason.WRONG_EPOCH, f"this is epoch {self._epoch}, not {route.epoch}")
        oldest = self._fences.get(route.worker, 0)
        if route.incarnation < oldest:
            raise Refused(
                Reason.FENCED,
                f"incarnation {route.incarnation} of worker/{route.worker} is over: "
                f"now it is {oldest}",
            )
        return self._run

    # ── dsgd.Server ──

    async def Exchange(self, requests: Any, context: Any) -> None:
        await serve_exchanges(self, context)

    async def OpenChannel(self, request: pb.OpenChannelRequest, context: Any) -> Any:
        try:
            return self._open_channel(request, ids.caller(context).index)
        except Refused as refused:
            return pb.OpenChannelReply(refusal=refusal_of(refused))

    def _open_channel(self, request: pb.OpenChannelRequest, caller: int) -> pb.OpenChannelReply:
        route = route_of(request.header, caller)
        held = self.admit(Header(route, 0, Operation.PULL))
        shape = Shape(request.size_bytes, request.block_bytes)
        if shape != held.shape:
            raise Refused(Reason.WRONG_SIZE, f"this shard is cut as {held.shape}, not {shape}")
        carrier = self.carriers.get(request.kind)
        if carrier is None:
            raise Refused(Reason.NO_CARRIER, f"there is no {request.kind} here")
        opened = carrier.open(request, route, held)
        if isinstance(opened, pb.TcpTicket):
            return pb.OpenChannelReply(tcp=opened)
        return pb.OpenChannelReply(shm=opened)

    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthReply:
        return pb.HealthReply(cluster_id=self._cluster_id, shard=self._index, epoch=self._epoch)

    async def Configure(self, request: pb.ConfigureRequest, context: Any) -> pb.ConfigureReply:
        if request.epoch < self._epoch:
            await _abort(context, f"epoch {request.epoch} is over, now it is {self._epoch}")
        if request.epoch > self._epoch:  # else it is a repetition
            self._run = _run_shard(request)
            self._epoch = request.epoch
            self._fences = {}
            self._retire()
        self._fence(request.fences)
        return pb.ConfigureReply()

    async def Fence(self, request: pb.FenceRequest, context: Any) -> pb.FenceReply:
        await self._current(request.epoch, context)
        self._fence({request.worker: request.incarnation})
        self._retire()
        return pb.FenceReply()

    async def Freeze(self, request: pb.FreezeRequest, context: Any) -> pb.FreezeReply:
        run = await self._current(request.epoch, context)
        run.shard.freeze()
        run.frozen = True
        return pb.FreezeReply()

    async def Thaw(self, request: pb.ThawRequest, context: Any) -> pb.ThawReply:
        run = await self._current(request.epoch, context)
        run.shard.thaw()
        run.frozen = False
        return pb.ThawReply()

    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitReply:
        run = await self._current(request.epoch, context)
        arguments = request.round, request.parts, request.scale
        if run.shape.size_bytes <= AT_ONCE_BYTES:  # sooner done than handed to a thread
            run.shard.commit(*arguments)
        else:
            await asyncio.to_thread(run.shard.commit, *arguments)
        return pb.CommitReply()

    async def Measure(self, request: pb.MeasureRequest, context: Any) -> pb.MeasureReply:
        run = await self._current(request.epoch, context)
        squares = await asyncio.to_thread(
            run.shard.squares, request.round, request.parts, request.scale
        )
        return pb.MeasureReply(squares=squares)

    async def Operate(self, request: pb.OperateRequest, context: Any) -> pb.OperateReply:
        from dsgd_cli.engine.vectors import from_json

        run = await self._current(request.epoch, context)
        if not run.has_vectors:
            await _abort(context, "this run has no vectors")
        ops = from_json(json.loads(request.ops_json))
        return pb.OperateReply(numbers=await asyncio.to_thread(run.operate, request.number, ops))

    async def SetRate(self, request: pb.SetRateRequest, context: Any) -> pb.SetRateReply:
        run = await self._current(request.epoch, context)
        run.shard.set_rate(request.factor)
        return pb.SetRateReply()

    async def Export(self, request: pb.ExportRequest, context: Any) -> pb.ExportReply:
        run = await self._current(request.epoch, context)
        if not run.frozen:
            await _abort(context, "the shard is not frozen")
        if RUN_ID.fullmatch(request.run_id) is None:
            await _abort(context, f"not a run id: {request.run_id!r}")
        folder = Path(self._results) / request.run_id
        path = folder / f"server-{self._index}.bin"
        size, digest = await asyncio.to_thread(export, run.shard, path)
        return pb.ExportReply(path=str(path), bytes=size, sha256=digest)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseReply:
        self._line.send({"type": "lease", "seconds": request.seconds})
        return pb.RenewLeaseReply()

    def _retire(self) -> None:
        """Ends the channels whose every exchange would be refused from now on."""

        def is_over(route: Route) -> bool:
            return route.epoch != self._epoch or route.incarnation < self._fences.get(
                route.worker, 0
            )

        for carrier in self.carriers.values():
            carrier.retire(is_over)

    def _fence(self, fences: Mapping[int, int]) -> None:
        assert self._run is not None
        for worker, incarnation in fences.items():
            self._fences[worker] = max(incarnation, self._fences.get(worker, 0))
            self._run.shard.fence(worker, incarnation)

    async def _current(self, epoch: int, context: Any) -> RunShard:
        if self._run is None or epoch != self._epoch:
            await _abort(context, f"this is epoch {self._epoch}, not {epoch}")
        assert self._run is not None
        return self._run


async def _abort(context: Any, why: str) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)


def _run_shard(request: pb.ConfigureRequest) -> RunShard:
    import numpy as np

    from dsgd_cli.engine import optimizers, rate
    from dsgd_cli.engine.algorithms.names import uses_rounds
    from dsgd_cli.engine.rate import Scale
    from dsgd_cli.engine.shard import Shard
    from dsgd_cli.engine.staleness import Staleness
    from dsgd_cli.engine.vectors import Vectors

    dtype = np.dtype(request.dtype)
    options = json.loads(request.options_json or "{}")
    algorithm = json.loads(request.algorithm_json or '{"name": "downpour"}')
    common = {name: options.pop(name, None) for name in optimizers.COMMON}
    optimizer = optimizers.make(request.optimizer, options, request.dtype, common["l2"] or 0.0)
    scale = Scale(request.steps_per_update or 1.0, request.steps_per_epoch or 1.0)
    size_bytes = (request.stop - request.start) * dtype.itemsize
    shape = Shape(size_bytes, request.block_elements * dtype.itemsize)
    memory = ShardMemory(shape.size_bytes, shape.blocks)
    values = np.frombuffer(memory.values, dtype)
    shard = Shard(
        values,
        request.block_elements,
        optimizer,
        memory.stamps,
        rate=rate.make(common, scale),
        staleness=Staleness(algorithm.get("max_staleness"), algorithm.get("damping", "none")),
        rounds=uses_rounds(algorithm),
        usual_parts=scale.steps_per_update,
    )
    vectors = Vectors(shard, dtype) if algorithm["name"] == "sandblaster" else None
    return RunShard(shard, shape, dtype, memory.fd, vectors)


def export(shard: Shard, path: Path) -> tuple[int, str]:
    """Writes the shard's raw values, whole or not at all; returns (bytes, sha256)."""
    lifecycle.private_folder(path.parent)
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    digest = hashlib.sha256()
    size = 0
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            for block in range(shard.blocks):
                data = shard.read(block)
                file.write(data)
                digest.update(data)
                size += len(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size, digest.hexdigest()
