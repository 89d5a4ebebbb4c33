"""SshTransport: connects when it is first used, and again after a broken line.

At most 8 handshakes are in flight, since sshd drops more (MaxStartups). Transient failures are
tried again within the connect timeout, permanent ones never.
"""

from __future__ import annotations

import getpass
import random
import shlex
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dsgd_cli.contract.errors import ConnectFailed
from dsgd_cli.transport.ssh.attempt import Budget, Server, Transient
from dsgd_cli.transport.ssh.connection import Connection, LineWasDead
from dsgd_cli.transport.ssh.dial import dial
from dsgd_cli.transport.ssh.host_keys import HostKeyCheck
from dsgd_cli.transport.ssh.line import Line, NoCommonHostKey
from dsgd_cli.transport.ssh.login import Login
from dsgd_cli.transport.ssh.stream import SshStream
from dsgd_cli.transport.ssh.user_keys import check_identity

CONNECT_TIMEOUT_S = 10.0
AUTH_TIMEOUT_S = 10.0
RETRY_PAUSES_S = (0.2, 0.8, 2.0)

_handshakes = threading.BoundedSemaphore(8)  # in this process
_handshakes_to: dict[tuple[str, int], threading.BoundedSemaphore] = {}  # to one server
_handshakes_lock = threading.Lock()


class SshTransport:
    """Programs on a host behind sshd."""

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
        on_accept: Callable[[str], None] | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        auth_timeout_s: float = AUTH_TIMEOUT_S,
    ) -> None:
        """`host` is the name in errors. `host_key` pins a fingerprint (`SHA256:…`); otherwise
        unknown keys are refused, or with `host_keys="accept-new"` recorded in dsgd's own
        known_hosts and told to `on_accept`."""
        self.host = host
        self._server = Server(host, address, port or 22, user or getpass.getuser())
        self._identity = Path(identity_file).expanduser() if identity_file else None
        self._host_keys = HostKeyCheck(self._server, host_key, host_keys == "accept-new", on_accept)
        self._connect_timeout_s = connect_timeout_s
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
            check_identity(self.host, self._identity)
        for algorithms in self._host_keys.algorithms_to_ask_for():
            with _slot_to(self._server):
                with budget.spending():
                    opened = dial(self._server, budget)
                try:
                    with _handshakes:
                        line = self._handshake(opened, algorithms, budget)
                except BaseException:
                    opened.close()
                    raise
            if line is not None:
                return Connection(self.host, line)
        raise self._host_keys.none_accepted()

    def _handshake(
        self, opened: socket.socket, algorithms: Sequence[str], budget: Budget
    ) -> Line | None:
        """Encryption, host key and authentication. None: not the key that is pinned."""
        line = Line(opened, algorithms)
        try:
            with budget.spending():
                line.negotiate(self._server, budget)
            if self._host_keys.accepts(line.get_remote_server_key()):
                Login(self._server, line, self._auth_timeout_s).run(self._identity)
                return line
        except NoCommonHostKey:
            pass
        except BaseException:
            line.shut()
            raise
        line.shut()
        return None


def _slot_to(server: Server) -> threading.BoundedSemaphore:
    """One of the few handshakes that may be in flight to one server."""
    with _handshakes_lock:
        key = (server.address, server.port)
        return _handshakes_to.setdefault(key, threading.BoundedSemaphore(8))
