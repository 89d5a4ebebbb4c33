"""The thread behind a server's shm channels: one loop for all workers of this host.

One thread, because small models are bound by the interpreter, which threads would only hand to and
fro; each turn gives every connection that has work about one block: a large push delays nobody.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import traceback
from collections.abc import Callable
from typing import TypeAlias

from dsgd_cli.wire.channels.base import (
    HeldShard,
    Holding,
    Route,
)
from dsgd_cli.wire.channels.shm_member import Ended, Member, SharedShard
from dsgd_cli.wire.channels.shm_memory import (
    DESKS,
    SLOTS_AT,
    Unfit,
    attach,
    fence,
    owner,
)
from dsgd_cli.wire.channels.shm_records import (
    HELLO,
    MAGIC,
    WELCOME,
    Ticket,
)
from dsgd_cli.wire.channels.spin import Spin

Events: TypeAlias = list[tuple[int, int]]  # (descriptor, what epoll says of it; 0: it asks)

STRANGERS = 64  # connections that have not shown a ticket yet
STRANGER_LIFE_S = 10.0
NAP_S = 30e-6  # while everybody waits for a reader
IDLE_S = 1.0
LOOKS = 16  # at the desks, for each at the sockets


class Loop:
    """Everything that only the thread touches."""

    def __init__(
        self,
        holding: Holding,
        take: Callable[[bytes], Ticket | None],
        spin: Spin,
        listener: socket.socket,
        wake: int,
    ) -> None:
        self.woken = False
        self._holding = holding
        self._take = take
        self._spin = spin
        self._listener = listener
        self._wake = wake
        self._epoll = select.epoll()
        self._epoll.register(wake, select.EPOLLIN)
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._strangers: dict[int, tuple[socket.socket, float]] = {}
        self._members: dict[int, Member] = {}
        self._shards: dict[int, SharedShard] = {}  # by id(held)
        self._working: dict[int, Member] = {}
        self._watches = False  # the desks; whoever asks while it does not must ring
        self._looks = 0
        self._sweep_at = 0.0

    def turn(self) -> None:
        """What has come in, then one piece of work of everybody."""
        events = self._look() if self._working else self._spin.wait(self._poll, self._sleep)
        for fd, mask in events:
            self._event(fd, mask)
        if self._working:
            self._work(bool(events))
        if self._strangers and time.monotonic() > self._sweep_at:
            self._sweep()

    def retire(self, is_over: Callable[[Route], bool]) -> None:
        for fd, member in tuple(self._members.items()):
            if is_over(member.route):
                self._drop(fd)

    def close(self) -> None:
        for fd in tuple(self._members):
            self._drop(fd)
        for connection, _ in self._strangers.values():
            connection.close()
        self._epoll.close()

    def _poll(self) -> Events:
        """One look of many."""
        if not self._watches:
            self._watch(True)
        return self._look()

    def _look(self) -> Events:
        if not self._watches:
            return self._epoll.poll(0)
        asking = self._asking()
        self._looks += 1
        return asking if self._looks % LOOKS else asking + self._epoll.poll(0)

    def _sleep(self) -> Events:
        if self._watches:
            self._watch(False)
            if asking := self._asking():
                return asking
        return self._epoll.poll(IDLE_S)

    def _asking(self) -> Events:
        return [(fd, 0) for fd, member in self._members.items() if member.asks()]

    def _watch(self, on: bool) -> None:
        self._watches = on
        self._tell_all()
        fence()

    def _tell_all(self) -> None:
        processes = self._spin.processes
        for member in self._members.values():
            member.tell(not self._watches, processes)

    def _event(self, fd: int, mask: int) -> None:
        member = self._members.get(fd)
        try:
            if member is not None:
                if mask:
                    member.woken()
                if member.asks():
                    member.begin()
                    self._working[fd] = member
            elif fd in self._strangers:
                self._welcome(fd)
            elif fd == self._wake:
                self.woken = True
            else:
                self._accept()
        except (Ended, Unfit, OSError):
            self._drop(fd)
        except Exception:
            traceback.print_exc()
            self._drop(fd)

    def _work(self, moved: bool) -> None:
        """A piece of each; the answers after all, so that nobody reads what changes next."""
        working = tuple(self._working.items())
        for fd, member in working:
            try:
                moved |= member.work()
            except Exception:
                traceback.print_exc()
                self._drop(fd)
        for fd, member in working:
            try:
                member.flush()
            except OSError:
                self._drop(fd)
                continue
            if not member.busy:
                self._working.pop(fd, None)
                if fd in self._members:
                    self._event(fd, 0)  # who asked in the middle of its exchange has rung already
        for _, member in working:
            member.shard.fresh.clear()
        if not moved:
            time.sleep(NAP_S)

    # ── who comes and goes ──

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if len(self._strangers) >= STRANGERS or owner(connection) != os.geteuid():
                connection.close()
                return
            self._strangers[connection.fileno()] = (connection, time.monotonic() + STRANGER_LIFE_S)
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _sweep(self) -> None:
        now = self._sweep_at = time.monotonic()
        self._sweep_at += IDLE_S
        for fd, (_, ends_at) in tuple(self._strangers.items()):
            if now > ends_at:
                self._drop(fd)

    def _welcome(self, fd: int) -> None:
        connection, _ = self._strangers[fd]
        data, fds, _, _ = socket.recv_fds(connection, HELLO.size, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if len(data) != HELLO.size or len(fds) != 1:
                raise Ended
            magic, key, size, place, servers = HELLO.unpack(data)
            ticket = self._take(key)
            if magic != MAGIC or ticket is None or place >= DESKS or size < SLOTS_AT:
                raise Ended
            memory = attach(fds[0], size)
        finally:
            for received in fds:
                os.close(received)
        shard = self._shared(ticket.held)
        member = Member(connection, ticket.route, shard, self._holding, memory, place)
        member.tell(not self._watches, 0)
        welcome = WELCOME.pack(MAGIC, shard.size_bytes, len(shard.fds) - 1)
        held, *snapshots = shard.fds
        socket.send_fds(connection, [welcome], [held, member.fd, *snapshots])
        del self._strangers[fd]
        self._members[fd] = member
        shard.members.add(member)
        self._count(servers)

    def _shared(self, held: HeldShard) -> SharedShard:
        shard = self._shards.get(id(held))
        if shard is None:
            shard = self._shards[id(held)] = SharedShard(held)
        return shard

    def _drop(self, fd: int) -> None:
        self._working.pop(fd, None)
        stranger = self._strangers.pop(fd, None)
        if stranger is not None:
            self._epoll.unregister(fd)
            stranger[0].close()
        member = self._members.pop(fd, None)
        if member is not None:
            self._epoll.unregister(fd)
            member.close()
            if not member.shard.members:
                self._shards.pop(id(member.shard.held), None)
            self._count(1)

    def _count(self, servers: int) -> None:
        """How many processes of this host take part, for whoever thinks of polling."""
        self._spin.processes = len(self._members) + max(1, servers)
        self._tell_all()
