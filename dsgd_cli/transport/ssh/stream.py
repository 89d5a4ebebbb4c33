"""The standard streams of a program behind a channel of an SSH line.

Invariants: every wait has a deadline, and a broken connection is never taken for the end of the
stream. stderr is drained by whoever is told that something came (`on_stderr`), never in paramiko's
own thread, which must not wait for itself.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

import paramiko

from dsgd_cli.contract.errors import ConnectFailed, DeadlinePassed
from dsgd_cli.transport.ssh.line import Line

STUCK_S = 1.0  # how long `close` waits for a socket that takes nothing
STDERR_TAIL_BYTES = 8192
WRITE_BYTES = (1 << 15) - 64  # what fits into one packet of OpenSSH, with paramiko's reserve


class SshStream:
    """The standard streams of a program behind a channel."""

    def __init__(
        self,
        host: str,
        line: Line,
        channel: paramiko.Channel,
        *,
        on_stderr: Callable[[SshStream], None],
        on_close: Callable[[SshStream], None],
    ) -> None:
        self._host = host
        self._line = line
        self._channel = channel
        self._on_close = on_close
        self._closed = False
        self._readable = threading.Event()
        self._tail = b""
        self._tail_lock = threading.Lock()
        # a channel has one timeout for both directions, so the reader waits for an event instead
        channel.in_buffer.set_event(self._readable)
        channel.in_stderr_buffer.set_event(Doorbell(lambda: on_stderr(self)))  # type: ignore[arg-type]

    def write(self, data: bytes, timeout_s: float = 30.0) -> None:
        self._channel.settimeout(timeout_s)
        for start in range(0, len(data), WRITE_BYTES):
            self._write(data[start : start + WRITE_BYTES], timeout_s)

    def _write(self, data: bytes, timeout_s: float) -> None:
        while data:
            if self._closed or self._channel.eof_sent:
                raise ConnectFailed(self._host, "the stream is closed")
            try:
                sent = self._channel.send(data)
            except TimeoutError:
                raise DeadlinePassed("sending", self._host, timeout_s) from None
            except (paramiko.SSHException, OSError, EOFError) as error:
                raise self._broken(error) from error
            # paramiko drops silently what it cannot send any more
            if sent == 0 or not self._line.is_active():
                raise self._broken(None)
            data = data[sent:]

    def read(self, max_bytes: int, timeout_s: float | None) -> bytes:
        if not self._readable.wait(timeout_s):
            raise TimeoutError(f"{self._host}: nothing came for {timeout_s} s")
        if self._closed:
            return b""
        try:
            data = self._channel.recv(max_bytes)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._broken(error) from error
        if not data and not (self._closed or self._channel.eof_received or self._closed_by_host):
            raise self._broken(None)  # a broken connection is never taken for the end
        return data

    def stderr_tail(self) -> str:
        self.drain_stderr()
        return self._tail.decode("utf-8", "replace")[-STDERR_TAIL_BYTES:]

    def wait(self, timeout_s: float) -> int:
        if not self._channel.status_event.wait(timeout_s):
            raise DeadlinePassed("ending", self._host, timeout_s)
        name = getattr(self._channel, "exit_signal", None)
        if name is not None:
            return -getattr(signal, f"SIG{name}", signal.SIGKILL)
        if self._channel.exit_status < 0:
            raise self._broken(None)
        return self._channel.exit_status

    def close(self) -> None:
        self._on_close(self)
        self.mark_closed()
        if not self._line.is_active():
            return
        if not self._line.writable(STUCK_S):
            self._line.cut()  # closing a channel would have to wait for a dead line
            return
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            self._channel.close()

    def mark_closed(self) -> None:
        """Readers see the end from now on, and the one that waits wakes up."""
        self._closed = True
        self._readable.set()

    def drain_stderr(self) -> None:
        with self._tail_lock, contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            while self._channel.recv_stderr_ready():
                part = self._channel.recv_stderr(65536)
                self._tail = (self._tail + part)[-STDERR_TAIL_BYTES:]

    @property
    def _closed_by_host(self) -> bool:
        return getattr(self._channel, "closed_by_host", False)

    def _broken(self, error: Exception | None) -> ConnectFailed:
        if self._closed:
            return ConnectFailed(self._host, "the stream is closed")
        details = self.stderr_tail().splitlines()[-10:]
        if self._closed_by_host:
            return ConnectFailed(self._host, "the program at the other end ended", details=details)
        return ConnectFailed(
            self._host,
            f"the connection was lost ({self._line.why_broken(error)})",
            details=details,
        )


class Doorbell:
    """Looks like an Event to paramiko's buffers: calls a function when something came."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.set = ring

    def clear(self) -> None:
        """Nothing: a bell does not stay rung."""
