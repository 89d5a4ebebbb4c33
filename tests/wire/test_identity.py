"""Nobody gets in, and whoever is kept out is told why."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from dsgd_cli.launcher.identity import Authority
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Exchange, Operation, Reason, Refused, Route, Shape, run
from dsgd_cli.wire.channels.grpc import GrpcChannel
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub
from tests.wire.conftest import Shard, identity

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
SERVER_METHODS = [name for name in METHODS if name.startswith("/dsgd.Server/")]


def test_every_method_has_a_row_and_every_row_a_method() -> None:
    assert set(ids.ALLOWED) == set(METHODS)


@pytest.mark.parametrize("method", SERVER_METHODS)
@pytest.mark.parametrize("role", ["coordinator", "server", "worker"])
def test_a_method_lets_in_its_roles_only(shard: Shard, method: str, role: str) -> None:
    code = call(shard, method, identity(shard.authority, f"{role}/0"))
    if role in ids.ALLOWED[method]:
        assert code is not grpc.StatusCode.PERMISSION_DENIED
        assert code is not grpc.StatusCode.UNAVAILABLE
    else:
        assert code is grpc.StatusCode.PERMISSION_DENIED


def call(shard: Shard, method: str, caller: ids.Identity) -> grpc.StatusCode | None:
    name = method.rpartition("/")[2]
    descriptor = METHODS[method]
    request = getattr(pb, descriptor.input_type.name)()
    with ids.open_channel(caller, "server/0", shard.address) as channel:
        stub: Any = getattr(ServerStub(channel), name)
        try:
            if descriptor.client_streaming:
                list(stub(iter([request]), timeout=10))
            else:
                stub(request, timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return None


def test_the_table_refuses_what_is_no_certificate_of_this_cluster() -> None:
    method, cluster_id = "/dsgd.Server/Health", "0123456789abcdef"

    def said(*alternatives: bytes) -> str | None:
        peer = {"x509_subject_alternative_name": list(alternatives)}
        return ids.refusal(method, peer, cluster_id)

    good = b"worker-1.0123456789abcdef.dsgd"
    assert said(good) is None
    assert "not a member" in (ids.refusal(method, {}, cluster_id) or "")
    assert "not a member" in (said(good, good) or "")
    assert "not a member" in (said(b"worker-1.example.com") or "")
    assert "is of cluster" in (said(b"worker-1.ffffffffffffffff.dsgd") or "")
    assert "may not call" in (ids.refusal("/dsgd.Server/New", *auth(good), cluster_id) or "")


def auth(name: bytes) -> tuple[dict[str, list[bytes]]]:
    return ({"x509_subject_alternative_name": [name]},)


def test_another_clusters_certificate_and_plaintext_do_not_get_in(
    shard: Shard, stranger: Authority
) -> None:
    foreign = identity(stranger, "coordinator/0")
    with ids.open_channel(foreign, "server/0", shard.address) as channel:
        assert health(channel) is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(shard.address) as channel:
        assert health(channel) is grpc.StatusCode.UNAVAILABLE
    mine = identity(shard.authority, "coordinator/0")
    with ids.open_channel(mine, "server/1", shard.address) as channel:  # it is server/0
        assert health(channel) is grpc.StatusCode.UNAVAILABLE


def health(channel: grpc.Channel) -> grpc.StatusCode | None:
    try:
        ServerStub(channel).Health(pb.HealthRequest(), timeout=5)
    except grpc.RpcError as error:
        return error.code()
    return None


def test_a_worker_acts_as_itself_only(shard: Shard) -> None:
    shard.configure(4)
    route = Route(shard.authority.cluster_id, 1, 0, worker=2, incarnation=1)
    me = identity(shard.authority, "worker/1")
    channel = GrpcChannel(me, shard.address, route, Shape(16, 64))
    try:
        with pytest.raises(Refused, match="worker/1 may not act as worker/2") as caught:
            run([channel], [Exchange(Operation.PULL, into=memoryview(bytearray(16)))])
        assert caught.value.reason is Reason.FENCED
    finally:
        channel.close()


def test_a_key_is_never_printed(authority: Authority) -> None:
    assert "KEY" not in repr(identity(authority, "worker/0"))


# ── the probe: five failures that gRPC calls UNAVAILABLE, told apart ──


def why_not(identity_: ids.Identity, address: str, peer: str = "server/0") -> ids.PeerUnreachable:
    with pytest.raises(ids.PeerUnreachable) as caught:
        ids.probe(identity_, peer, address, timeout_s=1.0)
    assert str(caught.value).startswith(f"{peer} at {address} ")
    return caught.value


def test_probe_is_content_with_the_right_peer(shard: Shard) -> None:
    ids.probe(identity(shard.authority, "worker/0"), "server/0", shard.address)


def test_probe_knows_another_clusters_server(shard: Shard, stranger: Authority) -> None:
    error = why_not(identity(stranger, "worker/0"), shard.address)
    assert "certificate of another cluster" in error.why
    assert error.kind == "identity"


def test_probe_knows_that_our_certificate_is_refused(shard: Shard, stranger: Authority) -> None:
    theirs = stranger.issue("worker/0")
    mixed = ids.Identity(
        "worker/0",
        shard.authority.cluster_id,
        shard.authority.certificate,
        theirs["cert"],
        theirs["key"],
    )
    error = why_not(mixed, shard.address)
    assert "does not accept our certificate" in error.why
    assert error.kind == "identity"


def test_probe_knows_another_process_of_the_cluster(shard: Shard) -> None:
    error = why_not(identity(shard.authority, "worker/0"), shard.address, peer="server/1")
    assert "another process" in error.why
    assert error.kind == "identity"


def test_probe_knows_that_nobody_listens(authority: Authority) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        error = why_not(identity(authority, "worker/0"), f"127.0.0.1:{taken.getsockname()[1]}")
    assert "nobody listens" in error.why
    assert error.kind == "unreachable"


@contextmanager
def accepting(answer: bytes | None, reset: bool = False) -> Iterator[str]:
    """A TCP server that answers a connection so; None: not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                if reset:  # no FIN, but an RST
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    ended.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def test_probe_knows_a_server_without_tls(authority: Authority) -> None:
    with accepting(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        error = why_not(identity(authority, "worker/0"), address)
    assert "does not speak TLS" in error.why
    assert error.kind == "unreachable"


@pytest.mark.parametrize("reset", [False, True])
def test_probe_knows_a_peer_that_hangs_up(authority: Authority, reset: bool) -> None:
    """It may be dying: another one may be there in a moment."""
    with accepting(b"", reset) as address:
        error = why_not(identity(authority, "worker/0"), address)
    assert "closes the connection" in error.why
    assert error.kind == "unreachable"


def test_probe_knows_a_peer_that_says_nothing(authority: Authority) -> None:
    with accepting(None) as address:
        error = why_not(identity(authority, "worker/0"), address)
    assert "accepts connections but does not answer within 1 s" in error.why
    assert error.kind == "unreachable"


def test_probe_knows_a_filtered_port(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def filtered(*_: object, **__: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", filtered)
    error = why_not(identity(authority, "worker/0"), "10.0.0.1:5000")
    assert "filtered by a firewall" in error.why


def test_a_taken_port_is_an_error(authority: Authority, shard: Shard) -> None:
    me = identity(authority, "server/0")

    async def again() -> None:
        with pytest.raises(OSError, match="cannot bind"):
            ids.listen(ids.make_server(me), me, "127.0.0.1", shard.port)

    shard.do(again())


def test_only_modern_tls(authority: Authority) -> None:
    context = ids._context(identity(authority, "worker/0"))
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
