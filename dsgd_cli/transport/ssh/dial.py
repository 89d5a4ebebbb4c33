"""A TCP connection to a server: the name is resolved, its addresses are tried, within a budget.

The kernel is told to find out by itself when nobody is there any more (a pulled cable), whether we
send or only wait. Knows nothing of SSH.
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any

from dsgd_cli.contract.errors import ConnectFailed
from dsgd_cli.transport.ssh.attempt import Budget, Server, Transient

DEAD_PEER_S = 12  # unanswered bytes or keepalives for so long: the connection is dead
KEEPALIVE_AFTER_S = 5
KEEPALIVE_EVERY_S = 3


def dial(server: Server, budget: Budget) -> socket.socket:
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
