"""Signing in: keys are offered until the server accepts one, within one deadline.

Keys alone: no password is ever sent, and a server that wants more than a key is refused.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path

import paramiko

from dsgd_cli.contract.errors import AuthenticationFailed, ConnectFailed
from dsgd_cli.transport.ssh.attempt import Server, Transient, in_words, short
from dsgd_cli.transport.ssh.key_agent import AgentSilent
from dsgd_cli.transport.ssh.line import Line
from dsgd_cli.transport.ssh.user_keys import Tried, keys_to_offer


class Login:
    """One attempt to sign in to a server. Its clock runs from the start."""

    def __init__(self, server: Server, line: Line, timeout_s: float) -> None:
        self._server = server
        self._line = line
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._tried = Tried()

    def run(self, identity: Path | None) -> None:
        """Raises AuthenticationFailed, ConnectFailed or Transient."""
        keys = keys_to_offer(identity, self._tried, self._timeout_s / 2)
        with contextlib.closing(keys):
            if not any(self._accepted(key) for key in keys):
                raise self._no_key_accepted()

    def _accepted(self, key: paramiko.PKey) -> bool:
        server = self._server
        self._line.auth_timeout = max(0.1, self._deadline - time.monotonic())
        try:
            more = self._line.auth_publickey(server.user, key)
        except paramiko.BadAuthenticationType as error:
            wanted = ", ".join(error.allowed_types) or "nothing at all"
            raise AuthenticationFailed(
                server.host,
                f"it does not accept keys for user {server.user!r}, only {wanted}",
                remedy="allow PubkeyAuthentication in its sshd_config",
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._check_refusal(error)
            return False
        if more:
            raise AuthenticationFailed(
                server.host,
                f"it wants more than a key from user {server.user!r}: {', '.join(more)}",
                remedy="dsgd signs in with keys alone",
            )
        return True

    def _check_refusal(self, error: Exception) -> None:
        """Returns when the next key may be tried."""
        server, line = self._server, self._line
        if isinstance(error, AgentSilent):
            raise AuthenticationFailed(
                server.host,
                f"your ssh agent did not sign ({error})",
                remedy="does it wait for you to confirm? `ssh-add -l` shows whether it answers",
            ) from error
        if time.monotonic() >= self._deadline:
            raise ConnectFailed(
                server.host,
                f"{server} did not finish the authentication within {self._timeout_s:g} s",
            ) from error
        if isinstance(line.get_exception(), OSError) or isinstance(error, OSError):
            raise Transient(f"{server} closed the connection ({in_words(error)})") from error
        if not line.is_active():
            raise AuthenticationFailed(
                server.host,
                f"it hung up while user {server.user!r} signed in"
                f" ({in_words(error)}; tried {self._tried})",
                remedy="set `identity_file:` so that the right key comes first",
            ) from error

    def _no_key_accepted(self) -> AuthenticationFailed:
        server = self._server
        refused = f"auth refused for user {server.user!r} (tried {self._tried})"
        if self._tried.locked:
            path = self._tried.locked[0]
            return AuthenticationFailed(
                server.host,
                f"{refused}; {short(path)} has a passphrase",
                remedy=f"ssh-add {shlex.quote(str(path))}",
            )
        account = shlex.quote(f"{server.user}@{server.address}")
        return AuthenticationFailed(
            server.host, refused, remedy=f"ssh-copy-id {server.port_option}{account}"
        )
