"""Which channel is opened, and what is said when the best one does not work."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.wire.channels import choose, tcp
from dsgd_cli.wire.channels.base import Exchange, Operation, Reason, Refused, Route, run
from dsgd_cli.wire.channels.choose import OPENERS, Wanted, open_channel
from dsgd_cli.wire.channels.grpc import GrpcChannel
from dsgd_cli.wire.channels.tcp import TcpChannel
from tests.wire.channels.conftest import SHAPES
from tests.wire.conftest import Shard, identity

SHAPE = SHAPES["tiny"]


@pytest.fixture
def at(shard: Shard) -> Shard:
    shard.configure(SHAPE.size_bytes // 4, SHAPE.block_bytes // 4)
    return shard


@pytest.fixture
def between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shared memory."""
    others = {kind: opener for kind, opener in OPENERS.items() if kind != "shm"}
    monkeypatch.setattr(choose, "OPENERS", others)


def opened(at: Shard, wanted: Wanted, epoch: int = 1) -> tuple[Any, list[str]]:
    """A channel, used once, and what was said."""
    said: list[str] = []
    me = identity(at.authority, "worker/0")
    route = Route(at.authority.cluster_id, epoch, 0, 0, 1)
    channel = open_channel(wanted, me, at.address, route, SHAPE, said.append)
    with contextlib.closing(channel):
        into = memoryview(bytearray(SHAPE.size_bytes))
        run([channel], [Exchange(Operation.PULL, into=into)])
    return channel, said


@pytest.fixture
def filtered(at: Shard) -> Iterator[None]:
    """A port that takes no more connections and does not say so, as behind a firewall."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        carrier: Any = at.service.carriers["tcp"]
        carrier.advertised_port = listener.getsockname()[1]
        yield


def test_between_hosts_it_is_tcp_and_encrypted(at: Shard, between_hosts: None) -> None:
    channel, said = opened(at, Wanted())
    assert isinstance(channel, TcpChannel)
    assert channel._encrypt
    assert said == []


def test_in_clear_is_what_was_asked_for(at: Shard, between_hosts: None) -> None:
    for wanted in (Wanted("tcp", {"encrypt": False}), Wanted("auto", {"encrypt": False})):
        channel, _ = opened(at, wanted)
        assert isinstance(channel, TcpChannel)
        assert not channel._encrypt


def test_grpc_by_name(at: Shard) -> None:
    channel, said = opened(at, Wanted("grpc"))
    assert isinstance(channel, GrpcChannel)
    assert said == []


def test_where_the_port_is_filtered_it_is_grpc_and_that_is_said(
    at: Shard, between_hosts: None, filtered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "CONNECT_S", 0.3)
    channel, said = opened(at, Wanted())
    assert isinstance(channel, GrpcChannel)
    assert len(said) == 1
    assert "no tcp channel" in said[0] and "firewall" in said[0]


def test_tcp_by_name_fails_with_the_reason_where_the_port_is_filtered(
    at: Shard, filtered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "CONNECT_S", 0.3)
    with pytest.raises(DsgdError, match=r"tcp channel does not work.*firewall"):
        opened(at, Wanted("tcp"))


def test_a_server_without_the_carrier_is_passed_over(at: Shard, between_hosts: None) -> None:
    carrier = at.service.carriers.pop("tcp")
    try:
        channel, said = opened(at, Wanted())
        assert isinstance(channel, GrpcChannel)
        assert "there is no tcp here" in said[0]
    finally:
        carrier.close()


def test_a_run_that_is_over_is_not_another_channels_business(
    at: Shard, between_hosts: None
) -> None:
    with pytest.raises(Refused) as caught:
        opened(at, Wanted(), epoch=7)
    assert caught.value.reason is Reason.WRONG_EPOCH


def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    at: Shard, between_hosts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when many workers come at once: the call fails, and the channel is tcp all the same."""
    really_open, asked = TcpChannel._open, []

    class Busy(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    def open_(self: TcpChannel) -> Any:
        asked.append(self)
        if len(asked) < 3:
            raise Busy
        return really_open(self)

    monkeypatch.setattr(TcpChannel, "_open", open_)
    channel, said = opened(at, Wanted())
    assert isinstance(channel, TcpChannel)
    assert (len(asked), said) == (3, [])
