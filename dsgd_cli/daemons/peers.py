"""The servers as the coordinator sees them: unary calls, each with a deadline, and a watch.

A call is repeated until it is answered, for a while: all of them are idempotent. A server that has
not answered anything for `SILENCE_S`, or one call for longer than its bound, is unreachable; what
that means for a run is for the caller to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from dsgd_cli.contract.names import process_name
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub

CALL_TIMEOUT_S = 3.0
SLOW_CALL_TIMEOUT_S = 120.0  # Configure and Export touch every byte of the shard
TRIES = 3
GIVE_UP_S = 30.0  # or after TRIES timeouts, whichever is later
SILENCE_S = 6.0
POLL_S = 1.0
PAUSE_S = 0.2
TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Peer:
    """server/i at an address."""

    def __init__(self, identity: ids.Identity, index: int, address: str) -> None:
        self.index = index
        self.process = process_name("server", index)
        self.address = address
        self._identity = identity
        self._channel = ids.open_aio_channel(identity, self.process, address)
        self._stub: Any = ServerStub(self._channel)  # type: ignore[no-untyped-call]
        self._answered_s = time.monotonic()
        self.epoch = 0

    async def greet(self) -> None:
        """First contact: a handshake that can say what is wrong, then a call. PeerUnreachable."""
        await asyncio.to_thread(ids.probe, self._identity, self.process, self.address)
        try:
            await self.health()
        except grpc.RpcError as error:
            raise self._unreachable(f"does not answer ({_said(error)})") from error

    async def health(self) -> None:
        reply = await self._stub.Health(pb.HealthRequest(), timeout=CALL_TIMEOUT_S)
        self._answered_s = time.monotonic()
        self.epoch = reply.epoch

    async def watch(self) -> ids.PeerUnreachable:
        """Returns, with why, when the server has been silent for too long."""
        while True:
            try:
                await self.health()
            except grpc.RpcError as error:
                silence_s = time.monotonic() - self._answered_s
                if silence_s > SILENCE_S:
                    return await self._explained(silence_s, error)
            await asyncio.sleep(POLL_S)

    async def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The reply. Raises PeerUnreachable, and whatever error repeating would not cure."""
        bound_s = max(GIVE_UP_S, TRIES * timeout_s)
        deadline_s = time.monotonic() + bound_s
        while True:
            try:
                return await getattr(self._stub, method)(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() not in TRANSIENT:
                    raise
                if time.monotonic() > deadline_s:
                    why = f"has not answered {method} for {bound_s:.0f} s ({_said(error)})"
                    raise self._unreachable(why) from error
            await asyncio.sleep(PAUSE_S)

    async def tell(self, method: str, request: Any) -> None:
        """Once, and never mind."""
        with contextlib.suppress(grpc.RpcError):
            await getattr(self._stub, method)(request, timeout=CALL_TIMEOUT_S)

    async def close(self) -> None:
        await self._channel.close()

    async def _explained(self, silence_s: float, error: grpc.RpcError) -> ids.PeerUnreachable:
        try:
            await asyncio.to_thread(ids.probe, self._identity, self.process, self.address, 2.0)
        except ids.PeerUnreachable as reason:
            return reason
        return self._unreachable(f"has not answered for {silence_s:.0f} s ({_said(error)})")

    def _unreachable(self, why: str) -> ids.PeerUnreachable:
        return ids.PeerUnreachable(self.process, self.address, why)


class Peers:
    """All servers of the cluster, in order."""

    def __init__(
        self,
        identity: ids.Identity,
        addresses: Sequence[str],
        on_lost: Callable[[ids.PeerUnreachable], None],
    ) -> None:
        self.addresses = tuple(addresses)
        self._peers = [Peer(identity, index, at) for index, at in enumerate(addresses)]
        self._on_lost = on_lost
        self._watches: list[asyncio.Task[None]] = []

    @property
    def epoch(self) -> int:
        """The newest that a server has been configured for."""
        return max((peer.epoch for peer in self._peers), default=0)

    async def greet(self) -> list[ids.PeerUnreachable]:
        """Speaks to each once; returns why not for those that it cannot speak to."""
        answers = await asyncio.gather(
            *(peer.greet() for peer in self._peers), return_exceptions=True
        )
        lost = []
        for answer in answers:
            if isinstance(answer, ids.PeerUnreachable):
                lost.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
        return lost

    def watch(self) -> None:
        """From now on reports each server that falls silent, once."""
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(peer)) for peer in self._peers]

    async def _watch(self, peer: Peer) -> None:
        self._on_lost(await peer.watch())

    async def all(
        self, method: str, request: Callable[[int], Any], timeout_s: float = CALL_TIMEOUT_S
    ) -> list[Any]:
        """The replies of all servers to `request(index)`."""
        return await asyncio.gather(
            *(peer.call(method, request(peer.index), timeout_s) for peer in self._peers)
        )

    async def tell(self, method: str, request: Any) -> None:
        await asyncio.gather(*(peer.tell(method, request) for peer in self._peers))

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*(peer.close() for peer in self._peers))


def _said(error: grpc.RpcError) -> str:
    return error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
