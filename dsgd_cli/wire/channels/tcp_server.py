"""The server's end of the tcp channel: a door, and a thread for each connection to a large shard.

The door's thread accepts, reads tickets without ever waiting for a single peer, and serves small
shards itself, one exchange after the other. A connection to a large shard has a thread that sleeps
in the kernel until a whole frame is there; half as many of them as there are cores compute at a
time, the others receive or send; the shard's locks keep them apart.

A ticket is good for one connection within 10 s, and for the worker, shard, incarnation and run that
it was made for. A worker has one connection: a new one ends the one before. Back-pressure is the
socket: nothing more is read before the answer is out. A frame that began must be complete within
`FRAME_S`, so that half a frame holds nothing up but its own connection.

Measured with 2 cores (CPU time per push on the server, threads against the door): 38 KB 56 against
63 us with one worker, 81 against 76 with sixteen; 300 KB 147 against 185 us with one; 1 MB 393
against 439 with one, 673 against 553 with sixteen, until the number that compute was bounded, which
makes a third more pushes. So: threads where a frame is long, the door where it is not.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels import frames
from dsgd_cli.wire.channels.base import HeldShard, Holding, Route
from dsgd_cli.wire.channels.frames import HEAD, Broken, Kind, Reader, Seal
from dsgd_cli.wire.channels.spin import Spin
from dsgd_cli.wire.channels.tcp_session import Session

TICKET_S = 10.0
HELLO_S = 5.0  # from accept to a valid hello
FRAME_S = 30.0  # for the rest of a frame, or for the peer to take an answer
TICK_S = 0.5
MAX_HALF_OPEN = 512  # the oldest goes first
OWN_THREAD_BYTES = frames.INLINE_BYTES + 1  # of a shard

HELLO_BYTES = len(frames.MAGIC) + frames.TICKET_BYTES + HEAD.size + frames.TAG_BYTES


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a connection that shows it will be."""

    route: Route
    held: HeldShard
    key_up: bytes
    key_down: bytes
    plain: bool
    good_until: float

    def __repr__(self) -> str:
        return f"Ticket({self.route})"


class TcpCarrier:
    """A `Carrier`."""

    def __init__(
        self,
        holding: Holding,
        bind: str,
        *,
        own_thread_bytes: int = OWN_THREAD_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holding = holding
        self._own_thread_bytes = own_thread_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._turns = _Turns(max(1, len(os.sched_getaffinity(0)) // 2))
        self._tickets: dict[bytes, Ticket] = {}
        self._served: dict[int, _Connection] = {}  # worker -> its connection
        self._closed = False
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        both = bind == "::" and socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            (bind, 0), family=family, backlog=256, dualstack_ipv6=both
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.advertised_port = self.port
        self._wake_out, self._wake_in = os.pipe()
        self._door = threading.Thread(target=self._watch, name="tcp", daemon=True)
        self._door.start()

    # ── Carrier ──

    def open(self, request: pb.OpenChannelRequest, route: Route, held: HeldShard) -> pb.TcpTicket:
        name = os.urandom(frames.TICKET_BYTES)
        keys = os.urandom(frames.KEY_BYTES), os.urandom(frames.KEY_BYTES)
        now = self._clock()
        ticket = Ticket(route, held, *keys, request.plain, now + TICKET_S)
        with self._lock:
            for other, old in tuple(self._tickets.items()):
                if old.good_until < now or old.route.worker == route.worker:
                    del self._tickets[other]
            self._tickets[name] = ticket
        return pb.TcpTicket(
            port=self.advertised_port, ticket=name, key_up=keys[0], key_down=keys[1]
        )

    def retire(self, is_over: Callable[[Route], bool]) -> None:
        with self._lock:
            for name, ticket in tuple(self._tickets.items()):
                if is_over(ticket.route):
                    del self._tickets[name]
            over = [each for each in self._served.values() if is_over(each.route)]
        for connection in over:
            connection.hang_up()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tickets.clear()
            served = list(self._served.values())
        os.write(self._wake_in, b"x")
        for connection in served:
            connection.hang_up()
        self._door.join(5.0)
        os.close(self._wake_in)
        if not self._door.is_alive():
            os.close(self._wake_out)

    # ── the door ──

    def _watch(self) -> None:
        door = _Door(self, self._listener, self._wake_out)
        try:
            door.run()
        finally:
            door.close()
            self._listener.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def redeem(self, name: bytes) -> Ticket | None:
        """The ticket, which is gone with this."""
        with self._lock:
            ticket = self._tickets.pop(name, None)
        return ticket if ticket is not None and self._clock() <= ticket.good_until else None

    def admit(self, end: socket.socket, ticket: Ticket, hello: bytes) -> _Connection:
        """A connection whose hello opens with the ticket's key. Raises Broken."""
        up, down = Seal(ticket.key_up), Seal(ticket.key_down)
        head, body = hello[: HEAD.size], hello[HEAD.size :]
        if HEAD.unpack(head)[:2] != (frames.TAG_BYTES, Kind.HELLO):
            raise Broken("no hello")
        up.open(head, memoryview(body), memoryview(bytearray()))
        ready = memoryview(bytearray(HEAD.size + frames.TAG_BYTES))
        down.close(Kind.READY, b"", ready)
        end.send(ready)  # the first bytes on this connection always fit
        if ticket.plain:
            up, down = Seal(None), Seal(None)
        session = Session(self._holding, ticket.route, ticket.held, down)
        own = ticket.held.shape.size_bytes >= self._own_thread_bytes
        connection = _Connection(end, ticket, up, session, own, self._turns)
        with self._lock:
            if self._closed:
                raise Broken("closed")
            before = self._served.get(ticket.route.worker)
            self._served[ticket.route.worker] = connection
        if before is not None:
            before.hang_up()
        if own:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        return connection

    def forget(self, connection: _Connection) -> None:
        connection.close()
        with self._lock:
            if self._served.get(connection.route.worker) is connection:
                del self._served[connection.route.worker]

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        finally:
            self.forget(connection)


class _Door:
    """The state of the door's thread."""

    def __init__(self, carrier: TcpCarrier, listener: socket.socket, wake: int) -> None:
        self._carrier = carrier
        self._listener = listener
        self._wake = wake
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)
        self._poll.register(wake, select.EPOLLIN)
        self._guests: dict[int, _Guest] = {}  # no valid hello yet; the oldest first
        self._small: dict[int, _Connection] = {}
        self._spin = Spin()
        self._next_tick = 0.0

    def run(self) -> None:
        while not self._carrier.closed:
            for number, events in self._ready():
                if number == self._listener.fileno():
                    self._accept()
                elif number in self._guests:
                    self._hear(self._guests[number])
                elif number in self._small:
                    self._turn(number, self._small[number], events)
            now = time.monotonic()
            if now >= self._next_tick:
                self._next_tick = now + TICK_S
                self._sweep(now)

    def _ready(self) -> list[tuple[int, int]]:
        if not self._small:
            return self._poll.poll(TICK_S)
        return self._spin.wait(lambda: self._poll.poll(0), lambda: self._poll.poll(TICK_S))

    def close(self) -> None:
        for guest in self._guests.values():
            guest.end.close()
        for connection in self._small.values():
            self._carrier.forget(connection)
        self._poll.close()

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: the tick makes room
            return
        end.setblocking(False)
        if len(self._guests) >= MAX_HALF_OPEN:
            self._dismiss(next(iter(self._guests.values())))
        self._guests[end.fileno()] = _Guest(end, time.monotonic() + HELLO_S)
        self._poll.register(end, select.EPOLLIN)

    def _hear(self, guest: _Guest) -> None:
        try:
            data = guest.end.recv(HELLO_BYTES - len(guest.heard))
            guest.heard += data
            name = guest.name
            if not data or not guest.heard.startswith(frames.MAGIC[: len(guest.heard)]):
                raise Broken("no hello")
            if len(guest.heard) < HELLO_BYTES:
                return
            ticket = self._carrier.redeem(name)
            if ticket is None:
                raise Broken("no such ticket")
        except BlockingIOError:
            return
        except (OSError, Broken):
            self._dismiss(guest)
            return
        self._forget(guest)
        try:
            hello = guest.heard[-HEAD.size - frames.TAG_BYTES :]
            connection = self._carrier.admit(guest.end, ticket, hello)
        except (OSError, Broken):
            guest.end.close()
            return
        if not connection.own_thread:
            self._small[guest.number] = connection
            self._poll.register(guest.number, select.EPOLLIN)
            self._count()

    def _forget(self, guest: _Guest) -> None:
        del self._guests[guest.number]
        self._poll.unregister(guest.number)

    def _dismiss(self, guest: _Guest) -> None:
        self._forget(guest)
        guest.end.close()

    def _turn(self, number: int, connection: _Connection, events: int) -> None:
        """Reads and answers what is there, without waiting."""
        try:
            waits_to_write = connection.turn()
            wanted = select.EPOLLOUT if waits_to_write else select.EPOLLIN
            if wanted != connection.wanted:
                connection.wanted = wanted
                self._poll.modify(number, wanted)
        except (OSError, Broken):
            self._drop(number, connection)
        except Exception:  # a bug: it ends this connection, not everybody's
            traceback.print_exc()
            self._drop(number, connection)

    def _drop(self, number: int, connection: _Connection) -> None:
        del self._small[number]
        with contextlib.suppress(OSError, ValueError):
            self._poll.unregister(number)
        self._carrier.forget(connection)
        self._count()

    def _count(self) -> None:
        """How many processes of this host take part, for whoever thinks of polling."""
        near = [each for each in self._small.values() if each.near]
        self._spin.processes = 1 + len(near)
        for connection in near:
            connection.say_crowd(len(near))

    def _sweep(self, now: float) -> None:
        for guest in [each for each in self._guests.values() if each.until < now]:
            self._dismiss(guest)
        for number, connection in tuple(self._small.items()):
            if connection.is_stuck(now):
                self._drop(number, connection)


class _Guest:
    """Somebody at the door."""

    def __init__(self, end: socket.socket, until: float) -> None:
        self.end = end
        self.number = end.fileno()
        self.until = until
        self.heard = b""

    @property
    def name(self) -> bytes:
        at = len(frames.MAGIC)
        return self.heard[at : at + frames.TICKET_BYTES]


class _Turns:
    """So many threads may compute at a time, each on memory that is still in the caches."""

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)
        self._plain = [memoryview(b"")] * count

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[memoryview]:
        """Yields at least `size` bytes."""
        with self._free:
            plain = self._plain.pop()
            try:
                if len(plain) < size:
                    plain = memoryview(frames.aligned(size))
                yield plain
            finally:
                self._plain.append(plain)


class _Connection:
    """A worker's connection. `serve` is for a thread of its own, `turn` for the door's."""

    def __init__(
        self,
        end: socket.socket,
        ticket: Ticket,
        up: Seal,
        session: Session,
        own_thread: bool,
        turns: _Turns,
    ) -> None:
        self.route = ticket.route
        self.own_thread = own_thread
        self.near = frames.is_near(end)
        self.wanted = int(select.EPOLLIN)
        self._end = end
        self._session = session
        self._stuck_at = 0.0  # of `turn`: since when a frame or an answer is half done; 0: not
        self._answers: Iterator[memoryview] = iter(())
        self._unsent: memoryview | None = None
        body = frames.max_body_bytes(ticket.held.shape)
        self._body = 0 if up.plain else body
        self._plain = memoryview(b"" if own_thread or up.plain else frames.aligned(body))
        self._reader = Reader(end, up, body)
        self._turns = turns
        frames.tune(end, ticket.held.shape)
        _keep_alive(end)
        if own_thread:
            end.setblocking(True)
            limit = struct.pack("ll", int(FRAME_S), 0)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def say_crowd(self, workers: int) -> None:
        """From now on tells the worker how many of them there are on this host."""
        self._session.down.crowd = min(workers, 0xFF)

    def hang_up(self) -> None:
        """From any thread: the thread that serves it sees the end."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._end.close()

    # ── a thread of its own ──

    def serve(self) -> None:
        """Until the connection ends."""
        with contextlib.suppress(OSError, Broken):
            while True:
                self._await_frame()
                with self._turns.taken(self._body) as plain:
                    answers = self._session.take(*self._reader.frame(plain))
                    answer = next(answers, None)
                while answer is not None:
                    self._end.sendall(answer)
                    with self._turns.taken(0):
                        answer = next(answers, None)

    def _await_frame(self) -> None:
        reader = self._reader
        reader.expect(self._session.expected())
        until = None
        while True:
            try:
                if reader.fill(socket.MSG_WAITALL):
                    return
            except BlockingIOError:  # nothing for FRAME_S
                if self._session.begun:
                    raise Broken("half an exchange") from None
            if reader.begun:
                now = time.monotonic()
                until = until or now + FRAME_S
                if now > until:
                    raise Broken("half a frame")

    # ── the door's thread ──

    def turn(self) -> bool:
        """Sends what is unsent, else reads; True when it waits for the peer to take an answer."""
        if not self._send():
            return True
        self._reader.expect(self._session.expected())
        try:
            if self._reader.fill():
                self._answers = self._session.take(*self._reader.frame(self._plain))
                return not self._send()
        except BlockingIOError:
            pass
        if self._reader.begun and not self._stuck_at:
            self._stuck_at = time.monotonic() + FRAME_S
        return False

    def is_stuck(self, now: float) -> bool:
        return 0.0 < self._stuck_at < now

    def _send(self) -> bool:
        while True:
            if self._unsent is None:
                self._unsent = next(self._answers, None)
                if self._unsent is None:
                    self._stuck_at = 0.0
                    return True
            try:
                sent = self._end.send(self._unsent)
            except BlockingIOError:
                if not self._stuck_at:
                    self._stuck_at = time.monotonic() + FRAME_S
                return False
            self._unsent = self._unsent[sent:] if sent < len(self._unsent) else None


def _keep_alive(end: socket.socket) -> None:
    """A host that vanished is noticed within half a minute."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
