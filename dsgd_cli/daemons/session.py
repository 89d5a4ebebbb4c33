"""The worker's membership: one stream to the coordinator, kept by threads of its own.

Heartbeats go out every second whatever user code computes, and carry the trainer's step counter.
When the stream breaks or the coordinator is silent, the worker is no member any more: `on_lost` is
called, once, from a thread here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from dsgd_cli.contract.names import COORDINATOR, split_process
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.dsgd_pb2_grpc import CoordinatorStub

HEARTBEAT_S = 1.0
SILENCE_S = 6.0
WELCOME_TIMEOUT_S = 10.0
FLUSH_S = 1.0

OnMessage = Callable[[pb.FromCoordinator], None]


class Session:
    """From `open` until the process ends."""

    def __init__(
        self,
        identity: ids.Identity,
        address: str,
        on_message: OnMessage,
        on_lost: Callable[[str], None],
    ) -> None:
        self.steps = 0  # batches since the process started: the trainer counts, heartbeats tell
        self.incarnation = 0
        self._identity = identity
        self._address = address
        self._on_message = on_message
        self._on_lost = on_lost
        self._outgoing: queue.SimpleQueue[pb.FromWorker] = queue.SimpleQueue()
        self._welcomed = threading.Event()
        self._heard_s = time.monotonic()
        self._lock = threading.Lock()
        self._lost = False

    def open(self) -> None:
        """Joins the cluster. Raises PeerUnreachable."""
        ids.probe(self._identity, COORDINATOR, self._address)
        channel = ids.open_channel(self._identity, COORDINATOR, self._address)
        stub = CoordinatorStub(channel)  # type: ignore[no-untyped-call]
        _, index = split_process(self._identity.process)
        hello = pb.Hello(cluster_id=self._identity.cluster_id, worker=index)
        self.send(pb.FromWorker(hello=hello))
        self._heard_s = time.monotonic()
        replies = stub.Session(self._requests())
        threading.Thread(target=self._read, args=(replies,), name="session", daemon=True).start()
        if not self._welcomed.wait(WELCOME_TIMEOUT_S):
            raise ids.PeerUnreachable(COORDINATOR, self._address, "did not let us in")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, message: pb.FromWorker) -> None:
        self._outgoing.put(message)

    def flush(self) -> None:
        """Gives what was sent last a moment to leave, before the process ends."""
        deadline_s = time.monotonic() + FLUSH_S
        while not self._outgoing.empty() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.1)  # the last one is with gRPC, which does not say when it is out

    def _requests(self) -> Iterator[pb.FromWorker]:
        while True:
            yield self._outgoing.get()

    def _read(self, replies: Any) -> None:
        try:
            for reply in replies:
                self._heard_s = time.monotonic()
                self._take(reply)
            self._end("ended the session")
        except grpc.RpcError as error:
            said = error.details() if isinstance(error, grpc.Call) else str(error)
            self._end(f"broke the session ({said})")

    def _take(self, reply: pb.FromCoordinator) -> None:
        kind = reply.WhichOneof("kind")
        if kind == "welcome":
            self.incarnation = reply.welcome.incarnation
            self._welcomed.set()
        elif kind != "heartbeat":
            self._on_message(reply)

    def _beat(self) -> None:
        while True:
            self.send(pb.FromWorker(heartbeat=pb.Heartbeat(steps=self.steps)))
            time.sleep(HEARTBEAT_S)
            silence_s = time.monotonic() - self._heard_s
            if silence_s > SILENCE_S:
                self._end(f"has said nothing for {silence_s:.0f} s")

    def _end(self, why: str) -> None:
        with self._lock:
            if self._lost:
                return
            self._lost = True
        self._on_lost(f"{COORDINATOR} at {self._address} {why}")
