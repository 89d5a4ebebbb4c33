"""worker/j: gets tasks, computes gradients with the user's functions, pushes and pulls.

The main thread is the trainer's: between two batches it does what the coordinator asks. The
session has threads of its own, so that a worker in long user code is alive, and a hung one is seen.
A worker that lost its session or a server says why and exits; its agent starts it again, and it
joins as a new incarnation. What user code does wrong ends the run, not the worker.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.daemons import lifecycle
from dsgd_cli.daemons.lifecycle import Line, Message, Setup

if TYPE_CHECKING:
    from dsgd_cli.daemons.benching import Bench
    from dsgd_cli.daemons.trainer import Trainer
    from dsgd_cli.wire import dsgd_pb2 as pb

FILES_TIMEOUT_S = 30.0
REACH_TIMEOUT_S = 5.0
# A message passes through several threads, each of which waits this long for a trainer that
# computes; with Python's 5 ms the next task came after the one in hand had ended.
SWITCH_S = 0.0005


def work(line: Line, first: Message) -> None:
    """The role: ready at once; everything heavy is imported while it waits to be told to join."""
    line.send({"type": "ready", "port": None, "pid": os.getpid()})
    Worker(line, Setup.of(first)).serve()


class Worker:
    """The main thread's state."""

    def __init__(self, line: Line, setup: Setup) -> None:
        from dsgd_cli.daemons.session import Session
        from dsgd_cli.wire import identity as ids

        self._line = line
        self._setup = setup
        _, self._index = names.split_process(setup.process)
        self._identity = ids.Identity(setup.process, setup.cluster_id, **setup.tls)
        self._inbox: queue.SimpleQueue[pb.FromCoordinator | Message] = queue.SimpleQueue()
        self._told = threading.Condition()
        self._coordinator = ""
        self._folder = Path.cwd()  # the run directory; user code may go elsewhere
        self._files: dict[str, str | None] = {}
        self._servers: tuple[str, ...] = ()
        self._trainer: Trainer | None = None
        self._bench: Bench | None = None
        line.listen(self._listen)
        self._session = Session(self._identity, self._await_join(), self._heard, self._lost_session)

    def serve(self) -> None:
        """Joins, then: what the coordinator asks first, else the next batch."""
        import dsgd_cli.daemons.trainer  # noqa: F401  before joining: the first run finds it warm

        sys.setswitchinterval(SWITCH_S)
        self._session.open()
        while True:
            if self._trainer is not None and self._trainer.busy and self._inbox.empty():
                self._guarded(self._train)
            else:
                self._take(self._inbox.get())

    def _train(self) -> None:
        """Batches, until there is an order or nothing to do."""
        from dsgd_cli.daemons.computing import quiet

        trainer, inbox, session = self._trainer, self._inbox, self._session
        assert trainer is not None
        with quiet():
            while trainer.busy and inbox.empty():
                trainer.batch()
                session.steps += 1

    # ── from other threads ──

    def _listen(self, message: Message) -> None:
        """What the agent says."""
        kind = message.get("type")
        with self._told:
            if kind == "join":
                if self._coordinator not in ("", message["coordinator"]):
                    lifecycle.fail(self._line, "the coordinator has moved", "unreachable")
                self._coordinator = message["coordinator"]
            elif kind == "files":
                self._files = {what: message.get(what) for what in ("run_id", "model", "data")}
            elif kind == "bench":
                self._inbox.put(message)
            self._told.notify_all()

    def _heard(self, message: pb.FromCoordinator) -> None:
        """What the coordinator says. A run's end does not wait for the batch in hand."""
        kind = message.WhichOneof("kind")
        if kind == "lease":
            self._line.send({"type": "lease", "seconds": message.lease.seconds})
            return
        if kind == "run_over":
            trainer = self._trainer
            if trainer is not None and trainer.epoch == message.run_over.epoch:
                trainer.abort()
        self._inbox.put(message)

    def _lost_session(self, why: str) -> None:
        error = f"{self._setup.process} is no member any more: {why}"
        lifecycle.fail(self._line, error, "unreachable")

    # ── orders ──

    def _await_join(self) -> str:
        with self._told:
            self._told.wait_for(lambda: self._coordinator)
            return self._coordinator

    def _take(self, message: pb.FromCoordinator | Message) -> None:
        if isinstance(message, dict):
            self._line.send({"type": "benched", **self._benched(message)})
            return
        kind = message.WhichOneof("kind")
        if kind == "servers":
            self._reach(tuple(message.servers.addresses))
        elif kind == "prepare":
            self._prepare(message.prepare)
        elif kind == "run_over":
            if self._trainer is not None and self._trainer.epoch == message.run_over.epoch:
                self._trainer = None
        elif self._trainer is not None and kind is not None:
            body = getattr(message, kind)
            if body.epoch == self._trainer.epoch:
                self._obey(self._trainer, kind, body)

    def _obey(self, trainer: Trainer, kind: str, body: Any) -> None:
        def initialise() -> None:
            trainer.connect(body.cut, self._identity, self._servers)
            trainer.initialise()

        def start() -> None:
            trainer.connect(body.cut, self._identity, self._servers)
            trainer.start()

        orders = {
            "initialise": initialise,
            "start": start,
            "drain": trainer.drain,
            "evaluate": lambda: trainer.evaluate(body),
        }
        self._guarded(orders.get(kind, lambda: trainer.obey(kind, body)))

    def _benched(self, order: Message) -> Message:
        from dsgd_cli.daemons.benching import Bench

        if self._bench is None:
            self._bench = Bench(self._identity, self._index, self._session.incarnation)
        try:
            return self._bench.obey(order, self._servers, self._files)
        except Exception as error:
            return {"error": lifecycle.one_sentence(error)}

    def _prepare(self, prepare: pb.Prepare) -> None:
        from dsgd_cli.daemons.trainer import Trainer

        if self._trainer is not None:
            self._trainer.abort()

        def load() -> None:
            files = self._await_files(prepare.run_id)
            self._trainer = Trainer(
                prepare,
                files,
                self._index,
                self._session.incarnation,
                self._session.send,
                self._folder,
            )
            self._trainer.prepared()

        self._trainer = None
        self._guarded(load, prepare.epoch)

    def _await_files(self, run_id: str) -> Mapping[str, str | None]:
        """Those of this run: they come by the agent, and may come later than the order."""
        with self._told:
            if not self._told.wait_for(
                lambda: self._files.get("run_id") == run_id, FILES_TIMEOUT_S
            ):
                raise DsgdError("nobody said where the files of this run are")
            return dict(self._files)

    def _reach(self, addresses: tuple[str, ...]) -> None:
        """Speaks to every server once, and says to whom it cannot."""
        from dsgd_cli.wire import dsgd_pb2 as pb
        from dsgd_cli.wire import identity as ids

        self._servers = addresses
        reached = True
        for index, address in enumerate(addresses):
            try:
                reach(self._identity, index, address)
            except ids.PeerUnreachable as error:
                reached = False
                self._say_unreachable(index, error)
        if reached:
            self._session.send(pb.FromWorker(reached=pb.Reached(addresses=addresses)))

    def _say_unreachable(self, index: int, error: Any) -> None:
        from dsgd_cli.wire import dsgd_pb2 as pb

        said = pb.Unreachable(server=index, address=error.address, why=error.why, kind=error.kind)
        self._session.send(pb.FromWorker(unreachable=said))

    # ── what goes wrong ──

    def _guarded(self, action: Any, epoch: int = 0) -> None:
        """Runs a piece of a run. The user's errors are reported, ours end the process."""
        from dsgd_cli.daemons.parameters import Closed
        from dsgd_cli.wire.channels.base import Reason, Refused
        from dsgd_cli.wire.identity import PeerUnreachable

        trainer = self._trainer
        try:
            action()
        except Closed:
            return  # the coordinator says so in a moment
        except PeerUnreachable as error:
            if trainer is not None and trainer.over:
                return
            self._say_unreachable(names.split_process(error.process)[1], error)
            self._session.flush()
            raise
        except Refused as error:
            if error.reason in (Reason.WRONG_EPOCH, Reason.NOT_CONFIGURED):
                self._trainer = None  # the run is over; the coordinator will say so
                return
            raise
        except DsgdError as error:
            self._failed(error, trainer.epoch if trainer is not None else epoch)

    def _failed(self, error: DsgdError, epoch: int) -> None:
        from dsgd_cli.contract.errors import SpecError, UserCodeError
        from dsgd_cli.wire import dsgd_pb2 as pb

        theirs = isinstance(error, UserCodeError | SpecError)
        details = "\n".join(error.details) if theirs else traceback.format_exc()
        text = f"{error.message} ({error.remedy})" if error.remedy else error.message
        failed = pb.WorkerFailed(
            epoch=epoch, error=text, traceback=details, kind="user" if theirs else "internal"
        )
        self._session.send(pb.FromWorker(failed=failed))
        self._trainer = None


def reach(identity: Any, server: int, address: str) -> None:
    """One handshake and one call to a server. Raises PeerUnreachable."""
    import grpc

    from dsgd_cli.wire import dsgd_pb2 as pb
    from dsgd_cli.wire import identity as ids
    from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub

    process = names.process_name("server", server)
    ids.probe(identity, process, address, REACH_TIMEOUT_S)
    with ids.open_channel(identity, process, address) as channel:
        stub = ServerStub(channel)  # type: ignore[no-untyped-call]
        try:
            stub.Health(pb.HealthRequest(), timeout=REACH_TIMEOUT_S)
        except grpc.RpcError as error:
            why = f"does not answer ({error.code().name})"
            raise ids.PeerUnreachable(process, address, why) from error
