"""Who is who on the wire: mTLS on every connection, and a table of who may call what.

Invariant: no method runs unless the peer's certificate was signed by this cluster's CA, names this
cluster, and has a role that the method's row allows. A worker can only act as itself: handlers take
the worker's index from `caller(context)`, never from a message alone.

gRPC reports a foreign certificate, plaintext and a dead host all as UNAVAILABLE, which a retry loop
takes for a server that is about to come back. So `probe` makes one handshake with the `ssl` module
before the first gRPC connection and says which it is. Keys stay in memory (memfd), never in a file.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DsgdError

# method -> the roles that may call it. A method without a row is refused.
ALLOWED: Mapping[str, frozenset[str]] = {
    "/dsgd.Coordinator/Session": frozenset({"worker"}),
    "/dsgd.Server/Exchange": frozenset({"worker"}),
    "/dsgd.Server/OpenChannel": frozenset({"worker"}),
    "/dsgd.Server/Health": frozenset({"coordinator", "worker"}),
    "/dsgd.Server/Configure": frozenset({"coordinator"}),
    "/dsgd.Server/Fence": frozenset({"coordinator"}),
    "/dsgd.Server/Freeze": frozenset({"coordinator"}),
    "/dsgd.Server/Thaw": frozenset({"coordinator"}),
    "/dsgd.Server/Export": frozenset({"coordinator"}),
    "/dsgd.Server/Commit": frozenset({"coordinator"}),
    "/dsgd.Server/Measure": frozenset({"coordinator"}),
    "/dsgd.Server/Operate": frozenset({"coordinator"}),
    "/dsgd.Server/SetRate": frozenset({"coordinator"}),
    "/dsgd.Server/RenewLease": frozenset({"coordinator"}),
}

MAX_MESSAGE_BYTES = 2 << 20  # a block has at most 1 MiB, a message at most that and its frame

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it the one above is ignored, for 60 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.default_compression_algorithm", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not a second server
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.enable_retries", 0),  # dsgd retries by itself, where that is safe
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the web, not for the cluster
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class PeerUnreachable(DsgdError):
    """No connection to another daemon.

    `kind` "identity" (one side refuses the other's certificate) is permanent, "unreachable" is not:
    a connection that ends or makes no sense may be a process that is dying.
    """

    exit_code = 6

    def __init__(self, process: str, address: str, why: str, kind: str = "unreachable") -> None:
        super().__init__(f"{process} at {address} {why}")
        self.process = process
        self.address = address
        self.why = why
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Identity:
    """A daemon's own name, key and certificate, and the CA that it trusts (PEM texts)."""

    process: str
    cluster_id: str
    ca: str
    cert: str
    key: str

    def __repr__(self) -> str:
        return f"Identity({self.process}, {self.cluster_id})"

    def server_credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key.encode(), self.cert.encode())], self.ca.encode(), require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.encode(), self.key.encode(), self.cert.encode())

    def channel_options(self, peer: str) -> list[tuple[str, Any]]:
        """Connect to an address, but accept only the certificate of `peer` there."""
        name = names.dns_name(peer, self.cluster_id)
        return [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as its certificate says."""

    role: str
    index: int


def caller(context: Any) -> Caller:
    """The authenticated peer of a call that the interceptor let through."""
    process, _ = _peer(context.auth_context())
    return Caller(*names.split_process(process))


def _peer(auth_context: Mapping[str, Any]) -> tuple[str, str]:
    """("worker/3", cluster_id). Raises ValueError unless the certificate has exactly one name."""
    alternatives = list(auth_context.get("x509_subject_alternative_name", ()))
    if len(alternatives) != 1:
        raise ValueError("no certificate with exactly one name")
    return names.parse_dns_name(bytes(alternatives[0]).decode("ascii", "replace"))


def refusal(method: str, auth_context: Mapping[str, Any], cluster_id: str) -> str | None:
    """Why this peer may not call this method, or None."""
    try:
        process, peer_cluster = _peer(auth_context)
    except ValueError as error:
        return f"not a member of a cluster: {error}"
    if peer_cluster != cluster_id:
        return f"{process} is of cluster {peer_cluster}, not of {cluster_id}"
    role, _ = names.split_process(process)
    if role not in ALLOWED.get(method, frozenset()):
        return f"{process} may not call {method}"
    return None


class RoleCheck(aio.ServerInterceptor):
    """Puts the table in front of every method of a server."""

    def __init__(self, cluster_id: str) -> None:
        self._cluster_id = cluster_id

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        return self._checked(handler, handler_call_details.method)

    def _checked(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def check(context: Any) -> None:
            why = refusal(method, context.auth_context(), self._cluster_id)
            if why is not None:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)

        if handler.stream_stream is not None:

            async def stream(requests: Any, context: Any) -> None:
                await check(context)
                await handler.stream_stream(requests, context)

            return grpc.stream_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_unary is not None:

            async def unary(request: Any, context: Any) -> Any:
                await check(context)
                return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                unary, handler.request_deserializer, handler.response_serializer
            )
        raise NotImplementedError(f"{method}: half-streams have no check")


def make_server(identity: Identity) -> aio.Server:
    """A server that lets in this cluster's daemons alone. Add services, then `listen`."""
    return aio.server(interceptors=[RoleCheck(identity.cluster_id)], options=SERVER_OPTIONS)


def listen(server: aio.Server, identity: Identity, bind: str, port: int = 0) -> int:
    """Binds bind:port (0: any) over mTLS and returns the port. Raises OSError when it is taken."""
    try:
        bound = server.add_secure_port(f"{_bracketed(bind)}:{port}", identity.server_credentials())
    except RuntimeError as error:
        raise OSError(f"{identity.process} cannot bind {bind}:{port}: {error}") from error
    if bound == 0:
        raise OSError(f"{identity.process} cannot bind {bind}:{port}")
    return bound


def open_channel(identity: Identity, peer: str, address: str) -> grpc.Channel:
    """A channel for threads. Connects when first used."""
    return grpc.secure_channel(
        address, identity.channel_credentials(), identity.channel_options(peer)
    )


def open_aio_channel(identity: Identity, peer: str, address: str) -> aio.Channel:
    """A channel for an asyncio loop. Connects when first used."""
    return aio.secure_channel(
        address, identity.channel_credentials(), options=identity.channel_options(peer)
    )


# ── the probe ──────────────────────────────────────────────────────────────────────────────────


def probe(identity: Identity, peer: str, address: str, timeout_s: float = 5.0) -> None:
    """One mTLS handshake with `peer` at `address`. Raises PeerUnreachable that says why not."""
    for _ in range(2):
        if _is_taken_in(identity, peer, address, timeout_s):
            return
    # gRPC sends no alert about a certificate that it refuses, it hangs up: twice is no accident.
    raise PeerUnreachable(peer, address, "does not accept our certificate", "identity")


def _is_taken_in(identity: Identity, peer: str, address: str, timeout_s: float) -> bool:
    """Whether the other side said something after the handshake, and did not hang up."""
    host, _, port = address.rpartition(":")
    context = _context(identity)
    try:
        raw = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
    except OSError as error:
        raise PeerUnreachable(peer, address, _why_not_connected(error, timeout_s)) from error
    with raw:
        try:
            name = names.dns_name(peer, identity.cluster_id)
            with context.wrap_socket(raw, server_hostname=name) as secure:
                # In TLS 1.3 the other side judges our certificate after our half is done:
                # only its first bytes (HTTP/2 settings) say that it took us in.
                return bool(secure.recv(1))
        except (OSError, ValueError) as error:
            why, kind = _why_no_handshake(error, timeout_s)
            raise PeerUnreachable(peer, address, why, kind) from error


def _why_not_connected(error: OSError, timeout_s: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "does not answer: nobody listens on that port"
    if isinstance(error, TimeoutError):
        return f"does not answer within {timeout_s:g} s (is the port filtered by a firewall?)"
    if isinstance(error, socket.gaierror):
        return f"cannot be found: {error.strerror}"
    return f"cannot be reached: {error.strerror or error}"


def _why_no_handshake(error: Exception, timeout_s: float) -> tuple[str, str]:
    if isinstance(error, ssl.SSLCertVerificationError):
        if "ostname mismatch" in error.verify_message:
            return "is another process: the certificate there has another name", "identity"
        if error.verify_code in (9, 10):
            why = f"shows a certificate that is {error.verify_message}: check the clocks"
            return why, "identity"
        return f"shows a certificate of another cluster ({error.verify_message})", "identity"
    if isinstance(error, TimeoutError):
        why = f"accepts connections but does not answer within {timeout_s:g} s"
        return why, "unreachable"
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        return f"does not accept our certificate ({error.reason})", "identity"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return f"does not speak TLS ({error.reason})", "unreachable"
    return "closes the connection during the TLS handshake", "unreachable"


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=identity.ca)
    context.set_alpn_protocols(["h2"])
    with _in_memory(identity.cert + identity.key) as path:
        context.load_cert_chain(path)
    return context


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """A path for a secret that never touches a disk: `ssl` takes keys from files only."""
    fd = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
