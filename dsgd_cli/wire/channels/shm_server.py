"""The way into a server's shm channels: tickets, the socket's name, and the thread behind it.

A worker is in by a ticket that OpenChannel gave it over mTLS (once, for 10 s) and by its user id.
The socket has an abstract, random name: it works where file systems differ (containers), needs no
folder, and cannot be left behind. It is as visible as the network namespace, hence ticket and uid;
a worker in another network namespace is told to use another channel.

What the thread does is in `shm_loop`, which is imported when a worker comes: it needs numpy.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import HeldShard, Holding, Reason, Refused, Route
from dsgd_cli.wire.channels.shm_records import TICKET_BYTES, Ticket, host
from dsgd_cli.wire.channels.spin import Spin

if TYPE_CHECKING:
    from dsgd_cli.wire.channels.shm_loop import Loop

TICKET_LIFE_S = 10.0
BACKLOG = 64


class ShmCarrier:
    """A `Carrier`. Its thread starts with the first ticket."""

    def __init__(self, holding: Holding, *, spin: Spin | None = None) -> None:
        self._holding = holding
        self._spin = Spin() if spin is None else spin
        self._host = host()
        self._name = "dsgd-" + secrets.token_hex(16)
        self._lock = threading.Lock()
        self._tickets: dict[bytes, Ticket] = {}
        self._orders: queue.SimpleQueue[Callable[[Route], bool] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: Loop | None = None
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind("\0" + self._name)
        self._listener.listen(BACKLOG)

    # ── from the server's loop ──

    def open(self, request: pb.OpenChannelRequest, route: Route, held: HeldShard) -> pb.ShmTicket:
        if held.memory < 0:
            raise Refused(Reason.NO_CARRIER, "this host has no memfd")
        if request.host and request.host != self._host:
            raise Refused(Reason.NO_CARRIER, "the worker is on another host")
        ticket = secrets.token_bytes(TICKET_BYTES)
        now = time.monotonic()
        with self._lock:
            self._tickets = {key: old for key, old in self._tickets.items() if old.ends_at > now}
            self._tickets[ticket] = Ticket(route, held, now + TICKET_LIFE_S)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shm", daemon=True)
                self._thread.start()
        return pb.ShmTicket(socket="@" + self._name, ticket=ticket, host=self._host)

    def retire(self, is_over: Callable[[Route], bool]) -> None:
        with self._lock:
            over = [key for key, old in self._tickets.items() if is_over(old.route)]
            for key in over:
                del self._tickets[key]
        self._orders.put(is_over)
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._orders.put(None)
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join(5)
        self._listener.close()
        os.close(self._wake)

    def take(self, ticket: bytes) -> Ticket | None:
        """The ticket, which is used up by this."""
        with self._lock:
            found = self._tickets.pop(ticket, None)
        return found if found is not None and found.ends_at > time.monotonic() else None

    # ── the thread ──

    def _run(self) -> None:
        from dsgd_cli.wire.channels.shm_loop import Loop

        loop = self._loop = Loop(self._holding, self.take, self._spin, self._listener, self._wake)
        try:
            while True:
                loop.turn()
                if loop.woken and self._obey(loop):
                    return
        finally:
            loop.close()

    def _obey(self, loop: Loop) -> bool:
        loop.woken = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._orders.empty():
            is_over = self._orders.get()
            if is_over is None:
                return True
            loop.retire(is_over)
        return False
