"""The user's ssh-agent, with a deadline on every answer: it may wait for somebody to confirm."""

from __future__ import annotations

import socket
from typing import Any

import paramiko
from paramiko.agent import AgentSSH

from dsgd_cli.transport.ssh.attempt import in_words


class AgentSilent(paramiko.SSHException):
    """The ssh-agent did not answer in time."""


class KeyAgent(AgentSSH):
    """A connection to the agent; it must be open while one of its keys signs."""

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
            raise AgentSilent(in_words(error)) from error
