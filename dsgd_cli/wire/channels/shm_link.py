"""One connection of a shm channel: the socket, and what the other side's memory holds.

It reads no more from the server than records of fixed size, and nothing from its memory without
the stamps around it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import weakref
from collections.abc import Sequence

import numpy as np

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Exchange, Shape
from dsgd_cli.wire.channels.shm_memory import (
    Bytes,
    GradientMemory,
    Unfit,
    as_bytes,
    attach,
    fence,
    owner,
    stamps_at,
)
from dsgd_cli.wire.channels.shm_records import (
    HELLO,
    MAGIC,
    REFUSED,
    REPLY,
    REQUEST,
    WELCOME,
    Reply,
)
from dsgd_cli.wire.channels.shm_snapshots import ring, ring_bytes
from dsgd_cli.wire.channels.spin import Spin

RECEIVE_BYTES = 1 << 14
MESSAGE_BYTES = 1 << 12  # of a refusal


class Lost(Exception):
    """The connection is no more."""


class Link:
    """One connection, and the two memories that go with it."""

    def __init__(
        self,
        ticket: pb.ShmTicket,
        shape: Shape,
        gradients: GradientMemory,
        word: tuple[int, memoryview],
        servers: int,
        stall_s: float,
    ) -> None:
        self._servers = servers
        self._processes = servers + 1
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._held = 0  # bytes in the buffer: of a record that has not come whole
        self._copied = 0
        self._word = word[1]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        weakref.finalize(self, self._socket.close)
        try:
            limit = struct.pack("@ll", int(stall_s), int(stall_s % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
            self._socket.connect(_path(ticket.socket))
            _check_owner(self._socket)
            self._shake_hands(ticket.ticket, gradients, word[0], shape)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(
        self, ticket: bytes, gradients: GradientMemory, index: int, shape: Shape
    ) -> None:
        self._word[0] = 0
        hello = HELLO.pack(MAGIC, ticket, gradients.size_bytes, index, self._servers)
        socket.send_fds(self._socket, [hello], [gradients.fd])
        data, fds, _, _ = socket.recv_fds(
            self._socket, WELCOME.size, 2, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
        )
        try:
            if len(data) != WELCOME.size:
                raise Lost("the server did not welcome this worker")
            magic, size, snapshots = WELCOME.unpack(data)
            if magic != MAGIC or len(fds) != 1 + bool(snapshots):
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
        self._places: list[Bytes] = []
        if len(fds) > 1:
            self._place_stamps, self._places = ring(attach(fds[1], ring_bytes(shape)), shape)

    def request(self, exchange: Exchange, offset: int) -> None:
        since = exchange.since
        record = REQUEST.pack(exchange.seq, offset, len(since), exchange.operation)
        self._socket.sendall(record + struct.pack(f"={len(since)}Q", *since) if since else record)

    def receive(self, spin: Spin, wait: bool) -> list[Reply]:
        """Whole replies: at least one, if it is to wait. Raises Lost, OSError."""
        spin.processes = self._processes
        while True:
            if not wait:
                self._held += self._poll()
            elif got := spin.wait(self._poll, self._sleep):
                self._held += got
            else:
                raise Lost("no answer")
            replies = self._parsed()
            if replies or not wait:
                return replies

    def message(self, length: int) -> str:
        """The text of the refusal that was received last."""
        if length > MESSAGE_BYTES:
            raise Lost("an endless message")
        while self._held < length:
            got = self._sleep()
            if not got:
                raise Lost("half a message")
            self._held += got
        self._held = 0  # nothing follows a refusal
        return bytes(self._view[:length]).decode("utf-8", "replace")

    def copy_block(self, block: int, start: int, target: Bytes) -> int | None:
        """Copies it from the shard; its stamp, or None where the server changed it meanwhile."""
        before = self._stamps[block]
        if before & 1:
            return None
        fence()
        np.copyto(target, self._values[start : start + target.size])
        fence()
        return before if self._stamps[block] == before else None

    def copy_snapshot(self, place: int, stamp: int, target: Bytes) -> bool:
        """Copies a block from its snapshot; False where the next one has taken its place."""
        if place > len(self._places):
            raise Lost("a snapshot that is not there")
        if self._place_stamps[place - 1] != stamp:
            return False
        fence()
        np.copyto(target, self._places[place - 1][: target.size])
        fence()
        return self._place_stamps[place - 1] == stamp

    def copied(self) -> None:
        """Tells the server that one more announced block may change."""
        self._copied += 1
        self._word[0] = self._copied << 1 | 1

    def reads(self, now: bool) -> None:
        """Tells it whether anybody is about to copy, or the announcements just lie there."""
        self._word[0] = self._copied << 1 | now

    def shut(self) -> None:
        """From any thread; the descriptor lives as long as somebody could be using it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _parsed(self) -> list[Reply]:
        replies = []
        taken = 0
        while taken + REPLY.size <= self._held:
            reply = Reply._make(REPLY.unpack_from(self._buffer, taken))
            replies.append(reply)
            taken += REPLY.size
            self._processes = reply.processes + self._servers - 1
            if reply.kind == REFUSED:
                break
        self._held -= taken
        if self._held:
            self._buffer[: self._held] = self._buffer[taken : taken + self._held]
        return replies

    def _poll(self) -> int:
        """How many bytes have come. Raises Lost at the end."""
        try:
            got = self._socket.recv_into(self._view[self._held :], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        if not got:
            raise Lost("the server has closed the connection")
        return got

    def _sleep(self) -> int:
        """The same, but waits; 0: in vain."""
        try:
            got = self._socket.recv_into(self._view[self._held :])
        except BlockingIOError:
            return 0
        if not got:
            raise Lost("the server has closed the connection")
        return got


def _path(text: str) -> str:
    return "\0" + text[1:] if text.startswith("@") else text


def _check_owner(connection: socket.socket) -> None:
    """The name is public: somebody else could have taken it after the server's death."""
    if owner(connection) != os.geteuid():
        raise Lost("the socket is another user's")
