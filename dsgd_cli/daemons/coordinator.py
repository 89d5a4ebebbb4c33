"""coordinator/0: who is a member, which run is on, and what the agent hears of it.

A worker is a member as long as its session lives; each session is a new incarnation. It is lost
when its stream breaks, when it says nothing for 6 s (it says something every second, whatever its
trainer does), or when the run expels it because it hangs. The run itself is `run.Run`; this file
moves no parameters and keeps no clock but the lease that it relays.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.contract.names import COORDINATOR, process_name
from dsgd_cli.daemons import lifecycle
from dsgd_cli.daemons.lifecycle import Line, Message, Setup
from dsgd_cli.daemons.peers import Peers
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.dsgd_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server

if TYPE_CHECKING:
    from dsgd_cli.daemons.run import Run

HEARTBEAT_S = 1.0
SILENCE_S = 6.0
FRESH_S = 2.5  # whoever has been heard of since is certainly there
HELLO_TIMEOUT_S = 10.0


def serve(line: Line, first: Message) -> None:
    """The role: returns never; ends by signal or by the line's end."""
    asyncio.run(_serve(line, Setup.of(first)))


async def _serve(line: Line, setup: Setup) -> None:
    identity = ids.Identity(setup.process, setup.cluster_id, **setup.tls)
    server = ids.make_server(identity)
    coordinator = Coordinator(line, identity)
    add_CoordinatorServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    port = ids.listen(server, identity, setup.bind)
    await server.start()
    line.send({"type": "ready", "port": port, "pid": os.getpid()})
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Message] = asyncio.Queue()

    def listen(message: Message) -> None:
        loop.call_soon_threadsafe(inbox.put_nowait, message)

    line.listen(listen)
    threading.Thread(target=_warm_up, daemon=True).start()
    alive = asyncio.create_task(_live(line))
    try:
        while True:
            await coordinator.obey(await inbox.get())
    finally:
        alive.cancel()


async def _live(line: Line) -> None:
    """Every second, from the loop that everything here depends on, a sign that it turns."""
    while True:
        line.send({"type": "alive"})
        await asyncio.sleep(HEARTBEAT_S)


def _warm_up() -> None:
    """Imports what the first run needs, while nobody waits for it."""
    import dsgd_cli.daemons.run  # noqa: F401


@dataclass(slots=True, eq=False)
class Member:
    """A worker's session."""

    worker: int
    incarnation: int
    outbox: asyncio.Queue[pb.FromCoordinator] = field(default_factory=asyncio.Queue)
    reached: tuple[str, ...] = ()  # the servers' addresses that it has spoken to
    steps: int = 0
    heard_s: float = field(default_factory=time.monotonic)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    over_why: str = ""

    def end(self, why: str) -> None:
        """The session ends with this reason; whoever serves it does the rest."""
        self.over_why = why
        self.over.set()


class Coordinator(CoordinatorServicer):
    """Membership and the current run."""

    def __init__(self, line: Line, identity: ids.Identity) -> None:
        self._line = line
        self._identity = identity
        self._workers = 0  # known from `cluster` on
        self._members: dict[int, Member] = {}
        self._incarnations: dict[int, int] = {}
        self._peers: Peers | None = None
        self._forming = False
        self._epoch = 0
        self._run: Run | None = None
        self._lease_ends_s: float | None = None
        self._background: set[asyncio.Task[Any]] = set()

    # ── the agent ──

    async def obey(self, message: Message) -> None:
        """One message of the agent."""
        kind = message.get("type")
        if kind == "cluster":
            await self._form(tuple(message["servers"]), int(message["workers"]))
        elif kind == "run":
            await self._start(message)
        elif kind == "bench":
            await self._bench(message)
        elif kind == "finish" and self._run is not None:
            from dsgd_cli.engine.events import StopRequested

            self._run.feed(StopRequested(str(message.get("why", "asked to finish"))))
        elif kind == "lease":
            await self._relay(float(message["seconds"]))

    async def _form(self, servers: tuple[str, ...], workers: int) -> None:
        self._workers = workers
        peers = self._peers
        if peers is None or peers.addresses != servers:
            if self._run is not None:
                self._run.fail("the servers have changed")
            if peers is not None:
                await peers.close()
            peers = self._peers = Peers(self._identity, servers, self._server_lost)
        lost = await peers.greet()
        for error in lost:
            self._say_unreachable(COORDINATOR, error.process, error.address, error.why, error.kind)
        if lost:
            if self._run is not None:
                self._run.fail(f"{COORDINATOR} lost {lost[0]}", process=lost[0].process)
            self._peers = None
            await peers.close()
            return
        peers.watch()
        self._forming = True
        for member in self._members.values():
            self._tell_servers(member)
        self._maybe_formed()

    def _maybe_formed(self) -> None:
        if not self._forming or self._peers is None:
            return
        heard_s = time.monotonic() - FRESH_S
        here = {
            member.worker
            for member in self._members.values()
            if member.reached == self._peers.addresses and member.heard_s > heard_s
        }
        if here >= set(range(self._workers)):
            self._forming = False
            self._line.send({"type": "formed"})

    def _server_lost(self, error: ids.PeerUnreachable) -> None:
        self._say_unreachable(COORDINATOR, error.process, error.address, error.why, error.kind)
        if self._run is not None:
            self._run.fail(f"{COORDINATOR} lost {error}", process=error.process, kind=error.kind)

    def _say_unreachable(self, process: str, to: str, address: str, why: str, kind: str) -> None:
        ends = {"process": process, "to": to, "address": address}
        self._line.send({"type": "unreachable", **ends, "why": why, "kind": kind})

    async def _relay(self, seconds: float) -> None:
        self._lease_ends_s = time.monotonic() + seconds
        for member in self._members.values():
            member.outbox.put_nowait(pb.FromCoordinator(lease=pb.Lease(seconds=seconds)))
        if self._peers is not None:
            request = pb.RenewLeaseRequest(seconds=seconds)
            self._keep(asyncio.create_task(self._peers.tell("RenewLease", request)))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """asyncio holds tasks weakly only."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ── runs ──

    async def _start(self, order: Message) -> None:
        from dsgd_cli.daemons.run import Run
        from dsgd_cli.engine.events import WorkerJoined

        if self._run is not None:
            self._run.stop()
            self._over(self._run)
        if self._peers is None:
            self._refuse(order, "the coordinator reaches no servers: the cluster is not formed")
            return
        self._epoch = max(self._epoch, self._peers.epoch) + 1
        run = Run(
            order,
            self._epoch,
            self._peers,
            self._send,
            self._expel,
            self._line.send,
            self._living,
            self._fatal,
        )
        self._run = run
        for member in list(self._members.values()):
            run.feed(WorkerJoined(member.worker, member.incarnation))
        self._keep(asyncio.create_task(self._await_end(run)))

    async def _bench(self, order: Message) -> None:
        """Shards of no run, for workers to exchange with; only while nothing is trained."""
        from dsgd_cli.daemons import benching
        from dsgd_cli.daemons.peers import SLOW_CALL_TIMEOUT_S
        from dsgd_cli.daemons.run import configuration
        from dsgd_cli.engine.layout import cut

        if self._peers is None or self._run is not None:
            self._line.send({"type": "bench_ready", "error": "the cluster is not idle"})
            return
        try:
            shapes = benching.tensors(order["bytes"])
            servers = len(self._peers.addresses)
            layout = cut(shapes, benching.DTYPE, servers, order["block_bytes"])
        except DsgdError as error:
            self._line.send({"type": "bench_ready", "error": str(error)})
            return
        self._epoch = max(self._epoch, self._peers.epoch) + 1
        request = configuration(
            layout, self._epoch, "bench", order["optimizer"], self._living(), {"name": "downpour"}
        )
        await self._peers.all("Configure", request, SLOW_CALL_TIMEOUT_S)
        self._line.send({"type": "bench_ready", "epoch": self._epoch})

    def _refuse(self, order: Message, why: str) -> None:
        """A run that cannot even begin ends like any other."""
        about = {"traceback": "", "process": COORDINATOR, "kind": "internal"}
        self._line.send({"type": "run_error", "error": why, **about})
        unknown = dict.fromkeys(("metric", "value", "loss", "layout"))
        nothing = dict.fromkeys(("steps", "examples", "seconds", "epochs"), 0)
        finished = {"outcome": "failed", "reason": why, "run_id": order["run_id"], "slices": []}
        self._line.send({"type": "finished", **finished, **unknown, **nothing, "metrics": {}})

    async def _await_end(self, run: Run) -> None:
        await run.finished.wait()
        self._over(run)

    def _over(self, run: Run) -> None:
        if self._run is run:
            self._run = None
            for member in self._members.values():
                over = pb.RunOver(epoch=run.epoch)
                member.outbox.put_nowait(pb.FromCoordinator(run_over=over))

    def _send(self, worker: int, message: pb.FromCoordinator) -> None:
        member = self._members.get(worker)
        if member is not None:
            member.outbox.put_nowait(message)

    def _expel(self, worker: int, incarnation: int, why: str) -> None:
        member = self._members.get(worker)
        if member is not None and member.incarnation == incarnation:
            member.end(why)

    def _fatal(self, error: Exception) -> NoReturn:
        details = "".join(traceback.format_exception(error))
        lifecycle.fail(self._line, lifecycle.one_sentence(error), "internal", details)

    def _living(self) -> dict[int, int]:
        return dict(self._incarnations)

    # ── sessions ──

    async def Session(self, requests: Any, context: Any) -> None:
        index = ids.caller(context).index
        hello = await self._hello(index, context)
        member = self._admit(hello.worker)
        tasks = [
            asyncio.create_task(self._read(member, context)),
            asyncio.create_task(_write(member, context)),
            asyncio.create_task(_beat(member)),
            asyncio.create_task(member.over.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._lost(member)
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if member.over.is_set():
            await context.abort(grpc.StatusCode.ABORTED, member.over_why)

    async def _hello(self, index: int, context: Any) -> pb.Hello:
        try:
            message = await asyncio.wait_for(context.read(), HELLO_TIMEOUT_S)
        except asyncio.TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello")
        why = None
        if message is grpc.aio.EOF or message.WhichOneof("kind") != "hello":
            why = "a session begins with hello"
        elif message.hello.cluster_id != self._identity.cluster_id:
            why = f"this is cluster {self._identity.cluster_id}"
        elif message.hello.worker != index:
            why = f"{process_name('worker', index)} may not act as another worker"
        if why is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        return message.hello  # type: ignore[no-any-return]

    def _admit(self, worker: int) -> Member:
        older = self._members.get(worker)
        if older is not None:
            older.end("a newer session of this worker is open")
            self._lost(older)
        self._incarnations[worker] = self._incarnations.get(worker, 0) + 1
        member = Member(worker, self._incarnations[worker])
        self._members[worker] = member
        welcome = pb.Welcome(incarnation=member.incarnation)
        member.outbox.put_nowait(pb.FromCoordinator(welcome=welcome))
        if self._lease_ends_s is not None:
            seconds = max(0.0, self._lease_ends_s - time.monotonic())
            member.outbox.put_nowait(pb.FromCoordinator(lease=pb.Lease(seconds=seconds)))
        self._tell_servers(member)
        if self._run is not None:
            from dsgd_cli.engine.events import WorkerJoined

            self._run.feed(WorkerJoined(worker, member.incarnation))
        return member

    def _tell_servers(self, member: Member) -> None:
        if self._peers is not None:
            servers = pb.Servers(addresses=self._peers.addresses)
            member.outbox.put_nowait(pb.FromCoordinator(servers=servers))

    def _lost(self, member: Member) -> None:
        if self._members.get(member.worker) is not member:
            return
        del self._members[member.worker]
        if self._run is not None:
            from dsgd_cli.engine.events import WorkerLost

            self._run.feed(WorkerLost(member.worker, member.incarnation))

    async def _read(self, member: Member, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            member.heard_s = time.monotonic()
            self._heard(member, message)

    def _heard(self, member: Member, message: pb.FromWorker) -> None:
        kind = message.WhichOneof("kind")
        if kind == "heartbeat":
            self._beaten(member, message.heartbeat.steps)
            self._maybe_formed()
        elif kind == "reached":
            member.reached = tuple(message.reached.addresses)
            self._maybe_formed()
        elif kind == "unreachable":
            process = process_name("worker", member.worker)
            said = message.unreachable
            to = process_name("server", said.server)
            self._say_unreachable(process, to, said.address, said.why, said.kind)
        elif self._run is not None and kind not in (None, "hello"):
            self._run.take(member.worker, member.incarnation, message)

    def _beaten(self, member: Member, steps: int) -> None:
        moved, member.steps = steps != member.steps, steps
        if moved and self._run is not None:
            from dsgd_cli.engine.events import Moved

            self._run.feed(Moved(member.worker, member.incarnation))


# No asyncio.wait_for around these: before Python 3.12 it can swallow a cancellation.


async def _write(member: Member, context: Any) -> None:
    while True:
        await context.write(await member.outbox.get())


async def _beat(member: Member) -> None:
    """Ends when the worker has been silent for too long."""
    while time.monotonic() - member.heard_s < SILENCE_S:
        member.outbox.put_nowait(pb.FromCoordinator(heartbeat=pb.Heartbeat()))
        await asyncio.sleep(HEARTBEAT_S)
