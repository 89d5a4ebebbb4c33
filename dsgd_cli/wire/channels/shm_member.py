"""A worker's connection at the server's end of shm, and what the workers of a shard share.

Trust. The worker's memory is a place where numbers come from, nothing else: lengths and places come
from the shard's shape. A block of the gradient is copied to memory of our own first and checked and
applied there, so a worker that writes while it should not spoils its own update, not the shard.

Workers copy what was announced while others push. Of a small shard they get snapshots; a block of a
large one stays unchanged while a reader says in its word that it is at it, unless nothing comes of
that for `HOLD_S`: a courtesy, which correctness does not need (see `shm`).
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import time
from collections.abc import Iterator

import numpy as np

from dsgd_cli.wire.channels.base import (
    DROPPED,
    OPERATIONS,
    Header,
    HeldShard,
    Holding,
    Reason,
    Refused,
    Route,
    State,
)
from dsgd_cli.wire.channels.memory import sealed
from dsgd_cli.wire.channels.shm_memory import (
    SLOTS_AT,
    Bytes,
    as_bytes,
    desk,
    fence,
    order,
    stamps_at,
)
from dsgd_cli.wire.channels.shm_records import (
    ANSWER,
    ANSWERED,
    ASKED,
    FRESH,
    MESSAGE_BYTES,
    PROCESSES,
    PROGRESS,
    REFUSAL,
    REFUSAL_AT,
    REFUSED,
    REQUEST,
    REQUEST_AT,
    RING,
    SERVER_SLEEPS,
    SLEEPS,
    STATE,
    answer_at,
    answers_bytes,
)
from dsgd_cli.wire.channels.shm_snapshots import Snapshot, Snapshots, pays

TURN_BYTES = 1 << 20  # of one connection, before the others have theirs
HOLD_S = 0.01
HOLD_BLOCK_BYTES = 1 << 17  # a smaller block is copied before anybody could wait for it
PREPARED = 8  # slots of one worker
RINGS = 64  # bytes that are read at a time
POPULATE_READ = 22  # MADV_POPULATE_READ, not in the `mmap` module
_GONE = 1 << 63  # in place of its word: it has read whatever it will


class Ended(Exception):
    """A connection that is over, or has broken the rules."""


class SharedShard:
    """What the members of one shard have in common."""

    def __init__(self, held: HeldShard) -> None:
        self.held = held
        self.shape = held.shape
        self.size_bytes = stamps_at(self.shape.size_bytes) + 8 * self.shape.blocks
        self.members: set[Member] = set()
        self.readers: dict[int, dict[Member, int]] = {}
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
        self.readers.setdefault(block, {})[member] = announced

    def is_read(self, block: int, but: Member) -> bool:
        """Whether somebody else is copying the block now, and gets on with it."""
        readers = self.readers.get(block)
        if not readers:
            return False
        now = time.monotonic()
        busy = False
        for member, announced in tuple(readers.items()):
            copied, reading = member.copied()
            if member is but or copied >= announced:
                del readers[member]
            elif reading and member.gets_on(copied, now):
                busy = True
        return busy


class Member:
    """A worker's connection, and its place in an exchange."""

    def __init__(
        self,
        connection: socket.socket,
        route: Route,
        shard: SharedShard,
        holding: Holding,
        memory: mmap.mmap,
        place: int,
    ) -> None:
        self.route = route
        self.shard = shard
        self.announced = 0
        self.busy = False  # has work, or something to say
        self._connection = connection
        self._holding = holding
        self._memory = memory
        self._gradients = as_bytes(memory)
        self._touched: set[int] = set()
        mine = desk(memory, place)
        self._record = mine[8 * REQUEST_AT : 8 * REQUEST_AT + REQUEST.size]
        self._desk = mine.cast("Q")
        self.fd, answers = sealed("dsgd-answers", answers_bytes(shard.shape.blocks))
        self._answers = memoryview(answers)
        self._words = self._answers.cast("Q")
        self._number = 0  # of the request that was taken last
        self._seen = -1
        self._waited_until = 0.0
        self._open = True
        self._says: list[tuple[int, int, State]] = []  # in this turn
        self._refusal: Refused | None = None
        self._job: Iterator[int] | None = None

    def copied(self) -> tuple[int, int]:
        """How many announcements the worker has dealt with, and whether it is reading at all."""
        word = self._desk[PROGRESS] if self._open else _GONE
        return word >> 1, word & 1

    def gets_on(self, copied: int, now: float) -> bool:
        """False once others have waited `HOLD_S` for it, until it copies on."""
        if copied != self._seen:
            self._seen, self._waited_until = copied, now + HOLD_S
        return now < self._waited_until

    def tell(self, sleeps: bool, processes: int) -> None:
        """Whether the server must be woken, and how many processes of this host take part."""
        self._words[SERVER_SLEEPS] = sleeps
        self._words[PROCESSES] = processes

    def woken(self) -> None:
        """Its bell rang, or it is gone. Raises Ended, OSError."""
        if not self._connection.recv(RINGS):
            raise Ended

    def asks(self) -> bool:
        """Whether there is a request that was not taken yet."""
        return self._job is None and self._desk[ASKED] != self._number

    def begin(self) -> None:
        """Takes the request. Raises Ended where there can be no such request."""
        order()
        self._number = self._desk[ASKED]
        seq, offset, number, tag = REQUEST.unpack_from(self._record)
        self.busy = True
        operation = OPERATIONS.get(number)
        if operation is None:
            raise Ended
        header = Header(self.route, seq, operation, tag)
        if operation.sends:
            size = self.shard.shape.size_bytes
            if not SLOTS_AT <= offset <= self._gradients.size - size:
                raise Ended
            self._touch(offset, size)
            self._job = self._sent(header, self._gradients[offset : offset + size])
        else:
            self._job = self._pulled(header)

    def work(self) -> bool:
        """About one block; False where there was nothing that could be done."""
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

    def flush(self) -> None:
        """Gives the answers of this turn. Raises OSError."""
        if not self._open:
            return
        said = self._says
        for kind, block, state in said:
            self._pack(kind, block, state)
        order()  # an answer is whole before it bears the number
        for _, block, _ in said:
            self._words[answer_at(block) // 8 + ANSWERED] = self._number
        if self._refusal is not None:
            self._pack_refusal(self._refusal)
        if said or self._refusal is not None:
            said.clear()
            self._refusal = None
            fence()
            if self._desk[SLEEPS]:
                with contextlib.suppress(BlockingIOError):  # it has not read those before this one
                    self._connection.send(RING)
        self.busy = self._job is not None

    def close(self) -> None:
        """Lets go of the worker's memory at once, whoever else remembers this member: a push that
        has begun is a generator, which knows its member, and nothing would free the two soon."""
        self._open = self.busy = False
        self._job = None
        del self._memory, self._gradients, self._record, self._desk
        self.shard.members.discard(self)
        self._connection.close()

    def _touch(self, offset: int, size: int) -> None:
        """Maps the pages of a slot at once, the first time, rather than one fault after another."""
        if offset not in self._touched and len(self._touched) < PREPARED:
            self._touched.add(offset)
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # Linux < 5.14
                self._memory.madvise(POPULATE_READ, start, offset + size - start)

    def _sent(self, header: Header, gradient: Bytes) -> Iterator[int]:
        """The work of a push or write; yields bytes done, 0 when it has to wait."""
        held = self._admit(header)
        shape, shard = self.shard.shape, self.shard
        kind = FRESH if header.operation.fetches else STATE
        for block in range(shape.blocks):
            while shard.holds and shard.is_read(block, self):
                yield 0
            start, stop = shape.bounds(block)
            own = shard.own[: stop - start]
            np.copyto(own, gradient[start:stop])
            self._say(kind, block, held.change(header, block, own.data))
            yield stop - start

    def _pulled(self, header: Header) -> Iterator[int]:
        held = self._admit(header)
        worker = self.route.worker
        for block in range(self.shard.shape.blocks):
            self._say(FRESH, block, held.read(worker, block))
            yield 1 << 12  # announcing is cheap: many blocks make a turn

    def _admit(self, header: Header) -> HeldShard:
        held = self._holding.admit(header)
        if held is not self.shard.held:
            raise Refused(Reason.WRONG_EPOCH, "this channel is of an earlier run")
        return held

    def _say(self, kind: int, block: int, state: State) -> None:
        self._says.append((kind, block, state))
        if block + 1 == self.shard.shape.blocks:
            self._job = None

    def _pack(self, kind: int, block: int, state: State) -> None:
        version, (incarnation, seq) = state
        place = stamp = 0
        if kind == FRESH:
            snapshot = self.shard.announce(block, self)
            if snapshot is not None:
                place, stamp = snapshot.place, snapshot.stamp
                version = snapshot.version | version & DROPPED
        line = answer_at(block)
        ANSWER.pack_into(self._answers, line, version, incarnation, seq, stamp, place, kind)

    def _pack_refusal(self, refused: Refused) -> None:
        message = refused.message.encode()[:MESSAGE_BYTES]
        start = REFUSAL_AT + REFUSAL.size
        self._answers[start : start + len(message)] = message
        REFUSAL.pack_into(self._answers, REFUSAL_AT, refused.reason, refused.block, len(message))
        order()
        self._words[REFUSED] = self._number
