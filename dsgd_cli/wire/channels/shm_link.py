"""One connection of a shm channel, the worker's end: its desk, and what the server's memories hold.

It reads nothing from the server's memory without what says that it is whole: the number of the
request in an answer, the stamps around a block.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Exchange, Reason, Refused, Shape
from dsgd_cli.wire.channels.shm_memory import (
    Bytes,
    GradientMemory,
    Unfit,
    as_bytes,
    attach,
    fence,
    order,
    owner,
    stamps_at,
)
from dsgd_cli.wire.channels.shm_records import (
    ANSWER,
    ANSWER_BYTES,
    ANSWERED,
    ASKED,
    DESK_BYTES,
    HEAD_BYTES,
    HELLO,
    MAGIC,
    MESSAGE_BYTES,
    MOST_BLOCKS,
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
    WELCOME,
    Answer,
    answer_at,
    answers_bytes,
)
from dsgd_cli.wire.channels.shm_snapshots import ring, ring_bytes
from dsgd_cli.wire.channels.spin import Spin

SLEEP_S = 0.1  # then a sleeper looks, and rings, again: nothing hangs on a single byte
RINGS = 64  # bytes that are read at a time


class Lost(Exception):
    """The connection is no more."""


class Link:
    """One connection, and the memories that go with it."""

    def __init__(
        self,
        ticket: pb.ShmTicket,
        shape: Shape,
        gradients: GradientMemory,
        desk: tuple[int, memoryview],
        servers: int,
        stall_s: float,
    ) -> None:
        if shape.blocks > MOST_BLOCKS:
            raise Lost(f"more than {MOST_BLOCKS} blocks in a shard")
        self._servers = servers
        self._stall_s = stall_s
        self._copied = 0
        self._number = 0  # of the newest request
        self._record = desk[1][8 * REQUEST_AT : 8 * REQUEST_AT + REQUEST.size]
        self._desk = desk[1].cast("Q")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        weakref.finalize(self, self._socket.close)
        try:
            self._limit(stall_s)
            self._socket.connect(_path(ticket.socket))
            _check_owner(self._socket)
            self._shake_hands(ticket.ticket, gradients, desk[0], shape)
            self._limit(SLEEP_S)
        except BaseException:
            self._socket.close()
            raise

    def _limit(self, seconds: float) -> None:
        limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)

    def _shake_hands(
        self, ticket: bytes, gradients: GradientMemory, index: int, shape: Shape
    ) -> None:
        for word in range(DESK_BYTES // 8):
            self._desk[word] = 0
        hello = HELLO.pack(MAGIC, ticket, gradients.size_bytes, index, self._servers)
        socket.send_fds(self._socket, [hello], [gradients.fd])
        data, fds, _, _ = socket.recv_fds(
            self._socket, WELCOME.size, 3, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
        )
        try:
            if len(data) != WELCOME.size:
                raise Lost("the server did not welcome this worker")
            magic, size, snapshots = WELCOME.unpack(data)
            if magic != MAGIC or len(fds) != 2 + bool(snapshots):
                raise Lost("the server did not welcome this worker")
            self._attach(fds, size, shape)
        except Unfit as error:
            raise Lost(f"the server's memory is not fit: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def _attach(self, fds: Sequence[int], size: int, shape: Shape) -> None:
        begin = stamps_at(shape.size_bytes)
        if size != begin + 8 * shape.blocks:
            raise Lost("the server has another shard")
        memory = attach(fds[0], size)
        self._values = as_bytes(memory)[: shape.size_bytes]
        self._stamps = memoryview(memory)[begin:].cast("Q")
        self._answers = memoryview(attach(fds[1], answers_bytes(shape.blocks)))
        self._words = self._answers.cast("Q")
        self._places: list[Bytes] = []
        if len(fds) > 2:
            self._place_stamps, self._places = ring(attach(fds[2], ring_bytes(shape)), shape)

    # ── requests and answers ──

    def request(self, exchange: Exchange, offset: int) -> None:
        """Asks. The answers to the request before it must have been taken, or are dropped."""
        REQUEST.pack_into(self._record, 0, exchange.seq, offset, exchange.operation, exchange.tag)
        self._number += 1
        order()
        self._desk[ASKED] = self._number
        fence()
        if self._words[SERVER_SLEEPS]:
            self._ring()

    def wait(self, block: int, spin: Spin) -> None:
        """Until the answer about this block is there, or a refusal. Raises Lost, OSError."""
        words, number = self._words, self._number
        word = (HEAD_BYTES + ANSWER_BYTES * block) // 8 + ANSWERED

        def here() -> bool:
            return words[word] == number or words[REFUSED] == number

        if not here():
            spin.processes = words[PROCESSES] + self._servers - 1
            if not spin.wait(here, lambda: self._sleep(here)):
                raise Lost("no answer")
        order()

    def answer(self, block: int) -> Answer | None:
        """The answer about this block, once it is there. Raises Refused (the message of it)."""
        line = answer_at(block)
        if self._words[line // 8 + ANSWERED] == self._number:
            return Answer._make(ANSWER.unpack_from(self._answers, line))
        if self._words[REFUSED] == self._number:
            reason, refused, length = REFUSAL.unpack_from(self._answers, REFUSAL_AT)
            start = REFUSAL_AT + REFUSAL.size
            text = bytes(self._answers[start : start + min(length, MESSAGE_BYTES)])
            raise Refused(Reason(reason), text.decode("utf-8", "replace"), refused)
        return None

    def _sleep(self, here: Callable[[], bool]) -> bool:
        """Waits in the kernel; False: in vain."""
        stalls_at = time.monotonic() + self._stall_s
        self._desk[SLEEPS] = 1
        fence()
        try:
            while not here():
                if time.monotonic() > stalls_at:
                    return False
                try:
                    rung = self._socket.recv(RINGS)
                except BlockingIOError:
                    self._ring()
                    continue
                if not rung:
                    raise Lost("the server has closed the connection")
            return True
        finally:
            self._desk[SLEEPS] = 0

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has not read those before this one
            self._socket.send(RING, socket.MSG_DONTWAIT)

    # ── values ──

    def copy_block(self, block: int, start: int, target: Bytes) -> int | None:
        """Copies it from the shard; its stamp, or None where the server changed it meanwhile."""
        before = self._stamps[block]
        if before & 1:
            return None
        order()
        np.copyto(target, self._values[start : start + target.size])
        order()
        return before if self._stamps[block] == before else None

    def copy_snapshot(self, place: int, stamp: int, target: Bytes) -> bool:
        """Copies a block from its snapshot; False where the next one has taken its place."""
        if place > len(self._places):
            raise Lost("a snapshot that is not there")
        if self._place_stamps[place - 1] != stamp:
            return False
        order()
        np.copyto(target, self._places[place - 1][: target.size])
        order()
        return self._place_stamps[place - 1] == stamp

    def copied(self) -> None:
        """Tells the server that one more announced block may change."""
        self._copied += 1
        self._desk[PROGRESS] = self._copied << 1 | 1

    def reads(self, now: bool) -> None:
        """Tells it whether anybody is about to copy, or the announcements just lie there."""
        self._desk[PROGRESS] = self._copied << 1 | now

    def shut(self) -> None:
        """From any thread; the descriptor lives as long as somebody could be using it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _path(text: str) -> str:
    return "\0" + text[1:] if text.startswith("@") else text


def _check_owner(connection: socket.socket) -> None:
    """The name is public: somebody else could have taken it after the server's death."""
    if owner(connection) != os.geteuid():
        raise Lost("the socket is another user's")
