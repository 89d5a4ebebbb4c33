"""The worker's end of a shm channel: gradients go up in place, values come down by one copy.

The worker's gradients lie in memory that only it can write (`GradientMemory`), the shard's values
in memory that only the server can write; what is where they tell each other through memory, too
(`shm_records`). A block is copied when the server has announced it; its stamp, read before and
after, tells whether the server changed it meanwhile, and then it is copied again. So `into` only
ever gets whole updates. Of a PULL `since`, blocks that are not newer are left where they are.

A connection that ends or is silent for `stall_s` is opened anew, with a new ticket and the memory
of whatever server answers, and the exchange sent again, unchanged, until `give_up_s` have passed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, cast

import grpc
import numpy as np

from dsgd_cli.contract.names import process_name
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import (
    DROPPED,
    FROZEN_PAUSE_S,
    Channel,
    Exchange,
    Operation,
    Reason,
    Refused,
    Route,
    Shape,
    Unavailable,
)
from dsgd_cli.wire.channels.grpc import header_of
from dsgd_cli.wire.channels.shm_link import Link, Lost
from dsgd_cli.wire.channels.shm_memory import GradientMemory
from dsgd_cli.wire.channels.shm_records import FRESH, Answer, host
from dsgd_cli.wire.channels.spin import Spin
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub

ASK_S = 3.0
PAUSE_S = (0.02, 1.0)  # between attempts: the first, and at most
NAP_S = 20e-6  # while the server is changing a block
VERSION_BITS = (1 << 40) - 1  # of a stamp: see `HeldShard.memory`

Ask: TypeAlias = Callable[[], pb.ShmTicket]


def share(channels: Sequence[Channel], size_bytes: int) -> list[memoryview] | None:
    """Gradient buffers from which the shm ones of these channels, if any, send without a copy."""
    shared = [channel for channel in channels if isinstance(channel, ShmChannel)]
    if not shared:
        return None
    memory = GradientMemory(size_bytes)
    for channel in shared:
        channel.adopt(memory, len(shared))
    return memory.buffers


def open_ticket(identity: ids.Identity, address: str, route: Route, shape: Shape) -> pb.ShmTicket:
    """Asks the server, over mTLS. Raises Refused, Lost, PeerUnreachable."""
    peer = process_name("server", route.shard)
    request = pb.OpenChannelRequest(
        kind="shm",
        header=header_of(route),
        size_bytes=shape.size_bytes,
        block_bytes=shape.block_bytes,
        host=host(),
    )
    channel = ids.open_channel(identity, peer, address)
    try:
        stub = ServerStub(channel)  # type: ignore[no-untyped-call]
        reply = stub.OpenChannel(request, timeout=ASK_S)
    except grpc.RpcError as error:
        call = cast("grpc.Call", error)
        if call.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            why = f"refuses: {call.details()}"
            raise ids.PeerUnreachable(peer, address, why, "identity") from error
        raise Lost(f"no ticket: {call.code().name}") from error
    finally:
        channel.close()
    if reply.HasField("refusal"):
        refusal = reply.refusal
        raise Refused(Reason(int(refusal.reason)), f"{peer}: {refusal.message}", refusal.block)
    return cast("pb.ShmTicket", reply.shm)


class ShmChannel:
    """A `Channel` over shared memory. `servers`: how many of them the worker has on this host.

    Without an identity, `ask` must say where tickets come from.
    """

    def __init__(
        self,
        identity: ids.Identity | None,
        address: str,
        route: Route,
        shape: Shape,
        *,
        ask: Ask | None = None,
        memory: GradientMemory | None = None,
        servers: int = 1,
        spin: Spin | None = None,
        stall_s: float = 10.0,
        give_up_s: float = 15.0,
    ) -> None:
        if ask is None:
            assert identity is not None
            ask = partial(open_ticket, identity, address, route, shape)
        self._ask = ask
        self._identity = identity
        self._address = address
        self._peer = process_name("server", route.shard)
        self._shape = shape
        self._memory = GradientMemory(0, slots=0) if memory is None else memory
        self._staging: GradientMemory | None = None  # its own, for data that lies elsewhere
        self._desk: tuple[int, memoryview] | None = None
        self._servers = servers
        self._spin = Spin() if spin is None else spin
        self._stall_s = stall_s
        self._give_up_s = give_up_s
        self._link: Link | None = None
        self._exchange = Exchange(Operation.PULL)
        self._next = 0  # the block whose answer comes next
        self._torn: deque[tuple[int, Answer]] = deque()
        self._reading = False  # `advance` has been called since `begin`
        self._pause_s = PAUSE_S[0]
        self._gives_up_at = 0.0
        self._closed = False
        self.torn_reads = 0

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._gives_up_at = time.monotonic() + self._give_up_s
        self._pause_s = PAUSE_S[0]
        if exchange.operation.sends and self._is_elsewhere(exchange.data):
            self._staging = GradientMemory(self._shape.size_bytes, slots=1)
            self.adopt(self._staging)
        if self._link is not None:
            try:
                self._send(self._link)
            except (OSError, Lost):
                self._unlink()  # `advance` tries again

    def advance(self) -> bool:
        try:
            if self._link is None:
                self._link = self._connect()
                self._send(self._link)
            if not self._reading:
                self._reading = True
                self._link.reads(True)
            return self._answers(self._link)
        except Refused as refused:
            return self._refused(refused)
        except (OSError, Lost, ids.PeerUnreachable) as error:
            self._retry_or_give_up(error)
            return False

    def connect(self) -> None:
        """Now rather than with the first exchange. Raises Unavailable where it cannot be."""
        try:
            self._link = self._connect()
        except Refused as refused:
            if refused.reason is not Reason.NO_CARRIER:
                raise
            raise Unavailable("shm", "") from refused  # the ordinary course of things
        except (OSError, Lost) as error:
            raise Unavailable("shm", str(error)) from error

    def adopt(self, memory: GradientMemory, servers: int | None = None) -> None:
        """From now on gradients come from this memory. Between two exchanges."""
        self._memory, self._desk = memory, None
        self._servers = servers or self._servers
        self._unlink()

    def close(self) -> None:
        """From any thread: a blocked `advance` fails at once."""
        self._closed = True
        link = self._link
        if link is not None:
            link.shut()

    def _send(self, link: Link) -> None:
        exchange = self._exchange
        blocks = self._shape.blocks
        exchange.versions = [0] * blocks
        exchange.applied = [(0, 0)] * blocks
        self._next = 0
        self._reading = False
        self._torn.clear()
        offset = 0
        if exchange.operation.sends:
            assert exchange.data is not None
            offset = self._placed(exchange.data)
        link.request(exchange, offset)

    def _is_elsewhere(self, data: memoryview | None) -> bool:
        """Whether these bytes are neither in the memory, nor is it one to copy them to."""
        assert data is not None
        return self._memory is not self._staging and self._memory.offset(data) is None

    def _placed(self, data: memoryview) -> int:
        """Where the server finds these bytes: they lie there already, or are copied there."""
        offset = self._memory.offset(data)
        if offset is None:
            buffer = self._memory.buffers[0]
            buffer[:] = data
            offset = self._memory.offset(buffer)
        assert offset is not None
        return offset

    # ── answers ──

    def _answers(self, link: Link) -> bool:
        """Takes what has come, or what comes next; True at the end."""
        blocks = self._shape.blocks
        if self._next < blocks and not self._torn:
            link.wait(self._next, self._spin)
        while self._next < blocks and (answer := self._answer(link)) is not None:
            self._take(link, self._next, answer)
            self._next += 1
            if not self._next & 15:
                self._progress()
        if self._torn:
            self._again(link)
        if self._next < blocks or self._torn:
            return False
        self._reading = False
        link.reads(False)
        return True

    def _answer(self, link: Link) -> Answer | None:
        try:
            return link.answer(self._next)
        except Refused as refused:
            message = f"{self._peer}: {refused.message}"
            raise Refused(refused.reason, message, refused.block) from None

    def _take(self, link: Link, block: int, answer: Answer) -> None:
        exchange = self._exchange
        exchange.versions[block] = answer.version
        exchange.applied[block] = (answer.incarnation, answer.seq)
        if answer.kind != FRESH or exchange.into is None:
            return
        if exchange.since and answer.version <= exchange.since[block]:
            link.copied()
        elif not self._copied(link, block, answer):
            self.torn_reads += 1
            self._torn.append((block, answer))

    def _copied(self, link: Link, block: int, answer: Answer) -> bool:
        """Copies the block; False where the server changed it meanwhile."""
        into = self._exchange.into
        assert into is not None
        start, stop = self._shape.bounds(block)
        target = np.frombuffer(into, np.uint8)[start:stop]
        if answer.place and link.copy_snapshot(answer.place, answer.stamp, target):
            link.copied()
            return True
        stamp = link.copy_block(block, start, target)
        if stamp is None:
            return False
        version = (stamp & VERSION_BITS) >> 1  # with others' pushes
        self._exchange.versions[block] = version | answer.version & DROPPED
        link.copied()
        return True

    def _again(self, link: Link) -> None:
        for _ in range(len(self._torn)):
            block, answer = self._torn.popleft()
            if self._copied(link, block, answer):
                self._progress()
            else:
                self._torn.append((block, answer))
        if self._torn:
            if time.monotonic() > self._gives_up_at:  # another connection would show the same
                why = f"block {self._torn[0][0]} does not settle"
                raise ids.PeerUnreachable(self._peer, self._address, why)
            time.sleep(NAP_S)

    def _progress(self) -> None:
        self._gives_up_at = time.monotonic() + self._give_up_s

    # ── trouble ──

    def _refused(self, refused: Refused) -> bool:
        if refused.reason is not Reason.FROZEN or time.monotonic() >= self._gives_up_at:
            raise refused
        time.sleep(FROZEN_PAUSE_S)
        if self._link is not None:
            try:
                self._send(self._link)
            except (OSError, Lost):
                self._unlink()
        return False

    def _retry_or_give_up(self, error: Exception) -> None:
        self._unlink()
        if self._closed:
            raise ids.PeerUnreachable(self._peer, self._address, "was closed") from error
        if isinstance(error, ids.PeerUnreachable) and error.kind == "identity":
            raise error
        if time.monotonic() + self._pause_s >= self._gives_up_at:
            if isinstance(error, ids.PeerUnreachable):
                raise error
            if self._identity is not None:
                ids.probe(self._identity, self._peer, self._address)  # says why, if it can
            why = f"did not answer for {self._give_up_s:g} s ({error})"
            raise ids.PeerUnreachable(self._peer, self._address, why) from error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_S[1])

    def _unlink(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connect(self) -> Link:
        if self._closed:
            raise Lost("closed")
        if self._desk is None:
            self._desk = self._memory.desk()
        memory, desk = self._memory, self._desk
        link = Link(self._ask(), self._shape, memory, desk, self._servers, self._stall_s)
        if self._closed:
            link.close()
            raise Lost("closed")
        return link
