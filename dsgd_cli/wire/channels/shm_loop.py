"""The server's end of the shm channels: one thread, one loop, for all workers of this host.

One thread, because small models are bound by the interpreter, which threads would only hand to and
fro; each turn gives every connection that has work about one block: a large push delays nobody.

Trust. The worker's memory is a place where numbers come from, nothing else: lengths and places come
from the shard's shape. A block of the gradient is copied to memory of our own first and checked and
applied there, so a worker that writes while it should not spoils its own update, not the shard.

A worker copies what was announced while others push. So that it need not copy again and again, a
block stays unchanged while a reader says in its word that it is at it, for at most `HOLD_S`: a
courtesy, which correctness does not need (see `shm`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from dsgd_cli.wire.channels.base import (
    Header,
    HeldShard,
    Holding,
    Operation,
    Reason,
    Refused,
    Route,
    State,
)
from dsgd_cli.wire.channels.shm_memory import (
    PAGE,
    WORDS,
    Bytes,
    Unfit,
    as_bytes,
    attach,
    owner,
    stamps_at,
)
from dsgd_cli.wire.channels.shm_records import (
    FRESH,
    HELLO,
    MAGIC,
    REFUSED,
    REPLY,
    REQUEST,
    STATE,
    WELCOME,
    Ticket,
)
from dsgd_cli.wire.channels.shm_snapshots import Snapshot, Snapshots, pays
from dsgd_cli.wire.channels.spin import Spin

STRANGERS = 64  # connections that have not shown a ticket yet
STRANGER_LIFE_S = 10.0
TURN_BYTES = 1 << 20  # of one connection, before the others have theirs
MESSAGE_BYTES = 1 << 12
HOLD_S = 0.01
HOLD_BLOCK_BYTES = 1 << 17  # a smaller block is copied before anybody could wait for it
NAP_S = 30e-6
IDLE_S = 1.0
PREPARED = 8  # slots of one worker
POPULATE_READ = 22  # MADV_POPULATE_READ, not in the `mmap` module
_GONE = 1 << 63  # in place of its word: it has read whatever it will


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
        self._shards: dict[int, _SharedShard] = {}  # by id(held)
        self._working: dict[int, Member] = {}
        self._sweep_at = 0.0

    def turn(self) -> None:
        """What has come in, then one piece of work of everybody."""
        events = self._poll() if self._working else self._spin.wait(self._poll, self._sleep)
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

    def _poll(self) -> list[tuple[int, int]]:
        return self._epoll.poll(0)

    def _sleep(self) -> list[tuple[int, int]]:
        return self._epoll.poll(IDLE_S)

    def _event(self, fd: int, mask: int) -> None:
        member = self._members.get(fd)
        try:
            if member is not None:
                if mask & select.EPOLLOUT:
                    self._epoll.modify(fd, select.EPOLLIN)
                if mask & ~select.EPOLLOUT:
                    member.receive()
                if member.busy:
                    self._working[fd] = member
            elif fd in self._strangers:
                self._welcome(fd)
            elif fd == self._wake:
                self.woken = True
            else:
                self._accept()
        except (_Ended, Unfit, OSError):
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
                stuck = member.flush()
            except OSError:
                self._drop(fd)
                continue
            if stuck:  # it does not read: on with it when it does
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
            if stuck or not member.busy:
                self._working.pop(fd, None)
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
                raise _Ended
            magic, key, size, word, servers = HELLO.unpack(data)
            ticket = self._take(key)
            if magic != MAGIC or ticket is None or word >= WORDS or size < PAGE:
                raise _Ended
            memory = attach(fds[0], size)
        finally:
            for received in fds:
                os.close(received)
        shard = self._shared(ticket.held)
        welcome = WELCOME.pack(MAGIC, shard.size_bytes, len(shard.fds) - 1)
        socket.send_fds(connection, [welcome], shard.fds)
        member = Member(connection, ticket.route, shard, self._holding, memory, word)
        del self._strangers[fd]
        self._members[fd] = member
        shard.members.add(member)
        self._count(servers)

    def _shared(self, held: HeldShard) -> _SharedShard:
        shard = self._shards.get(id(held))
        if shard is None:
            shard = self._shards[id(held)] = _SharedShard(held)
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
        processes = len(self._members) + max(1, servers)
        self._spin.processes = processes
        for member in self._members.values():
            member.processes = min(processes, 0xFFFF)


class _Ended(Exception):
    """A connection that is over, or has broken the rules."""


class _SharedShard:
    """What the members of one shard have in common."""

    def __init__(self, held: HeldShard) -> None:
        self.held = held
        self.shape = held.shape
        self.size_bytes = stamps_at(self.shape.size_bytes) + 8 * self.shape.blocks
        self.members: set[Member] = set()
        self.readers: dict[int, dict[Member, _Reader]] = {}
        self.own = np.empty(min(self.shape.block_bytes, self.shape.size_bytes), np.uint8)
        self.holds = self.shape.block_bytes >= HOLD_BLOCK_BYTES
        self.snapshots = Snapshots(self.shape) if pays(self.shape) else None
        self.fds = [held.memory] + ([self.snapshots.fd] if self.snapshots else [])
        self.fresh: dict[int, Snapshot] = {}  # of this turn

    def announce(self, block: int, member: Member) -> Snapshot | None:
        """What the member is to read: a copy of the block, or None: the block itself."""
        member.announced += 1
        if len(self.members) == 1:
            return None
        if self.snapshots is None:
            if self.holds:
                self._reads(block, member, member.announced)
            return None
        snapshot = self.fresh.get(block)
        if snapshot is None:
            old_block, readers = self.snapshots.next_readers()
            for reader, announced in readers:  # too late for the copy, it may read the block
                if reader.copied()[0] < announced:
                    self._reads(old_block, reader, announced)
            snapshot = self.snapshots.take(self.held, member.route.worker, block)
            self.fresh[block] = snapshot
        self.snapshots.reads(snapshot, member)
        return snapshot

    def _reads(self, block: int, member: Member, announced: int) -> None:
        self.readers.setdefault(block, {})[member] = _Reader(announced)

    def is_read(self, block: int, but: Member) -> bool:
        """Whether somebody else is copying the block now."""
        readers = self.readers.get(block)
        if not readers:
            return False
        now = time.monotonic()
        busy = False
        for member, reader in tuple(readers.items()):
            copied, reading = member.copied()
            if member is but or copied >= reader.announced or reader.until < now:
                del readers[member]
            elif reading:
                reader.until = min(reader.until, now + HOLD_S)
                busy = True
        return busy


class _Reader:
    """A member that was told of a block; `until`: how long who changes it waits."""

    __slots__ = ("announced", "until")

    def __init__(self, announced: int) -> None:
        self.announced = announced
        self.until = math.inf  # it counts from when somebody first has to wait


class Member:
    """A worker's connection, and its place in an exchange."""

    def __init__(
        self,
        connection: socket.socket,
        route: Route,
        shard: _SharedShard,
        holding: Holding,
        memory: mmap.mmap,
        word: int,
    ) -> None:
        self.route = route
        self.shard = shard
        self.processes = 2
        self.announced = 0
        self.busy = False  # has work, or something to send
        self._connection = connection
        self._holding = holding
        self._memory = memory
        self._gradients = as_bytes(memory)
        self._touched: set[int] = set()
        self._words = memoryview(memory)[:PAGE].cast("Q")
        self._word = word
        self._open = True
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._answers: list[tuple[int, int, State]] = []  # of this turn
        self._refusal: Refused | None = None
        self._job: Iterator[int] | None = None
        self._received = bytearray(REQUEST.size + 8 * shard.shape.blocks)

    def copied(self) -> tuple[int, int]:
        """How many announcements the worker has dealt with, and whether it is reading at all."""
        word = self._words[self._word] if self._open else _GONE
        return word >> 1, word & 1

    def receive(self) -> None:
        got = self._connection.recv_into(self._received)
        if not got or self._job is not None:
            raise _Ended
        self._inbox += memoryview(self._received)[:got]
        if len(self._inbox) < REQUEST.size:
            return
        seq, offset, since_count, operation = REQUEST.unpack_from(self._inbox)
        if since_count not in (0, self.shard.shape.blocks):
            raise _Ended
        whole = REQUEST.size + 8 * since_count
        if len(self._inbox) > whole:
            raise _Ended
        if len(self._inbox) == whole:
            since = struct.unpack_from(f"={since_count}Q", self._inbox, REQUEST.size)
            self._inbox.clear()
            self._begin(seq, offset, operation, since)

    def work(self) -> bool:
        """About one block; False where there was nothing that could be done."""
        if self._outbox:
            return False
        done = 0
        try:
            while self._job is not None and done < TURN_BYTES:
                moved = next(self._job)
                done += moved
                if not moved:
                    break
        except Refused as refused:
            self._job = None
            self._refusal = refused
            return True
        return done > 0

    def flush(self) -> bool:
        """Sends the answers of this turn; True where they do not go out."""
        for kind, block, state in self._answers:
            self._pack(kind, block, state)
        self._answers.clear()
        if self._refusal is not None:
            self._pack_refusal(self._refusal)
            self._refusal = None
        if self._outbox:
            with contextlib.suppress(BlockingIOError):
                sent = self._connection.send(self._outbox)
                del self._outbox[:sent]
        self.busy = self._job is not None or bool(self._outbox)
        return bool(self._outbox)

    def close(self) -> None:
        self._open = False
        self.shard.members.discard(self)
        self._connection.close()

    def _begin(self, seq: int, offset: int, number: int, since: tuple[int, ...]) -> None:
        self.busy = True
        try:
            operation = Operation(number)
        except ValueError as error:
            raise _Ended from error
        header = Header(self.route, seq, operation)
        if operation.sends:
            size = self.shard.shape.size_bytes
            if not PAGE <= offset <= self._gradients.size - size:
                raise _Ended
            self._touch(offset, size)
            self._job = self._sent(header, self._gradients[offset : offset + size])
        else:
            self._job = self._pulled(header, since)

    def _touch(self, offset: int, size: int) -> None:
        """Maps the pages of a slot at once, the first time, rather than one fault after another."""
        if offset not in self._touched and len(self._touched) < PREPARED:
            self._touched.add(offset)
            start = offset // PAGE * PAGE
            with contextlib.suppress(OSError):  # Linux < 5.14
                self._memory.madvise(POPULATE_READ, start, offset + size - start)

    def _sent(self, header: Header, gradient: Bytes) -> Iterator[int]:
        """The work of a push or write; yields bytes done, 0 when it has to wait."""
        held = self._admit(header)
        shape, shard = self.shard.shape, self.shard
        operation = header.operation
        change = held.write if operation is Operation.WRITE else held.push
        kind = FRESH if operation.fetches else STATE
        for block in range(shape.blocks):
            while shard.holds and shard.is_read(block, self):
                yield 0
            start, stop = shape.bounds(block)
            own = shard.own[: stop - start]
            np.copyto(own, gradient[start:stop])
            self._say(kind, block, change(header, block, own.data))
            yield stop - start

    def _pulled(self, header: Header, since: tuple[int, ...]) -> Iterator[int]:
        held = self._admit(header)
        worker = self.route.worker
        for block in range(self.shard.shape.blocks):
            state = held.read(worker, block)
            self._say(STATE if since and state[0] <= since[block] else FRESH, block, state)
            yield 1 << 12  # announcing is cheap: many blocks make a turn

    def _admit(self, header: Header) -> HeldShard:
        held = self._holding.admit(header)
        if held is not self.shard.held:
            raise Refused(Reason.WRONG_EPOCH, "this channel is of an earlier run")
        return held

    def _say(self, kind: int, block: int, state: State) -> None:
        self._answers.append((kind, block, state))
        if block + 1 == self.shard.shape.blocks:
            self._job = None

    def _pack(self, kind: int, block: int, state: State) -> None:
        version, (incarnation, seq) = state
        place = stamp = 0
        if kind == FRESH:
            snapshot = self.shard.announce(block, self)
            if snapshot is not None:
                place, stamp, version = snapshot.place, snapshot.stamp, snapshot.version
        last = block + 1 == self.shard.shape.blocks
        self._outbox += REPLY.pack(
            version, incarnation, seq, stamp, block, self.processes, place, kind, last
        )

    def _pack_refusal(self, refused: Refused) -> None:
        message = refused.message.encode()[:MESSAGE_BYTES]
        self._outbox += REPLY.pack(
            refused.reason, 0, len(message), 0, refused.block, self.processes, 0, REFUSED, 1
        )
        self._outbox += message
