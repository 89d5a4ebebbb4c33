"""The reference carrier: one long-lived bidirectional gRPC stream per worker and shard.

It works wherever HTTP/2 does, on the same mTLS port as everything else. Small blocks share a
message, a message stays near 1 MiB. The worker's side uses gRPC's threads (a stream is written by
its own thread while the trainer's thread reads), so that a push_pull is full duplex; the server's
side runs on its asyncio loop.

A stream that breaks or makes no progress for `stall_s` is opened again and the exchange sent again,
unchanged, until `give_up_s` have passed without an answer.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, cast

import grpc

from dsgd_cli.contract.names import process_name
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import (
    FROZEN_PAUSE_S,
    OPERATIONS,
    PAUSE_S,
    Exchange,
    Header,
    HeldShard,
    Holding,
    Operation,
    Reason,
    Refused,
    Route,
    Shape,
    State,
)
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub

MESSAGE_BYTES = 1 << 20


# ── the worker's side ──────────────────────────────────────────────────────────────────────────


class GrpcChannel:
    """A `Channel` over gRPC."""

    def __init__(
        self,
        identity: ids.Identity,
        address: str,
        route: Route,
        shape: Shape,
        *,
        stall_s: float = 10.0,
        give_up_s: float = 15.0,
    ) -> None:
        self._identity = identity
        self._address = address
        self._peer = process_name("server", route.shard)
        self._route = route
        self._shape = shape
        self._stall_s = stall_s
        self._give_up_s = give_up_s
        self._channel = ids.open_channel(identity, self._peer, address)
        self._stub = ServerStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: _Stream | None = None
        self._exchange = Exchange(Operation.PULL)
        self._next_block = 0
        self._farthest = 0  # of this exchange, over all attempts
        self._gives_up_at = 0.0
        self._pause_s = PAUSE_S[0]
        self._closed = False
        self.stalls_at: float | None = None  # the watchdog's deadline; None: nothing in flight
        _WATCHDOG.watch(self)

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._farthest = 0
        self._gives_up_at = time.monotonic() + self._give_up_s
        self._pause_s = PAUSE_S[0]
        self._send()

    def advance(self) -> bool:
        assert self._stream is not None
        try:
            reply = self._stream.receive()
        except grpc.RpcError as error:
            self.stalls_at = None
            self._retry_or_give_up(error)
            return False
        if reply.HasField("refusal"):
            self.stalls_at = None
            return self._refused(reply.refusal)
        self._take(reply)
        self._progress()
        if reply.last:
            self.stalls_at = None
            self._check_complete()
        return reply.last

    def close(self) -> None:
        self._closed = True
        self.stalls_at = None
        if self._stream is not None:
            self._stream.close()
        self._channel.close()

    def cancel(self) -> None:
        """Called by the watchdog: makes a blocked `advance` fail, and so try again."""
        if self._stream is not None:
            self._stream.close()

    def _send(self) -> None:
        self._next_block = 0
        self._exchange.versions = [0] * self._shape.blocks
        self._exchange.applied = [(0, 0)] * self._shape.blocks
        if self._stream is None:
            self._stream = _Stream(self._stub, self._route, self._shape)
        self.stalls_at = time.monotonic() + self._stall_s
        self._stream.send(self._exchange)

    def _progress(self) -> None:
        now = time.monotonic()
        self.stalls_at = now + self._stall_s
        if self._next_block > self._farthest:  # what came before is no reason not to give up
            self._farthest = self._next_block
            self._gives_up_at = now + self._give_up_s

    def _take(self, reply: pb.ExchangeReply) -> None:
        exchange = self._exchange
        for block in reply.blocks:
            if not self._next_block <= block.index < self._shape.blocks:
                raise Refused(Reason.WRONG_ORDER, f"{self._peer} sent block {block.index}")
            if exchange.into is not None and block.data:
                start, stop = self._shape.bounds(block.index)
                if len(block.data) != stop - start:
                    raise Refused(Reason.WRONG_SIZE, f"{self._peer} sent {len(block.data)} bytes")
                exchange.into[start:stop] = block.data
            exchange.versions[block.index] = block.version
            exchange.applied[block.index] = (block.applied_incarnation, block.applied_seq)
            self._next_block = block.index + 1

    def _check_complete(self) -> None:
        if self._next_block != self._shape.blocks and not self._exchange.since:
            raise Refused(
                Reason.WRONG_ORDER,
                f"{self._peer} sent {self._next_block} of {self._shape.blocks} blocks",
            )

    def _refused(self, refusal: pb.Refusal) -> bool:
        reason = Reason(int(refusal.reason))
        if reason is Reason.FROZEN and time.monotonic() < self._gives_up_at:
            time.sleep(FROZEN_PAUSE_S)
            self._send()
            return False
        raise Refused(reason, f"{self._peer}: {refusal.message}", refusal.block)

    def _retry_or_give_up(self, error: grpc.RpcError) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        code = cast("grpc.Call", error).code()
        if self._closed:
            raise ids.PeerUnreachable(self._peer, self._address, "was closed") from error
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            why = f"refuses: {cast('grpc.Call', error).details()}"
            raise ids.PeerUnreachable(self._peer, self._address, why, "identity") from error
        if time.monotonic() + self._pause_s >= self._gives_up_at:
            ids.probe(self._identity, self._peer, self._address)  # says why, if it can
            why = f"did not answer for {self._give_up_s:g} s ({code.name})"
            raise ids.PeerUnreachable(self._peer, self._address, why) from error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_S[1])
        self._send()


class _Stream:
    """One gRPC call; a new one after each break, so that nothing of the old one leaks in."""

    def __init__(self, stub: ServerStub, route: Route, shape: Shape) -> None:
        self._route = route
        self._shape = shape
        self._exchanges: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._call: Any = stub.Exchange(self._requests())

    def send(self, exchange: Exchange) -> None:
        self._exchanges.put(exchange)

    def receive(self) -> pb.ExchangeReply:
        """The next reply. Raises grpc.RpcError; a server's orderly end is one too."""
        for reply in self._call:
            return cast("pb.ExchangeReply", reply)
        raise self._call

    def close(self) -> None:
        self._exchanges.put(None)
        self._call.cancel()

    def _requests(self) -> Iterator[pb.ExchangeRequest]:
        for exchange in iter(self._exchanges.get, None):
            yield from messages(self._route, self._shape, exchange)


def messages(route: Route, shape: Shape, exchange: Exchange) -> Iterator[pb.ExchangeRequest]:
    """The requests of an exchange, each made only when the one before is on its way."""
    header = header_of(route, exchange.seq, exchange.operation, exchange.tag)
    if not exchange.operation.sends:
        yield pb.ExchangeRequest(header=header, last=True, since=exchange.since)
        return
    assert exchange.data is not None
    per_message = max(1, MESSAGE_BYTES // shape.block_bytes)
    for first in range(0, shape.blocks, per_message):
        stop = min(first + per_message, shape.blocks)
        blocks = []
        for index in range(first, stop):
            start_byte, stop_byte = shape.bounds(index)
            blocks.append(pb.Block(index=index, data=bytes(exchange.data[start_byte:stop_byte])))
        yield pb.ExchangeRequest(
            header=header if first == 0 else None, blocks=blocks, last=stop == shape.blocks
        )


class _Watchdog:
    """One thread that cancels stalled streams: gRPC has deadlines per call, not per message."""

    def __init__(self, period_s: float = 0.25) -> None:
        self._period_s = period_s
        self._channels: weakref.WeakSet[GrpcChannel] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._started = False

    def watch(self, channel: GrpcChannel) -> None:
        with self._lock:
            self._channels.add(channel)
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._period_s)
            with self._lock:
                channels = list(self._channels)
            now = time.monotonic()
            for channel in channels:
                stalls_at = channel.stalls_at
                if stalls_at is not None and now > stalls_at:
                    channel.cancel()
            del channels


_WATCHDOG = _Watchdog()


# ── the server's side ──────────────────────────────────────────────────────────────────────────


async def serve_exchanges(holding: Holding, context: Any) -> None:
    """Answers one stream until the worker ends it. The body of `Server.Exchange`."""
    who = ids.caller(context)
    incoming = _Incoming(holding, who.index)
    while True:
        request = await context.read()
        if request is grpc.aio.EOF:
            return
        for reply in incoming.take(request):
            await context.write(reply)


class _Incoming:
    """One stream's place in its exchange. Each reply is made only when the one before is out."""

    def __init__(self, holding: Holding, worker: int) -> None:
        self._holding = holding
        self._worker = worker
        self._header: Header | None = None
        self._shard: HeldShard
        self._shape = Shape(0, 1)
        self._next_block = 0
        self._skipping = False  # the rest of a refused exchange

    def take(self, request: pb.ExchangeRequest) -> Iterator[pb.ExchangeReply]:
        try:
            if request.HasField("header"):
                self._open(request.header)
            elif self._skipping:
                return
            yield from self._answer(request)
        except Refused as refused:
            self._skipping = True
            yield _refusal(refused)
        finally:
            if request.last:
                self._header = None

    def _open(self, wire: pb.Header) -> None:
        self._skipping = False
        self._next_block = 0
        self._header = None
        operation = OPERATIONS.get(int(wire.operation))
        if operation is None:
            raise Refused(Reason.WRONG_ORDER, f"operation {wire.operation}")
        header = Header(route_of(wire, self._worker), wire.seq, operation, wire.tag)
        self._shard = self._holding.admit(header)
        self._shape = self._shard.shape
        self._header = header

    def _answer(self, request: pb.ExchangeRequest) -> Iterator[pb.ExchangeReply]:
        header = self._header
        if header is None:
            raise Refused(Reason.WRONG_ORDER, "blocks without a header")
        if not header.operation.sends:
            yield from self._pulled(request)
            return
        fresh = [self._sent(header, block) for block in request.blocks]
        if request.last and self._next_block != self._shape.blocks:
            raise Refused(
                Reason.WRONG_ORDER, f"{self._next_block} of {self._shape.blocks} blocks came"
            )
        yield pb.ExchangeReply(blocks=fresh, last=request.last)

    def _sent(self, header: Header, block: pb.Block) -> pb.FreshBlock:
        self._check(block)
        fresh = _Fresh(block.index)
        take = fresh.take if header.operation.fetches else None
        state = self._shard.change(header, block.index, block.data, take)
        self._next_block += 1
        return fresh.message(state)

    def _check(self, block: pb.Block) -> None:
        index = block.index
        if index >= self._shape.blocks:
            raise Refused(Reason.WRONG_SIZE, f"there is no block {index}", index)
        if index != self._next_block:
            raise Refused(Reason.WRONG_ORDER, f"block {index} before {self._next_block}", index)
        start, stop = self._shape.bounds(index)
        if len(block.data) != stop - start:
            raise Refused(
                Reason.WRONG_SIZE,
                f"block {index} has {stop - start} bytes, not {len(block.data)}",
                index,
            )

    def _pulled(self, request: pb.ExchangeRequest) -> Iterator[pb.ExchangeReply]:
        since = list(request.since)
        if since and len(since) != self._shape.blocks:
            raise Refused(Reason.WRONG_SIZE, f"{len(since)} versions for {self._shape.blocks}")
        blocks: list[pb.FreshBlock] = []
        held = 0
        for index in range(self._shape.blocks):
            fresh = _Fresh(index)
            state = self._shard.read(self._worker, index)
            if not since or state[0] > since[index]:
                state = self._shard.read(self._worker, index, fresh.take)
            blocks.append(fresh.message(state))
            held += len(blocks[-1].data)
            if held + self._shape.block_bytes > MESSAGE_BYTES:
                yield pb.ExchangeReply(blocks=blocks, last=index + 1 == self._shape.blocks)
                blocks, held = [], 0
        if blocks:
            yield pb.ExchangeReply(blocks=blocks, last=True)


class _Fresh:
    """A block for a reply."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._data = b""

    def take(self, values: memoryview) -> None:
        self._data = bytes(values)

    def message(self, state: State) -> pb.FreshBlock:
        version, (incarnation, seq) = state
        return pb.FreshBlock(
            index=self._index,
            version=version,
            applied_incarnation=incarnation,
            applied_seq=seq,
            data=self._data,
        )


def _refusal(refused: Refused) -> pb.ExchangeReply:
    return pb.ExchangeReply(refusal=refusal_of(refused), last=True)


# ── for every carrier ──────────────────────────────────────────────────────────────────────────


def header_of(
    route: Route, seq: int = 0, operation: Operation = Operation.PULL, tag: int = 0
) -> pb.Header:
    """A route on the wire."""
    return pb.Header(
        cluster_id=route.cluster_id,
        epoch=route.epoch,
        shard=route.shard,
        worker=route.worker,
        incarnation=route.incarnation,
        seq=seq,
        operation=cast("pb.Operation", int(operation)),
        tag=tag,
    )


def route_of(wire: pb.Header, caller: int) -> Route:
    """The route that a worker names, which must be its own. Raises Refused."""
    if wire.worker != caller:
        raise Refused(Reason.FENCED, f"worker/{caller} may not act as worker/{wire.worker}")
    return Route(wire.cluster_id, wire.epoch, wire.shard, wire.worker, wire.incarnation)


def refusal_of(refused: Refused) -> pb.Refusal:
    """A refusal on the wire."""
    return pb.Refusal(
        reason=cast("pb.Reason", int(refused.reason)),
        message=refused.message,
        block=refused.block,
    )
