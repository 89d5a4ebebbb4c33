"""What the suites need to know of each kind of channel. A new kind is one more entry of KINDS."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Channel, Exchange, Operation, Route, Shape, run
from dsgd_cli.wire.channels.grpc import GrpcChannel
from dsgd_cli.wire.channels.shm import ShmChannel
from dsgd_cli.wire.channels.shm_member import Member
from dsgd_cli.wire.channels.tcp import TcpChannel
from tests.wire.conftest import Proxy, Shard, identity

Vector = np.ndarray[Any, Any]


class Cruelty(Protocol):
    """A way to the shard on which connections die in the middle of things."""

    address: str
    cuts: int


@dataclass(frozen=True)
class Kind:
    """A carrier under test. `make` takes identity, address, route, shape, stall_s and give_up_s."""

    name: str
    make: Callable[..., Channel]
    cruel: Callable[[Shard, int, int], AbstractContextManager[Cruelty]]  # cut after so many bytes

    def __repr__(self) -> str:
        return self.name


@contextlib.contextmanager
def _grpc_cut(at: Shard, least: int, most: int) -> Iterator[Cruelty]:
    chance = random.Random(7)
    proxy = Proxy(at.port, lambda: chance.randrange(least, most))
    yield proxy
    proxy.close()


class _OnTheSide:
    """A proxy for the data; the call that opens the channel goes straight."""

    def __init__(self, address: str, proxy: Proxy) -> None:
        self.address = address
        self._proxy = proxy

    @property
    def cuts(self) -> int:
        return self._proxy.cuts


@contextlib.contextmanager
def _tcp_cut(at: Shard, least: int, most: int) -> Iterator[Cruelty]:
    chance = random.Random(7)
    carrier: Any = at.service.carriers["tcp"]
    proxy = Proxy(carrier.port, lambda: chance.randrange(least, most))
    carrier.advertised_port = proxy.port
    yield _OnTheSide(at.address, proxy)  # type: ignore[misc]
    carrier.advertised_port = carrier.port
    proxy.close()


class _Cuts:
    def __init__(self, address: str) -> None:
        self.address = address
        self.cuts = 0


@contextlib.contextmanager
def _shm_cut(at: Shard, least: int, most: int) -> Iterator[Cruelty]:
    """No data goes through the socket, so what is counted is the times that the server answers."""
    chance = random.Random(7)
    way = _Cuts(at.address)
    left: dict[Member, int] = {}
    flush = Member.flush

    def cut(member: Member) -> None:
        left[member] = left.get(member, chance.randrange(2, 9)) - 1
        if left[member] == 0 and member._says:
            way.cuts += 1
            del member._says[len(member._says) // 2 :]
            flush(member)
            raise ConnectionResetError("cut")
        flush(member)

    Member.flush = cut  # type: ignore[method-assign]
    try:
        yield way
    finally:
        Member.flush = flush  # type: ignore[method-assign]


def _plain(*arguments: Any, **more: Any) -> Channel:
    return TcpChannel(*arguments, encrypt=False, **more)


KINDS = [
    Kind("grpc", GrpcChannel, _grpc_cut),
    Kind("tcp", TcpChannel, _tcp_cut),
    Kind("tcp-plain", _plain, _tcp_cut),
    Kind("shm", ShmChannel, _shm_cut),
]


class Worker:
    """One worker's channel to the shard, with numpy at its ends."""

    def __init__(
        self,
        kind: Kind,
        at: Shard,
        shape: Shape,
        worker: int = 0,
        incarnation: int = 1,
        **more: Any,
    ) -> None:
        self.seq = 0
        where = {"epoch": at.epoch, "cluster": at.authority.cluster_id, "shard": 0}
        where |= {key: more.pop(key) for key in tuple(more) if key in where}
        route = Route(where["cluster"], where["epoch"], where["shard"], worker, incarnation)
        address = more.pop("address", at.address)
        self.size = shape.size_bytes // 4
        self.parameters = np.zeros(self.size, np.float32)
        me: ids.Identity = identity(at.authority, f"worker/{worker}")
        self.channel = kind.make(me, address, route, shape, **more)

    def ones(self, value: float = 1.0) -> Vector:
        return np.full(self.size, value, np.float32)

    def push(self, gradient: Vector, seq: int | None = None) -> Exchange:
        self.seq = self.seq + 1 if seq is None else seq
        return self.do(Operation.PUSH_PULL, self.seq, gradient)

    def do(
        self,
        operation: Operation,
        seq: int = 0,
        up: Vector | None = None,
        since: tuple[int, ...] = (),
        tag: int = 0,
    ) -> Exchange:
        exchange = Exchange(
            operation,
            seq,
            None if up is None else up.data.cast("B"),
            self.parameters.data.cast("B") if operation.fetches else None,
            since,
            tag,
        )
        run([self.channel], [exchange])
        return exchange
