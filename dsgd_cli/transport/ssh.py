"""The road to a host by SSH: one paramiko connection, one channel for each program.

Invariants: no host key is trusted that is not on record, pinned, or newly accepted on request; no
password is ever asked for or sent; the remote command is `exec` and the quoted argv, nothing else;
every wait has a deadline; a peer that vanished (a pulled cable) is noticed within 15 seconds. At
most 8 handshakes are in flight, since sshd drops more (MaxStartups). Transient failures are tried
again within the connect timeout, permanent ones never. This is the one file that knows paramiko:
none of its exceptions leaves it. ssh_config is not read.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import queue
import random
import select
import shlex
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import paramiko
from paramiko.agent import AgentSSH
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_REQUEST

from dsgd_cli.contract.errors import (
    AuthenticationFailed,
    ConnectFailed,
    DeadlinePassed,
    DsgdError,
    HostKeyRejected,
)
from dsgd_cli.transport import known_hosts
from dsgd_cli.transport.known_hosts import Verdict

CONNECT_TIMEOUT_S = 10.0
AUTH_TIMEOUT_S = 10.0
CHANNEL_TIMEOUT_S = 10.0
RETRY_PAUSES_S = (0.2, 0.8, 2.0)
SESSION_PAUSES_S = (0.1, 0.3, 0.6)
DEAD_PEER_S = 12  # unanswered bytes or keepalives for so long: the connection is dead
KEEPALIVE_AFTER_S = 5
KEEPALIVE_EVERY_S = 3
STUCK_S = 1.0  # how long `close` waits for a socket that takes nothing
STDERR_TAIL_BYTES = 8192
WRITE_BYTES = (1 << 15) - 64  # what fits into one packet of OpenSSH, with paramiko's reserve
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
CIPHERS = (  # AES-GCM needs no separate MAC: half of the processor time of AES-CTR
    *("aes128-gcm@openssh.com", "aes256-gcm@openssh.com"),
    *("aes128-ctr", "aes192-ctr", "aes256-ctr"),
)
DIGESTS = (
    *("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com"),
    *("hmac-sha2-256", "hmac-sha2-512"),
)
# type of a host key -> the signature algorithms to ask for, in the order in which we prefer types
ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # or it prints to our stderr

_handshakes = threading.BoundedSemaphore(8)  # in this process
_handshakes_to: dict[tuple[str, int], threading.BoundedSemaphore] = {}  # to one server
_handshakes_lock = threading.Lock()


class SshTransport:
    """Programs on a host behind sshd. Connects when first used, and again after a broken line."""

    def __init__(
        self,
        host: str,
        address: str,
        *,
        port: int | None = None,
        user: str | None = None,
        identity_file: str | Path | None = None,
        host_key: str | None = None,
        host_keys: str = "strict",
        known_hosts_files: Sequence[Path] | None = None,
        accepted_file: Path | None = None,
        on_accept: Callable[[str], None] | None = None,
        connect_timeout_s: float | None = None,
        auth_timeout_s: float = AUTH_TIMEOUT_S,
    ) -> None:
        """`host` is the name in errors. `host_key` pins a fingerprint (`SHA256:…`); otherwise
        unknown keys are refused, or with `host_keys="accept-new"` recorded in `accepted_file`
        (default: dsgd's own known_hosts) and told to `on_accept`."""
        self.host = host
        self._server = Server(host, address, port or 22, user or getpass.getuser())
        self._identity = Path(identity_file).expanduser() if identity_file else None
        self._keyring = Keyring(
            self._server,
            host_key,
            host_keys == "accept-new",
            known_hosts_files,
            accepted_file,
            on_accept,
        )
        self._connect_timeout_s = connect_timeout_s or CONNECT_TIMEOUT_S
        self._auth_timeout_s = auth_timeout_s
        self._connecting = threading.Lock()
        self._lock = threading.Lock()  # of the two below; never held for long
        self._connection: Connection | None = None
        self._closing = threading.Event()

    def open(self, argv: Sequence[str]) -> SshStream:
        command = "exec " + shlex.join(argv)
        if "\0" in command or argv[0].startswith("-"):  # `exec` would take it for an option
            raise ConnectFailed(self.host, f"cannot start {argv[0]!r}: not the name of a program")
        try:
            return self._connected().start(command)
        except LineWasDead:  # since it was last used: the next one is a new one
            try:
                return self._connected().start(command)
            except LineWasDead as error:
                raise ConnectFailed(self.host, str(error)) from error

    def close(self) -> None:
        with self._lock:
            self._closing.set()
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> Connection:
        with self._connecting:
            with self._lock:
                known = self._connection
            if known is not None and known.alive:
                return known
            if known is not None:
                known.close()
            fresh = self._connect()
            with self._lock:
                if not self._closing.is_set():
                    self._connection = fresh
                    return fresh
            fresh.close()
            raise ConnectFailed(self.host, "the connection is closed")

    def _connect(self) -> Connection:
        """A new connection; transient failures are tried again within the connect timeout."""
        budget = Budget(self._connect_timeout_s)
        for pause_s in (*RETRY_PAUSES_S, None):
            if self._closing.is_set():
                break
            try:
                return self._attempt(budget)
            except Transient as error:
                if pause_s is None or budget.left_s <= pause_s:
                    raise ConnectFailed(
                        self.host, error.message, remedy=error.remedy
                    ) from error.__cause__
            with budget.spending():
                self._closing.wait(pause_s * random.uniform(0.7, 1.3))
        raise ConnectFailed(self.host, "the connection is closed")

    def _attempt(self, budget: Budget) -> Connection:
        if self._identity is not None:
            _check_identity(self._server, self._identity)
        for kinds in self._keyring.kinds_to_ask_for():
            with _slot_to(self._server):
                with budget.spending():
                    opened = _dial(self._server, budget)
                try:
                    with _handshakes:
                        transport = self._handshake(opened, kinds, budget)
                except BaseException:
                    opened.close()
                    raise
            if transport is not None:
                return Connection(self.host, transport)
        raise self._keyring.not_the_pinned_one()

    def _handshake(
        self, opened: socket.socket, kinds: Sequence[str], budget: Budget
    ) -> paramiko.Transport | None:
        """Encryption, host key and authentication. None: not the key that is pinned."""
        transport = _new_transport(opened, kinds, budget)
        try:
            with budget.spending():
                _negotiate(self._server, transport, budget)
            if self._keyring.accepts(transport.get_remote_server_key()):
                _authenticate(self._server, transport, self._identity, self._auth_timeout_s)
                return transport
        except NoCommonHostKey:
            pass
        except BaseException:
            _shut(transport)
            raise
        _shut(transport)
        return None


@dataclass(frozen=True, slots=True)
class Server:
    """Whom we talk to; `host` is how the user calls it."""

    host: str
    address: str
    port: int
    user: str

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"


class Transient(Exception):
    """A failure to connect that may pass: it is tried again before it becomes an error."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class LineWasDead(Exception):
    """The connection broke before a program could be started on it. Never leaves this file."""


class NoCommonHostKey(Exception):
    """The server has no host key of the type that was asked for."""


class Budget:
    """Time that may be spent on connecting. Waiting for one's turn does not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._spent_s = 0.0
        self._since: float | None = None

    @property
    def left_s(self) -> float:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return max(0.0, self.seconds - self._spent_s - running)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._spent_s += time.monotonic() - self._since
            self._since = None


# -- the network -----------------------------------------------------------------------------------


def _slot_to(server: Server) -> threading.BoundedSemaphore:
    """One of the few handshakes that may be in flight to one server."""
    with _handshakes_lock:
        key = (server.address, server.port)
        return _handshakes_to.setdefault(key, threading.BoundedSemaphore(8))


def _dial(server: Server, budget: Budget) -> socket.socket:
    """A TCP connection. Raises ConnectFailed, or Transient."""
    last: OSError | None = None
    found = _resolve(server, budget)
    for index, (family, sockaddr) in enumerate(found):
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.settimeout(max(0.01, budget.left_s / (len(found) - index)))
            opened.connect(sockaddr)
            _notice_dead_peers(opened)
            return opened
        except OSError as error:
            opened.close()
            last = error
    assert last is not None
    if isinstance(last, TimeoutError):
        raise ConnectFailed(
            server.host,
            f"{server} does not answer (waited {budget.seconds:g} s)",
            remedy="is the host up, the address right, the port open in its firewall?",
        ) from last
    if isinstance(last, ConnectionRefusedError):
        raise Transient(
            f"{server} refuses connections: no SSH server listens there",
            "start sshd there, or set `port:`",
        ) from last
    raise Transient(f"{server} cannot be reached: {last.strerror or last}") from last


def _resolve(server: Server, budget: Budget) -> list[tuple[socket.AddressFamily, Any]]:
    """The addresses of a name. The resolver itself knows no deadline, so a thread asks it."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(flags: int) -> None:
        try:
            found = socket.getaddrinfo(
                server.address, server.port, type=socket.SOCK_STREAM, flags=flags
            )
            answers.put([(family, sockaddr) for family, _, _, _, sockaddr in found])
        except (OSError, ValueError) as error:  # ValueError: NUL, or no name at all (idna)
            answers.put(error)

    ask(socket.AI_NUMERICHOST)  # the usual case, which asks nobody
    answer = answers.get()
    if isinstance(answer, socket.gaierror):
        threading.Thread(target=ask, args=(0,), name="resolver", daemon=True).start()
        try:
            answer = answers.get(timeout=max(0.01, budget.left_s))
        except queue.Empty:
            raise ConnectFailed(
                server.host,
                f"the name {server.address!r} could not be resolved in {budget.seconds:g} s",
                remedy="is a name server reachable?",
            ) from None
    if isinstance(answer, list):
        return answer
    reason = getattr(answer, "strerror", None) or str(answer)
    message = f"the name {server.address!r} is unknown ({reason})"
    if getattr(answer, "errno", None) == socket.EAI_AGAIN:
        raise Transient(message, "is a name server reachable?") from answer
    raise ConnectFailed(server.host, message, remedy="correct `address:`") from answer


def _notice_dead_peers(opened: socket.socket) -> None:
    """Let the kernel find out that nobody is there any more, whether we send or only wait."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_AFTER_S),
        ("TCP_KEEPALIVE", KEEPALIVE_AFTER_S),  # the same on macOS
        ("TCP_KEEPINTVL", KEEPALIVE_EVERY_S),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", DEAD_PEER_S * 1000),
    ):
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# -- the handshake ---------------------------------------------------------------------------------


class TellingTransport(paramiko.Transport):
    """paramiko forgets which signal ended a program, and who closed a channel: the host, or
    paramiko itself because the connection broke. This one writes both down."""

    _channel_handler_table: ClassVar[dict[int, Any]]


def _on_channel_request(channel: Any, message: paramiko.Message) -> None:
    start = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        channel.exit_signal = message.get_text()
        channel.status_event.set()
    else:
        message.packet.seek(start)
        channel._handle_request(message)


def _on_channel_close(channel: Any, message: paramiko.Message) -> None:
    channel.closed_by_host = True
    channel._handle_close(message)


TellingTransport._channel_handler_table = {
    **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
    MSG_CHANNEL_REQUEST: _on_channel_request,
    MSG_CHANNEL_CLOSE: _on_channel_close,
}


def _new_transport(
    opened: socket.socket, kinds: Sequence[str], budget: Budget
) -> paramiko.Transport:
    transport = TellingTransport(opened)
    options = transport.get_security_options()
    options.ciphers = [name for name in CIPHERS if name in options.ciphers]
    options.digests = [name for name in DIGESTS if name in options.digests]
    wanted = [algorithm for kind in kinds for algorithm in ALGORITHMS[kind]]
    options.key_types = [name for name in wanted if name in options.key_types]
    # a little more than start_client gets: its own timeout is the one that we can tell apart
    transport.banner_timeout = transport.handshake_timeout = budget.left_s + 5.0
    transport.channel_timeout = CHANNEL_TIMEOUT_S
    return transport


def _negotiate(server: Server, transport: paramiko.Transport, budget: Budget) -> None:
    """Banner and key exchange. Raises ConnectFailed, Transient or NoCommonHostKey."""
    try:
        transport.start_client(timeout=max(0.1, budget.left_s))
    except paramiko.ssh_exception.IncompatiblePeer as error:
        if "host key" in str(error):
            raise NoCommonHostKey from error
        raise ConnectFailed(
            server.host,
            f"{server} and dsgd cannot agree in the SSH handshake: {error}",
            remedy="update its SSH server",
        ) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        if budget.left_s > 0:
            raise Transient(
                f"{server} closed the connection during the handshake ({_reason(error)})",
                "is it an SSH server, and does it accept so many connections?",
            ) from error
    if not transport.is_active() or not transport.initial_kex_done:
        raise ConnectFailed(
            server.host,
            f"{server} accepts connections but does not finish the SSH handshake"
            f" (waited {budget.seconds:g} s)",
            remedy="is `port:` the port of an SSH server? is the host overloaded?",
        )


def _shut(transport: paramiko.Transport) -> None:
    """Close a transport now and for good, with its thread."""
    with contextlib.suppress(OSError):
        transport.sock.shutdown(socket.SHUT_RDWR)  # wakes its thread
    transport.close()
    transport.packetizer.complete_handshake()  # or its timer's thread lives on for a while
    if transport.is_alive():
        transport.join(2.0)
    transport.sock.close()


class Keyring:
    """Decides whether a server's key is the right one."""

    def __init__(
        self,
        server: Server,
        pinned: str | None,
        accept_new: bool,
        files: Sequence[Path] | None,
        accepted_file: Path | None,
        on_accept: Callable[[str], None] | None,
    ) -> None:
        self._server = server
        self._pinned = pinned.rstrip("=") if pinned else None
        self._accept_new = accept_new
        self._accepted_file = accepted_file or own_known_hosts()
        self._files = (*(default_known_hosts() if files is None else files), self._accepted_file)
        self._on_accept = on_accept
        self._shown: list[str] = []

    def kinds_to_ask_for(self) -> list[list[str]]:
        """Types of host keys, one list for each connection to try.

        A server signs with one key only. The types on record come first, or a known server that
        prefers another of its keys would look like an impostor. For a fingerprint the type is
        unknown: one after the other.
        """
        self._shown = []
        if self._pinned:
            return [[kind] for kind in ALGORITHMS]
        known = [record.kind for record in self._records() if not record.revoked]
        return [sorted(ALGORITHMS, key=lambda kind: kind not in known)]

    def accepts(self, key: paramiko.PKey) -> bool:
        """True: this is the host. False: not the pinned key. Raises HostKeyRejected."""
        kind, blob = key.get_name(), key.asbytes()
        if self._pinned:
            self._shown.append(known_hosts.fingerprint(blob))
            return known_hosts.fingerprint(blob) == self._pinned
        verdict, records = known_hosts.judge(self._records(), kind, blob)
        if verdict is Verdict.UNKNOWN and self._accept_new:
            self._accept(kind, blob)
        elif verdict is not Verdict.KNOWN:
            raise self._rejection(verdict, kind, blob, [record.place for record in records])
        return True

    def not_the_pinned_one(self) -> HostKeyRejected:
        shown = ", ".join(self._shown) or "no key that dsgd can use"
        return HostKeyRejected(
            self._server.host,
            f"its host key is not the one in the cluster file: {self._server} has {shown},"
            f" not {self._pinned}",
            remedy="find out why; if the host was reinstalled, correct `host_key:`",
        )

    def _records(self) -> tuple[known_hosts.Record, ...]:
        return known_hosts.read(self._files, self._server.address, self._server.port)

    def _accept(self, kind: str, blob: bytes) -> None:
        line = known_hosts.line_for(self._server.address, self._server.port, kind, blob)
        try:
            known_hosts.append(self._accepted_file, line)
        except OSError as error:
            raise HostKeyRejected(
                self._server.host,
                f"its new host key could not be recorded in {self._accepted_file}: {error}",
            ) from error
        if self._on_accept is not None:
            self._on_accept(
                f"{self._server.host}: accepted its new host key {kind}"
                f" {known_hosts.fingerprint(blob)} (recorded in {_short(self._accepted_file)})"
            )

    def _rejection(
        self, verdict: Verdict, kind: str, blob: bytes, places: Sequence[str]
    ) -> HostKeyRejected:
        server, shown = self._server, f"{kind} {known_hosts.fingerprint(blob)}"
        where = ", ".join(_short(place) for place in places)
        if verdict is Verdict.REVOKED:
            return HostKeyRejected(server.host, f"its host key {shown} is revoked in {where}")
        if verdict is Verdict.CHANGED:
            return HostKeyRejected(
                server.host,
                f"its host key CHANGED: {server} shows {shown}, which is not the one in {where};"
                " somebody may be listening in",
                remedy=f"if the host was reinstalled: remove {where} and check the new key",
            )
        port = "" if server.port == 22 else f"-p {server.port} "
        return HostKeyRejected(
            server.host,
            f"its host key is unknown: {server} shows {shown}",
            details=[known_hosts.line_for(server.address, server.port, kind, blob)],
            remedy=(
                "compare the fingerprint with the host's own; then either"
                f" `ssh-keyscan {port}{shlex.quote(server.address)} >> ~/.ssh/known_hosts`,"
                f" or `host_key: {known_hosts.fingerprint(blob)}` for this host,"
                " or `host_keys: accept-new` under `ssh:`"
            ),
        )


def own_known_hosts() -> Path:
    """Where dsgd records the keys that it accepted: the user's own file is never written."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()
    return base / "dsgd" / "known_hosts"


def default_known_hosts() -> tuple[Path, ...]:
    return Path("~/.ssh/known_hosts").expanduser(), Path("/etc/ssh/ssh_known_hosts")


# -- authentication --------------------------------------------------------------------------------


class AgentSilent(paramiko.SSHException):
    """The ssh-agent did not answer in time."""


class KeyAgent(AgentSSH):
    """The user's ssh-agent, with a deadline on every answer."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            self._connect(self._socket)  # type: ignore[attr-defined]
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._close()  # type: ignore[attr-defined]

    def _send_message(self, message: bytes) -> Any:
        try:
            return super()._send_message(message)  # type: ignore[misc]
        except OSError as error:  # in paramiko's own thread, which only survives its own errors
            raise AgentSilent(_reason(error)) from error


@dataclass(frozen=True, slots=True)
class Credential:
    """A key to try, and how to call it."""

    label: str
    key: paramiko.PKey


class Tried:
    """What was offered, for the error message."""

    def __init__(self) -> None:
        self.agent: str | None = None
        self.files: list[str] = []
        self.locked: list[Path] = []  # passphrase

    def __str__(self) -> str:
        agent = [f"agent: {self.agent}"] if self.agent else []
        return ", ".join([*agent, *self.files]) or "no key: there is none in ~/.ssh, and no agent"


def _check_identity(server: Server, path: Path) -> None:
    """A key that the user named must be there, and be private."""
    try:
        found = path.stat()
        path.open("rb").close()
    except OSError as error:
        raise AuthenticationFailed(
            server.host,
            f"cannot read the identity file {_short(path)}: {error.strerror}",
            remedy="correct `identity_file:`",
        ) from error
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        raise AuthenticationFailed(
            server.host,
            f"others may read the identity file {_short(path)}, so it is not used",
            remedy=f"chmod 600 {shlex.quote(str(path))}",
        )


def _authenticate(
    server: Server, transport: paramiko.Transport, identity: Path | None, timeout_s: float
) -> None:
    """Offer keys until one is accepted. Raises AuthenticationFailed, ConnectFailed, Transient."""
    deadline = time.monotonic() + timeout_s
    tried = Tried()
    with contextlib.ExitStack() as stack:
        for credential in _credentials(server, identity, tried, timeout_s, stack):
            transport.auth_timeout = max(0.1, deadline - time.monotonic())
            try:
                more = transport.auth_publickey(server.user, credential.key)
            except paramiko.BadAuthenticationType as error:
                wanted = ", ".join(error.allowed_types) or "nothing at all"
                raise AuthenticationFailed(
                    server.host,
                    f"it does not accept keys for user {server.user!r}, only {wanted}",
                    remedy="allow PubkeyAuthentication in its sshd_config",
                ) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                _check_refusal(server, transport, error, tried, deadline, timeout_s)
                continue
            if not more:
                return
            raise AuthenticationFailed(
                server.host,
                f"it wants more than a key from user {server.user!r}: {', '.join(more)}",
                remedy="dsgd signs in with keys alone",
            )
    locked = f"; {_short(tried.locked[0])} has a passphrase" if tried.locked else ""
    raise AuthenticationFailed(
        server.host,
        f"auth refused for user {server.user!r} (tried {tried}){locked}",
        remedy=(
            f"ssh-add {shlex.quote(str(tried.locked[0]))}"
            if tried.locked
            else f"ssh-copy-id {_port_option(server)}"
            f"{shlex.quote(f'{server.user}@{server.address}')}"
        ),
    )


def _check_refusal(
    server: Server,
    transport: paramiko.Transport,
    error: Exception,
    tried: Tried,
    deadline: float,
    timeout_s: float,
) -> None:
    """Returns when the next key may be tried."""
    if isinstance(error, AgentSilent):
        raise AuthenticationFailed(
            server.host,
            f"your ssh agent did not sign ({error})",
            remedy="does it wait for you to confirm? `ssh-add -l` shows whether it answers",
        ) from error
    if time.monotonic() >= deadline:
        raise ConnectFailed(
            server.host, f"{server} did not finish the authentication within {timeout_s:g} s"
        ) from error
    if isinstance(transport.get_exception(), OSError) or isinstance(error, OSError):
        raise Transient(f"{server} closed the connection ({_reason(error)})") from error
    if not transport.is_active():
        raise AuthenticationFailed(
            server.host,
            f"it hung up while user {server.user!r} signed in ({_reason(error)}; tried {tried})",
            remedy="set `identity_file:` so that the right key comes first",
        ) from error


def _credentials(
    server: Server,
    identity: Path | None,
    tried: Tried,
    timeout_s: float,
    stack: contextlib.ExitStack,
) -> Iterator[Credential]:
    """The keys to try: the named one, the agent's, and without a named one the usual files."""
    offered: set[bytes] = set()
    if identity is not None:
        named = _load(server, identity, tried)
        if named is not None:
            offered.add(named.key.asbytes())
            yield named
    for count, key in enumerate(_agent_keys(tried, timeout_s / 2, stack), 1):
        tried.agent = f"{count} key{'s' * (count > 1)}"
        if key.asbytes() not in offered:
            offered.add(key.asbytes())
            yield Credential("agent", key)
    if identity is None:
        for name in DEFAULT_KEYS:
            path = Path("~/.ssh").expanduser() / name
            usual = _load(server, path, tried) if path.is_file() else None
            if usual is not None and usual.key.asbytes() not in offered:
                yield usual


def _agent_keys(
    tried: Tried, timeout_s: float, stack: contextlib.ExitStack
) -> Sequence[paramiko.PKey]:
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        return ()
    try:
        agent = KeyAgent(path, timeout_s)
    except AgentSilent:
        tried.agent = "does not answer"
        return ()
    except (paramiko.SSHException, OSError, EOFError, ValueError):
        tried.agent = "not there"
        return ()
    stack.callback(agent.close)
    tried.agent = "no keys"
    return agent.get_keys()


def _load(server: Server, path: Path, tried: Tried) -> Credential | None:
    """A private key file; None when it cannot be used, and `tried` says why."""
    label = _short(path)
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077 and path.stat().st_uid == os.getuid():
            tried.files.append(f"{label} (unused: others may read it; chmod 600)")
            return None
        key = paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError):  # TypeError: cryptography's own
        tried.locked.append(path)
        return None
    except Exception as error:  # a damaged key raises whatever its parser meets
        tried.files.append(f"{label} (unusable: {_reason(error)})")
        return None
    tried.files.append(label)
    return Credential(label, key)


def _port_option(server: Server) -> str:
    return "" if server.port == 22 else f"-p {server.port} "


# -- the connection and its streams ----------------------------------------------------------------


class Connection:
    """One authenticated transport, and a thread that drains the stderr of all its streams."""

    def __init__(self, host: str, transport: paramiko.Transport) -> None:
        self.host = host
        self._transport = transport
        self._lock = threading.Lock()
        self._streams: set[SshStream] = set()
        self._stderr: queue.SimpleQueue[SshStream | None] = queue.SimpleQueue()
        self._drain = threading.Thread(
            target=self._drain_stderr, name=f"stderr of {host}", daemon=True
        )
        self._drain.start()

    @property
    def alive(self) -> bool:
        return self._transport.is_active()

    def start(self, command: str) -> SshStream:
        """Run a command on a new channel. Raises ConnectFailed, or LineWasDead."""
        stream = SshStream(self, self._open_channel(), self._stderr)
        with self._lock:
            self._streams.add(stream)
        timer = threading.Timer(CHANNEL_TIMEOUT_S, self.abort)  # paramiko waits here for ever
        timer.daemon = True
        timer.start()
        try:
            stream.channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError, UnicodeError) as error:
            stream.close()
            raise ConnectFailed(
                self.host, f"it did not start a program ({self.reason(error)})"
            ) from error
        finally:
            timer.cancel()
        return stream

    def _open_channel(self) -> paramiko.Channel:
        for pause_s in (*SESSION_PAUSES_S, None):
            started = time.monotonic()
            try:
                return self._transport.open_session(timeout=CHANNEL_TIMEOUT_S)
            except paramiko.ChannelException as error:  # a program that was closed still ends
                if pause_s is None:
                    raise ConnectFailed(
                        self.host,
                        f"it refuses another session ({error})",
                        remedy="raise MaxSessions in its sshd_config",
                    ) from error
                time.sleep(pause_s)
            except (paramiko.SSHException, OSError, EOFError) as error:
                waited_s = time.monotonic() - started
                self.abort()
                if waited_s < CHANNEL_TIMEOUT_S:
                    raise LineWasDead(f"the connection was lost ({self.reason(error)})") from error
                raise ConnectFailed(
                    self.host, f"its SSH server does not answer any more ({self.reason(error)})"
                ) from error
        raise AssertionError("unreachable")

    def forget(self, stream: SshStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def writable(self, timeout_s: float) -> bool:
        """Whether the kernel takes more bytes for the network."""
        poll = select.poll()
        try:
            poll.register(self._transport.sock, select.POLLOUT)
            return bool(poll.poll(timeout_s * 1000))
        except (OSError, ValueError):  # closed meanwhile
            return False

    def reason(self, error: Exception | None = None) -> str:
        """Why the connection broke, in words. (`get_exception` would forget it.)"""
        return _reason(self._transport.saved_exception or error)

    def abort(self) -> None:
        """Cut the line: every stream ends."""
        with contextlib.suppress(OSError):
            self._transport.sock.shutdown(socket.SHUT_RDWR)
        self._transport.close()

    def close(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            stream.mark_closed()
        _shut(self._transport)
        self._stderr.put(None)
        self._drain.join(2.0)

    def _drain_stderr(self) -> None:
        while (stream := self._stderr.get()) is not None:
            stream.drain_stderr()


class SshStream:
    """The standard streams of a program behind a channel."""

    def __init__(
        self,
        connection: Connection,
        channel: paramiko.Channel,
        stderr: queue.SimpleQueue[SshStream | None],
    ) -> None:
        self.channel = channel
        self._connection = connection
        self._host = connection.host
        self._closed = False
        self._readable = threading.Event()
        self._tail = b""
        self._tail_lock = threading.Lock()
        # a channel has one timeout for both directions, so the reader waits for an event instead
        channel.in_buffer.set_event(self._readable)
        channel.in_stderr_buffer.set_event(Doorbell(lambda: stderr.put(self)))  # type: ignore[arg-type]

    def write(self, data: bytes, timeout_s: float = 30.0) -> None:
        self.channel.settimeout(timeout_s)
        for start in range(0, len(data), WRITE_BYTES):
            self._write(data[start : start + WRITE_BYTES], timeout_s)

    def _write(self, data: bytes, timeout_s: float) -> None:
        while data:
            if self._closed or self.channel.eof_sent:
                raise ConnectFailed(self._host, "the stream is closed")
            try:
                sent = self.channel.send(data)
            except TimeoutError:
                raise DeadlinePassed("sending", self._host, timeout_s) from None
            except (paramiko.SSHException, OSError, EOFError) as error:
                raise self._broken(error) from error
            # paramiko drops silently what it cannot send any more
            if sent == 0 or not self._connection.alive:
                raise self._broken(None)
            data = data[sent:]

    def read(self, max_bytes: int, timeout_s: float | None) -> bytes:
        if not self._readable.wait(timeout_s):
            raise TimeoutError(f"{self._host}: nothing came for {timeout_s} s")
        if self._closed:
            return b""
        try:
            data = self.channel.recv(max_bytes)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._broken(error) from error
        if not data and not (self._closed or self.channel.eof_received or self._closed_by_host):
            raise self._broken(None)  # a broken connection is never taken for the end
        return data

    def stderr_tail(self) -> str:
        self.drain_stderr()
        return self._tail.decode("utf-8", "replace")[-STDERR_TAIL_BYTES:]

    def wait(self, timeout_s: float) -> int:
        if not self.channel.status_event.wait(timeout_s):
            raise DeadlinePassed("ending", self._host, timeout_s)
        name = getattr(self.channel, "exit_signal", None)
        if name is not None:
            return -getattr(signal, f"SIG{name}", signal.SIGKILL)
        if self.channel.exit_status < 0:
            raise self._broken(None)
        return self.channel.exit_status

    def close(self) -> None:
        self._connection.forget(self)
        self.mark_closed()
        if not self._connection.alive:
            return
        if not self._connection.writable(STUCK_S):
            self._connection.abort()  # closing a channel would have to wait for a dead line
            return
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            self.channel.close()

    def mark_closed(self) -> None:
        """Readers see the end from now on, and the one that waits wakes up."""
        self._closed = True
        self._readable.set()

    def drain_stderr(self) -> None:
        with self._tail_lock, contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            while self.channel.recv_stderr_ready():
                part = self.channel.recv_stderr(65536)
                self._tail = (self._tail + part)[-STDERR_TAIL_BYTES:]

    @property
    def _closed_by_host(self) -> bool:
        return getattr(self.channel, "closed_by_host", False)

    def _broken(self, error: Exception | None) -> DsgdError:
        if self._closed:
            return ConnectFailed(self._host, "the stream is closed")
        details = self.stderr_tail().splitlines()[-10:]
        if self._closed_by_host:
            return ConnectFailed(self._host, "the program at the other end ended", details=details)
        return ConnectFailed(
            self._host,
            f"the connection was lost ({self._connection.reason(error)})",
            details=details,
        )


class Doorbell:
    """Looks like an Event to paramiko's buffers: calls a function when something came."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.set = ring

    def clear(self) -> None:
        """Nothing: a bell does not stay rung."""


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "no reason given"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or {"EOFError": "it hung up"}.get(type(error).__name__, type(error).__name__)


def _short(path: Path | str) -> str:
    """A path as users write it: ~ for their home."""
    home = str(Path.home())
    return f"~{str(path)[len(home) :]}" if str(path).startswith(home + "/") else str(path)
