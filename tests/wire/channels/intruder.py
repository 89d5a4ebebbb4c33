"""Who should not get in: a hand-made client that knows the format, and one who only listens."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels import frames
from dsgd_cli.wire.channels.base import Operation, Shape
from dsgd_cli.wire.channels.frames import HEAD, OPENING, Kind, Seal
from tests.wire.conftest import Proxy, Shard

EMPTY = HEAD.size + frames.TAG_BYTES


def ask(
    at: Shard, shape: Shape, worker: int = 0, certificate: str = "", plain: bool = False
) -> pb.OpenChannelReply:
    """The call that opens a channel."""
    header = pb.Header(
        cluster_id=at.authority.cluster_id, epoch=at.epoch, shard=0, worker=worker, incarnation=1
    )
    request = pb.OpenChannelRequest(
        kind="tcp",
        header=header,
        size_bytes=shape.size_bytes,
        block_bytes=shape.block_bytes,
        plain=plain,
    )
    reply: pb.OpenChannelReply = at.stub(certificate or f"worker/{worker}").OpenChannel(
        request, timeout=10
    )
    return reply


class Client:
    """One connection with a ticket, frame by frame."""

    def __init__(self, ticket: pb.TcpTicket) -> None:
        self.ticket = ticket
        self.up = Seal(ticket.key_up or None)
        self.end = socket.create_connection(("127.0.0.1", ticket.port), timeout=10)

    def sealed(self, kind: Kind, body: bytes) -> bytes:
        out = bytearray(HEAD.size + len(body) + frames.TAG_BYTES)
        return bytes(out[: self.up.close(kind, body, memoryview(out))])

    def greet(self) -> Client:
        """The ticket, and the proof that we have its key."""
        self.end.sendall(frames.MAGIC + self.ticket.ticket + self.sealed(Kind.HELLO, b""))
        return self

    def is_let_in(self) -> bool:
        return len(self.read(EMPTY)) == EMPTY

    def push(self, seq: int, values: Any) -> bytes:
        """A whole push of a tiny shard, as one frame."""
        return self.sealed(
            Kind.EXCHANGE, OPENING.pack(Operation.PUSH_PULL, 0, seq, 0) + bytes(values)
        )

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer where the connection ends."""
        data = b""
        try:
            while len(data) < size and (more := self.end.recv(size - len(data))):
                data += more
        except ConnectionResetError:
            pass
        return data

    def read_frame(self) -> bytes:
        head = self.read(HEAD.size)
        return head + self.read(HEAD.unpack(head)[0]) if len(head) == HEAD.size else head

    def is_shut(self) -> bool:
        """Whether the server has hung up, without another word."""
        return self.read(1) == b""

    def close(self) -> None:
        self.end.close()


class Tap(Proxy):
    """Listens; `tamper` may change what passes."""

    def __init__(self, port: int, tamper: Any = None) -> None:
        self.up = bytearray()
        self.down = bytearray()
        self._tamper = tamper
        super().__init__(port, lambda: None)

    def seen(self, data: bytes, up: bool) -> bytes:
        (self.up if up else self.down).extend(data)
        return self._tamper(data, up) if self._tamper is not None else data


def pattern(size: int) -> np.ndarray[Any, Any]:
    """Values that a listener would recognise: the text `gradient` all over."""
    return np.frombuffer(b"gradient" * (size // 2), np.float32).copy()
