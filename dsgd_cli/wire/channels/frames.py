"""Frames on a TCP socket: a head of 8 bytes (length, kind, crowd), then the body.

Sealed, a body is AES-128-GCM ciphertext and tag. The head is associated data; the nonce is the
number of the frame in its direction, and each direction of each connection has a key of its own, so
that no nonce is ever used twice and a frame that is repeated, left out, moved, cut, reflected or
changed does not open. A length is bounded before a byte of the body is awaited, and a body that
does not open is never looked at: the connection is `Broken`, for good.

An exchange on the wire (worker up, server down); a shard that fits `INLINE_BYTES` needs one frame
each way:

    up    EXCHANGE (operation, seq, tag, since or inline values)   DATA ...
    down  [PICK (blocks newer than `since`)]   DATA ...   DONE (state of each block, inline values)
          or REFUSED at any time: it ends the exchange
"""

from __future__ import annotations

import enum
import mmap
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from dsgd_cli.wire.channels.base import Data, Reason, Refused, Shape

MAGIC = b"dsgd"
TICKET_BYTES = 16
KEY_BYTES = 16
TAG_BYTES = 16
HEAD = struct.Struct("<IBBxx")  # bytes of the body as sent, kind, crowd
OPENING = struct.Struct("<BxxxIQQ")  # EXCHANGE: operation, blocks in `since`, seq, tag
STATE = struct.Struct("<QQQ")  # DONE, for each block: version, applied (incarnation, seq)
REFUSAL = struct.Struct("<II")  # REFUSED: reason, block; then the message
FRAME_BYTES = 1 << 20  # of blocks in a frame, unless one block is larger
INLINE_BYTES = 1 << 16  # a shard of at most this goes in the opening and closing frames
MAX_MESSAGE_BYTES = 1024  # of a refusal
STREAM_BYTES = 8 << 20  # a shard of this size is a long stream
NEAR_BUFFER_BYTES = 1 << 20
_BODY_AT = 64  # in a reader's buffer: aligned, for what computes on it

Run: TypeAlias = tuple[int, int]  # consecutive blocks [first, stop) that share a frame


class Kind(enum.IntEnum):
    """What a frame is; the numbers are those of the wire."""

    HELLO = 1
    READY = 2
    EXCHANGE = 3
    DATA = 4
    PICK = 5
    DONE = 6
    REFUSED = 7


class Broken(Exception):
    """Nothing more can be read from or written to this connection."""


# ── how a shard is cut into frames ─────────────────────────────────────────────────────────────


def is_inline(shape: Shape) -> bool:
    """Whether the whole shard goes in one frame."""
    return shape.size_bytes <= INLINE_BYTES


def runs(shape: Shape, blocks: Iterable[int]) -> list[Run]:
    """Groups ascending blocks: neighbours share a frame while they fit."""
    most = max(1, FRAME_BYTES // shape.block_bytes)
    made: list[Run] = []
    for block in blocks:
        if made and made[-1][1] == block and block - made[-1][0] < most:
            made[-1] = (made[-1][0], block + 1)
        else:
            made.append((block, block + 1))
    return made


def bounds(shape: Shape, run: Run) -> tuple[int, int]:
    """Where a run's bytes start and stop in the shard."""
    return run[0] * shape.block_bytes, min(run[1] * shape.block_bytes, shape.size_bytes)


def max_body_bytes(shape: Shape) -> int:
    """What the body of any frame about this shard stays within, tag included."""
    values = max(INLINE_BYTES, min(shape.size_bytes, max(FRAME_BYTES, shape.block_bytes)))
    about_blocks = OPENING.size + STATE.size * shape.blocks
    if is_inline(shape):
        return values + about_blocks + MAX_MESSAGE_BYTES + TAG_BYTES
    return max(values, about_blocks, MAX_MESSAGE_BYTES + REFUSAL.size) + TAG_BYTES


# ── one direction of a connection ──────────────────────────────────────────────────────────────


class Seal:
    """The frames that leave, or those that come. Made with a key: sealed; without: in clear."""

    def __init__(self, key: bytes | None) -> None:
        self._gcm = None
        self.extra = 0  # bytes that a sealed body is longer
        self.crowd = 0  # workers on the server's host, if it is the server that seals; 255 at most
        if key is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._gcm = AESGCM(key)
            self.extra = TAG_BYTES
        self._count = 0

    @property
    def plain(self) -> bool:
        return self._gcm is None

    def close(self, kind: Kind, body: Data, out: memoryview) -> int:
        """Writes the frame to the front of `out`; returns its length."""
        size = len(body) + self.extra
        stop = HEAD.size + size
        head = HEAD.pack(size, kind, self.crowd)
        out[: HEAD.size] = head
        if self._gcm is None:
            out[HEAD.size : stop] = body
        else:
            self._gcm.encrypt_into(self._nonce(), body, head, out[HEAD.size : stop])
        return stop

    def open(self, head: bytes, body: memoryview, into: memoryview) -> memoryview:
        """The plain body, in `into` if it was sealed. Raises Broken; then `into` is garbage."""
        if self._gcm is None:
            return body
        from cryptography.exceptions import InvalidTag

        plain = into[: len(body) - TAG_BYTES]
        try:
            self._gcm.decrypt_into(self._nonce(), body, head, plain)
        except InvalidTag:
            raise Broken("a frame that was not made by the other end") from None
        return plain

    def _nonce(self) -> bytes:
        count = self._count
        self._count = count + 1
        return count.to_bytes(12, "little")


class Reader:
    """Reads frames without reading past them. `fill` until it is True, then `frame`."""

    def __init__(self, end: socket.socket, seal: Seal, max_body: int) -> None:
        self._end = end
        self._seal = seal
        self._max_body = max_body
        self._buffer = memoryview(aligned(_BODY_AT + max_body))[_BODY_AT - HEAD.size :]
        self._direct: memoryview | None = None
        self._kind = Kind.HELLO
        self._have = 0  # bytes of the frame that are here, of `_want`
        self._want = HEAD.size
        self._sized = False  # whether the head is here, so that `_want` is exact
        self.moved = False  # whether the last `fill` received anything
        self.crowd = 0  # what the newest head says

    @property
    def begun(self) -> bool:
        """Whether a part of a frame is here."""
        return self._have > 0

    def expect(self, body: int, into: memoryview | None = None) -> None:
        """What probably comes next: a body of this many bytes before sealing.

        In clear, a DATA frame of just this length is read straight to `into`.
        """
        if self._have:
            return
        self._direct = into if self._seal.plain else None
        self._want = HEAD.size if self._direct is not None else HEAD.size + body + self._seal.extra

    def fill(self, flags: int = 0) -> bool:
        """Receives once. Raises Broken, BlockingIOError or OSError."""
        self.moved = False
        have, want = self._have, self._want
        if self._sized and self._direct is not None:
            target = self._direct[have - HEAD.size :]
        else:
            target = self._buffer[have:want]
        got = self._end.recv_into(target, 0, flags) if have < want else 0
        if got == 0 and have < want:
            raise Broken("the other end closed the connection")
        self.moved = True
        self._have = have = have + got
        if not self._sized:
            if have < HEAD.size:
                return False
            self._measure()
        return have == self._want

    def frame(self, plain: memoryview, data: memoryview | None = None) -> tuple[Kind, memoryview]:
        """The complete frame. Its body is gone with the next one.

        A DATA frame that has the length of `data` is opened into it, every other into `plain`.
        """
        kind, stop = self._kind, self._want
        body = self._direct
        if body is None:
            body = self._buffer[HEAD.size : stop]
            exact = data is not None and len(data) + self._seal.extra == len(body)
            into = data if kind is Kind.DATA and exact and data is not None else plain
            body = self._seal.open(bytes(self._buffer[: HEAD.size]), body, into)
        self._direct = None
        self._have = 0
        self._sized = False
        self._want = HEAD.size
        return kind, body

    def _measure(self) -> None:
        size, kind, self.crowd = HEAD.unpack_from(self._buffer)
        if not self._seal.extra <= size <= self._max_body:
            raise Broken(f"a frame of {size} bytes, {self._max_body} at most")
        try:
            self._kind = Kind(kind)
        except ValueError:
            raise Broken(f"a frame of kind {kind}") from None
        if self._direct is not None and (self._kind is not Kind.DATA or size != len(self._direct)):
            self._direct = None
        self._want = HEAD.size + size
        if self._have > self._want:
            raise Broken("bytes between two frames")
        self._sized = True


def aligned(size: int) -> mmap.mmap:
    """Memory for frames, on a page of its own."""
    return mmap.mmap(-1, size)


def is_near(end: socket.socket) -> bool:
    """Whether both ends are on one host."""
    return bool(end.getpeername()[0] == end.getsockname()[0])


def tune(end: socket.socket, shape: Shape) -> None:
    """For frames that wait for their answers: no delay. On one host, for a long stream: no more
    on its way than a cache holds.

    Between hosts the kernel fits its buffers to the way. On loopback that makes them larger than
    the caches, and each byte of a long stream comes from memory again; smaller ones mean that the
    two ends wake each other more often. 100 MB there and back in clear took 152 ms with 256 KiB,
    98 to 122 ms with 1 MiB, 113 to 162 ms as the kernel has it (2 cores of an AMD EPYC, where a
    wake-up is dear; where it is cheap, 256 KiB were as good). One frame of 1 MiB gains nothing.
    """
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if is_near(end) and shape.size_bytes >= STREAM_BYTES:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_BUFFER_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER_BYTES)


# ── bodies ─────────────────────────────────────────────────────────────────────────────────────


def refusal_body(refused: Refused) -> bytes:
    text = refused.message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    return REFUSAL.pack(int(refused.reason), refused.block) + text


def refused_by(body: memoryview, peer: str) -> Refused:
    """What a REFUSED frame says."""
    reason, block = REFUSAL.unpack_from(body)
    text = bytes(body[REFUSAL.size :]).decode("utf-8", "replace")
    return Refused(Reason(reason), f"{peer}: {text}", block)


def states(body: memoryview, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(version, incarnation, seq) of each block, from the front of a DONE frame."""
    return STATE.iter_unpack(body[: STATE.size * blocks])
