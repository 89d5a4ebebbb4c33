"""The worker's end of the tcp channel: one socket to one shard, driven by the trainer's own thread.

`begin` sends what fits into the socket; `advance` sends and receives in turns, so that a push_pull
is full duplex without a second thread, and a small exchange is one send and one receive. Values go
from the gradient's memory through the cipher into the socket, and back from the socket through the
cipher into the parameters' memory.

A connection begins with a call over mTLS that returns a ticket for one connection and its two keys.
When it breaks, or nothing moves for `stall_s`, the next one gets new ones, and the exchange is sent
again, unchanged, until `give_up_s` have passed without an answer. `plain` is for who asked for it:
then the keys only prove, at the beginning, that both ends are who they are.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import select
import socket
import struct
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import grpc

from dsgd_cli.contract.names import process_name
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels import frames
from dsgd_cli.wire.channels.base import (
    FROZEN_PAUSE_S,
    LOOK_S,
    PAUSE_S,
    Exchange,
    Operation,
    Reason,
    Refused,
    Route,
    Shape,
    Unavailable,
)
from dsgd_cli.wire.channels.frames import HEAD, OPENING, STATE, Broken, Kind, Reader, Seal
from dsgd_cli.wire.channels.grpc import header_of
from dsgd_cli.wire.channels.spin import Spin
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub

CONNECT_S = 3.0


class TcpChannel:
    """A `Channel` over TCP."""

    def __init__(
        self,
        identity: ids.Identity,
        address: str,
        route: Route,
        shape: Shape,
        *,
        encrypt: bool = True,
        force: bool = False,
        stall_s: float = 10.0,
        give_up_s: float = 15.0,
    ) -> None:
        self._identity = identity
        self._address = address
        self._peer = process_name("server", route.shard)
        self._route = route
        self._shape = shape
        self._encrypt = encrypt
        self._force = force
        self._stall_s = stall_s
        self._give_up_s = give_up_s
        self._inline = frames.is_inline(shape)
        self._all_runs = frames.runs(shape, range(shape.blocks))
        body = frames.max_body_bytes(shape)
        self._out = memoryview(frames.aligned(HEAD.size + body))
        self._plain = memoryview(frames.aligned(body))
        self.spin = Spin()
        self._link: _Link | None = None
        self._exchange = Exchange(Operation.PULL)
        self._unsent: list[memoryview] = []
        self._to_send: list[frames.Run] = []  # reversed: what still goes up
        self._to_come: list[frames.Run] = []  # reversed: what still comes down
        self._least_left = 0  # of this exchange, over all attempts
        self._stalls_at = 0.0
        self._gives_up_at = 0.0
        self._pause_s = PAUSE_S[0]
        self._closed = False

    def connect(self) -> None:
        """The first connection. Raises Unavailable where TCP does not get through."""
        self._gives_up_at = time.monotonic() + self._give_up_s
        while self._link is None:
            try:
                self._link = self._open()
            except grpc.RpcError as error:  # the call is not what may be filtered: try again
                self._retry_or_give_up(error)
            except (OSError, Broken) as error:
                raise Unavailable("tcp", _why(error)) from error

    # ── Channel ──

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._least_left = 2 * len(self._all_runs) + 1
        self._gives_up_at = time.monotonic() + self._give_up_s
        self._pause_s = PAUSE_S[0]
        self._again()

    def advance(self) -> bool:
        if self._inline and not self._unsent:  # a look at the socket would be in vain
            self._wait()
        while (done := self.turn()) is None:
            self._wait()
        return done

    def _wait(self) -> None:
        link = self._link
        if link is not None:
            poll = link.both if self._unsent else link.readable
            self.spin.wait(partial(poll.poll, 0), partial(poll.poll, LOOK_S * 1000))

    def turn(self) -> bool | None:
        try:
            link = self._link
            if link is None:
                self._reconnect()
                return False
            moved = self._send(link)
            if self._receive(link):
                return self._take(link)
            if moved or link.reader.moved:
                return False
            self._check_stall()
        except (OSError, Broken, grpc.RpcError) as error:
            self._retry_or_give_up(error)
            return False
        except Unavailable as error:
            raise ids.PeerUnreachable(self._peer, self._address, error.why) from error
        return None

    def waits_for(self) -> tuple[int, int]:
        link = self._link
        assert link is not None
        return link.number, select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def close(self) -> None:
        self._closed = True
        link = self._link
        if link is not None:
            link.close()

    # ── an exchange ──

    def _again(self) -> None:
        """The exchange from its beginning."""
        self._stalls_at = time.monotonic() + self._stall_s
        exchange, shape = self._exchange, self._shape
        exchange.versions = [0] * shape.blocks
        exchange.applied = [(0, 0)] * shape.blocks
        through_frames = not self._inline
        sends = exchange.operation.sends and through_frames
        comes = exchange.operation.fetches and (through_frames or bool(exchange.since))
        self._to_send = self._all_runs[::-1] if sends else []
        self._to_come = self._all_runs[::-1] if comes and not exchange.since else []
        if self._link is None:
            return
        try:
            self._opening(self._link)
            self._send(self._link)
        except (OSError, Broken):
            self._drop()  # `advance` connects again

    def _opening(self, link: _Link) -> None:
        exchange = self._exchange
        since = len(exchange.since)
        head = OPENING.pack(exchange.operation, since, exchange.seq, exchange.tag)
        if exchange.since:
            body: Any = head + struct.pack(f"<{len(exchange.since)}Q", *exchange.since)
        elif self._inline and exchange.operation.sends:
            assert exchange.data is not None
            body = self._plain[: OPENING.size + self._shape.size_bytes]
            body[: OPENING.size] = head
            body[OPENING.size :] = exchange.data
        else:
            body = head
        stop = link.up.close(Kind.EXCHANGE, body, self._out)
        self._unsent.append(self._out[:stop])
        self._expect(link)

    def _expect(self, link: _Link) -> None:
        """Tells the reader what comes next, so that it comes in one call."""
        into = self._exchange.into
        if self._to_come:
            start, stop = frames.bounds(self._shape, self._to_come[-1])
            assert into is not None
            link.reader.expect(stop - start, into[start:stop])
        elif self._exchange.since:
            link.reader.expect(0)
        else:
            fetches = self._inline and self._exchange.operation.fetches
            values = self._shape.size_bytes if fetches else 0
            link.reader.expect(STATE.size * self._shape.blocks + values)

    def _receive(self, link: _Link) -> bool:
        """Whether a frame is complete."""
        try:
            return link.reader.fill()
        except BlockingIOError:
            return False

    def _send(self, link: _Link) -> bool:
        """As much of one frame as the socket takes now."""
        if not self._unsent:
            if not self._to_send:
                return False
            self._next_frame(link)
        unsent = self._unsent
        try:
            sent = link.end.sendmsg(unsent) if len(unsent) > 1 else link.end.send(unsent[0])
        except BlockingIOError:
            return False
        while unsent and sent >= len(unsent[0]):
            sent -= len(unsent.pop(0))
        if unsent:
            unsent[0] = unsent[0][sent:]
        else:
            self._moved()
        return True

    def _moved(self) -> None:
        """A frame has passed. Only what never passed before is a reason not to give up."""
        now = time.monotonic()
        self._stalls_at = now + self._stall_s
        left = len(self._to_send) + len(self._to_come)
        if left < self._least_left:
            self._least_left = left
            self._gives_up_at = now + self._give_up_s

    def _next_frame(self, link: _Link) -> None:
        start, stop = frames.bounds(self._shape, self._to_send.pop())
        assert self._exchange.data is not None
        data = self._exchange.data[start:stop]
        if link.up.plain:
            self._out[: HEAD.size] = HEAD.pack(len(data), Kind.DATA, 0)
            self._unsent += [self._out[: HEAD.size], data]
        else:
            self._unsent.append(self._out[: link.up.close(Kind.DATA, data, self._out)])

    def _take(self, link: _Link) -> bool:
        into = None
        if self._to_come:
            start, stop = frames.bounds(self._shape, self._to_come[-1])
            assert self._exchange.into is not None
            into = self._exchange.into[start:stop]
        kind, body = link.reader.frame(self._plain, into)
        if link.near:
            self.spin.processes = 1 + link.reader.crowd
        if kind is Kind.DATA and into is not None and len(body) == len(into):
            self._to_come.pop()
        elif kind is Kind.PICK and self._exchange.since:
            self._picked(body)
        elif kind is Kind.REFUSED:
            return self._refused(link, frames.refused_by(body, self._peer))
        elif kind is Kind.DONE and not self._to_come and not self._to_send:
            self._done(body)
            return True
        else:
            raise Broken(f"{kind.name} out of order")
        self._moved()
        self._expect(link)
        return False

    def _picked(self, body: memoryview) -> None:
        blocks = [block for (block,) in struct.iter_unpack("<I", body)]
        ascending = all(one < other for one, other in itertools.pairwise(blocks))
        if not ascending or (blocks and blocks[-1] >= self._shape.blocks):
            raise Broken("blocks that are none")
        self._to_come = frames.runs(self._shape, blocks)[::-1]

    def _done(self, body: memoryview) -> None:
        exchange, shape = self._exchange, self._shape
        values_at = STATE.size * shape.blocks
        inline = self._inline and exchange.operation.fetches and not exchange.since
        if len(body) != values_at + (shape.size_bytes if inline else 0):
            raise Broken("an end of another length")
        if inline:
            assert exchange.into is not None
            exchange.into[:] = body[values_at:]
        for block, (version, incarnation, seq) in enumerate(frames.states(body, shape.blocks)):
            exchange.versions[block] = version
            exchange.applied[block] = (incarnation, seq)

    def _refused(self, link: _Link, refused: Refused) -> bool:
        self._to_send.clear()
        while self._unsent:  # the next exchange begins after a whole frame
            if not self._send(link):
                link.both.poll(LOOK_S * 1000)
                self._check_stall()
        if refused.reason is Reason.FROZEN and time.monotonic() < self._gives_up_at:
            time.sleep(FROZEN_PAUSE_S)
            self._again()
            return False
        raise refused

    def _check_stall(self) -> None:
        if self._closed:
            raise Broken("closed")
        if time.monotonic() > self._stalls_at:
            raise Broken(f"nothing moved for {self._stall_s:g} s")

    # ── connections ──

    def _retry_or_give_up(self, error: Exception) -> None:
        self._drop()
        if self._closed:
            raise ids.PeerUnreachable(self._peer, self._address, "was closed") from error
        if isinstance(error, grpc.RpcError):
            self._unless_permanent(error)
        if time.monotonic() + self._pause_s >= self._gives_up_at:
            ids.probe(self._identity, self._peer, self._address)  # says why, if it can
            why = f"did not answer for {self._give_up_s:g} s ({_why(error)})"
            raise ids.PeerUnreachable(self._peer, self._address, why) from error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_S[1])

    def _reconnect(self) -> None:
        if not self._closed:
            self._link = self._open()
        if self._closed:  # perhaps while it was opened
            raise Broken("closed")
        self._again()

    def _drop(self) -> None:
        link, self._link = self._link, None
        self._unsent.clear()
        if link is not None:
            link.close()

    def _unless_permanent(self, error: grpc.RpcError) -> None:
        call = cast("grpc.Call", error)
        if call.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            why = f"refuses: {call.details()}"
            raise ids.PeerUnreachable(self._peer, self._address, why, "identity") from error

    def _open(self) -> _Link:
        """A ticket over mTLS, then the connection that it is for."""
        with ids.open_channel(self._identity, self._peer, self._address) as channel:
            stub = ServerStub(channel)  # type: ignore[no-untyped-call]
            request = pb.OpenChannelRequest(
                kind="tcp",
                header=header_of(self._route),
                size_bytes=self._shape.size_bytes,
                block_bytes=self._shape.block_bytes,
                plain=not self._encrypt,
            )
            left_s = max(0.1, min(self._stall_s, self._gives_up_at - time.monotonic()))
            reply = stub.OpenChannel(request, timeout=left_s)
        if reply.HasField("refusal"):
            refusal = reply.refusal
            reason = Reason(int(refusal.reason))
            if reason is Reason.NO_CARRIER:
                raise Unavailable("tcp", refusal.message)
            raise Refused(reason, f"{self._peer}: {refusal.message}", refusal.block)
        host = self._address.rpartition(":")[0].strip("[]")
        end = socket.create_connection((host, reply.tcp.port), timeout=min(CONNECT_S, left_s))
        try:
            if not self._encrypt and not self._force:
                _check_private(end)
            return _Link(end, reply.tcp, self._encrypt, self._shape)
        except BaseException:
            end.close()
            raise


class _Link:
    """One connection, authenticated both ways."""

    def __init__(
        self, end: socket.socket, ticket: pb.TcpTicket, encrypt: bool, shape: Shape
    ) -> None:
        self.end = end
        self.number = end.fileno()  # good for `poll` when the socket is closed meanwhile
        self.up = Seal(ticket.key_up)
        down = Seal(ticket.key_down)
        frames.tune(end, shape)
        self.near = frames.is_near(end)
        hello = memoryview(bytearray(HEAD.size + frames.TAG_BYTES))
        self.up.close(Kind.HELLO, b"", hello)
        end.sendall(frames.MAGIC + ticket.ticket + hello)
        first = Reader(end, down, frames.TAG_BYTES)
        first.expect(0)
        while not first.fill():
            pass
        if first.frame(memoryview(bytearray()))[0] is not Kind.READY:
            raise Broken("no answer to the ticket")
        if not encrypt:
            self.up, down = Seal(None), Seal(None)
        end.setblocking(False)
        self.reader = Reader(end, down, frames.max_body_bytes(shape))
        self.readable, self.both = select.poll(), select.poll()
        self.readable.register(end, select.POLLIN)
        self.both.register(end, select.POLLIN | select.POLLOUT)

    def close(self) -> None:
        """From any thread: who waits in `poll` wakes up."""
        with contextlib.suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()


def _check_private(end: socket.socket) -> None:
    """Raises Unavailable where strangers may listen."""
    there = ipaddress.ip_address(end.getpeername()[0].partition("%")[0])
    if isinstance(there, ipaddress.IPv6Address) and there.ipv4_mapped is not None:
        there = there.ipv4_mapped
    if there.is_global:
        why = f"`encrypt: false` is refused for {there}, a public address (`force: true` insists)"
        raise Unavailable("tcp", why)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"the port does not answer within {CONNECT_S:g} s (is it filtered by a firewall?)"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens on the port"
    if isinstance(error, grpc.RpcError):
        return str(cast("grpc.Call", error).code().name)
    return str(error) or type(error).__name__


def open_tcp(
    identity: ids.Identity, address: str, route: Route, shape: Shape, options: Mapping[str, Any]
) -> TcpChannel:
    """A channel that is connected. Raises Unavailable, Refused or PeerUnreachable."""
    channel = TcpChannel(
        identity,
        address,
        route,
        shape,
        encrypt=options.get("encrypt", True),
        force=options.get("force", False),
    )
    channel.connect()
    return channel
