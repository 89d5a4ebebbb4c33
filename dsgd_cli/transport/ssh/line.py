"""The encrypted line to a server: paramiko's transport, which tells more and can be cut.

paramiko forgets which signal ended a program, and who closed a channel: the host, or paramiko
itself because the connection broke. This one writes both down, at the channel. The algorithms are
ours; whether the host key is the right one, and who signs in, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from collections.abc import Sequence
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_REQUEST

from dsgd_cli.contract.errors import ConnectFailed
from dsgd_cli.transport.ssh.attempt import Budget, Server, Transient, in_words

CIPHERS = (  # AES-GCM needs no separate MAC: half of the processor time of AES-CTR
    *("aes128-gcm@openssh.com", "aes256-gcm@openssh.com"),
    *("aes128-ctr", "aes192-ctr", "aes256-ctr"),
)
DIGESTS = (
    *("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com"),
    *("hmac-sha2-256", "hmac-sha2-512"),
)

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # or it prints to our stderr


class NoCommonHostKey(Exception):
    """The server has no host key of the type that was asked for."""


class Line(paramiko.Transport):
    """An SSH session over a connected socket, which it owns."""

    _channel_handler_table: ClassVar[dict[int, Any]]  # set below

    def __init__(self, opened: socket.socket, host_key_algorithms: Sequence[str]) -> None:
        super().__init__(opened)
        options = self.get_security_options()
        options.ciphers = [name for name in CIPHERS if name in options.ciphers]
        options.digests = [name for name in DIGESTS if name in options.digests]
        options.key_types = [name for name in host_key_algorithms if name in options.key_types]

    def negotiate(self, server: Server, budget: Budget) -> None:
        """Banner and key exchange. Raises ConnectFailed, Transient or NoCommonHostKey."""
        # a little more than start_client gets: its own timeout is the one that we can tell apart
        self.banner_timeout = self.handshake_timeout = budget.left_s + 5.0
        try:
            self.start_client(timeout=max(0.1, budget.left_s))
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
                    f"{server} closed the connection during the handshake ({in_words(error)})",
                    "is it an SSH server, and does it accept so many connections?",
                ) from error
        if not self.is_active() or not self.initial_kex_done:
            raise ConnectFailed(
                server.host,
                f"{server} accepts connections but does not finish the SSH handshake"
                f" (waited {budget.seconds:g} s)",
                remedy="is `port:` the port of an SSH server? is the host overloaded?",
            )

    def why_broken(self, error: Exception | None = None) -> str:
        """In words. (`get_exception` would forget it.)"""
        return in_words(self.saved_exception or error)

    def writable(self, timeout_s: float) -> bool:
        """Whether the kernel takes more bytes for the network."""
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLOUT)
            return bool(poll.poll(timeout_s * 1000))
        except (OSError, ValueError):  # closed meanwhile
            return False

    def cut(self) -> None:
        """Now, without a goodbye: every channel ends."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes its thread
        self.close()

    def shut(self) -> None:
        """Cut it for good, and wait for its thread."""
        self.cut()
        self.packetizer.complete_handshake()  # or its timer's thread lives on for a while
        if self.is_alive():
            self.join(2.0)
        self.sock.close()


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


Line._channel_handler_table = {
    **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
    MSG_CHANNEL_REQUEST: _on_channel_request,
    MSG_CHANNEL_CLOSE: _on_channel_close,
}
