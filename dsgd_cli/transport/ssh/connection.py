"""An authenticated connection: programs are started on it, one channel for each.

Invariant: paramiko waits in two places without a deadline, and gets one here by cutting the line.
One thread drains the stderr of all streams, so that no program blocks on it.
"""

from __future__ import annotations

import queue
import threading
import time

import paramiko

from dsgd_cli.contract.errors import ConnectFailed
from dsgd_cli.transport.ssh.line import Line
from dsgd_cli.transport.ssh.stream import SshStream

CHANNEL_TIMEOUT_S = 10.0
SESSION_PAUSES_S = (0.1, 0.3, 0.6)


class LineWasDead(Exception):
    """The connection broke before a program could be started on it."""


class Connection:
    """One authenticated line, the streams on it, and a thread that drains their stderr."""

    def __init__(self, host: str, line: Line) -> None:
        self._host = host
        self._line = line
        self._lock = threading.Lock()
        self._streams: set[SshStream] = set()
        self._stderr: queue.SimpleQueue[SshStream | None] = queue.SimpleQueue()
        self._drain = threading.Thread(
            target=self._drain_stderr, name=f"stderr of {host}", daemon=True
        )
        self._drain.start()

    @property
    def alive(self) -> bool:
        return self._line.is_active()

    def start(self, command: str) -> SshStream:
        """Run a command on a new channel. Raises ConnectFailed, or LineWasDead."""
        channel = self._open_channel()
        stream = SshStream(
            self._host, self._line, channel, on_stderr=self._stderr.put, on_close=self._forget
        )
        with self._lock:
            self._streams.add(stream)
        timer = threading.Timer(CHANNEL_TIMEOUT_S, self._line.cut)  # paramiko waits for ever
        timer.daemon = True
        timer.start()
        try:
            channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError, UnicodeError) as error:
            stream.close()
            raise ConnectFailed(
                self._host, f"it did not start a program ({self._line.why_broken(error)})"
            ) from error
        finally:
            timer.cancel()
        return stream

    def close(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            stream.mark_closed()
        self._line.shut()
        self._stderr.put(None)
        self._drain.join(2.0)

    def _open_channel(self) -> paramiko.Channel:
        for pause_s in (*SESSION_PAUSES_S, None):
            started = time.monotonic()
            try:
                return self._line.open_session(timeout=CHANNEL_TIMEOUT_S)
            except paramiko.ChannelException as error:  # a program that was closed still ends
                if pause_s is None:
                    raise ConnectFailed(
                        self._host,
                        f"it refuses another session ({error})",
                        remedy="raise MaxSessions in its sshd_config",
                    ) from error
                time.sleep(pause_s)
            except (paramiko.SSHException, OSError, EOFError) as error:
                waited_s = time.monotonic() - started
                self._line.cut()
                reason = self._line.why_broken(error)
                if waited_s < CHANNEL_TIMEOUT_S:
                    raise LineWasDead(f"the connection was lost ({reason})") from error
                raise ConnectFailed(
                    self._host, f"its SSH server does not answer any more ({reason})"
                ) from error
        raise AssertionError("unreachable")

    def _forget(self, stream: SshStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def _drain_stderr(self) -> None:
        while (stream := self._stderr.get()) is not None:
            stream.drain_stderr()
