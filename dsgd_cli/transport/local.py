"""The road to this machine: a subprocess and its pipes.

Each program gets its own session, so that a Ctrl-C in the terminal does not reach it, and closing
ends its input, then kills its whole process group. The leader is reaped only then: until that
moment its pid, and so the number of its group, cannot belong to anybody else. What put itself into
a session of its own (an agent) lives on, as it does behind SSH.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from dsgd_cli.contract.errors import ConnectFailed, DeadlinePassed

STDERR_TAIL_BYTES = 8192
GRACE_S = 1.0  # for a program that is told by the end of its input
EXEC = 'exec "$@"'  # a missing program then looks as it does behind SSH: status 127


class LocalTransport:
    """Programs on this machine."""

    def __init__(self, host: str = "local") -> None:
        self.host = host
        self._lock = threading.Lock()
        self._streams: set[LocalStream] = set()

    def open(self, argv: Sequence[str]) -> LocalStream:
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", EXEC, "sh", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ConnectFailed(self.host, f"cannot start {argv[0]}: {error}") from error
        stream = LocalStream(self.host, child)
        with self._lock:
            self._streams = {stream for stream in self._streams if not stream.closed} | {stream}
        return stream

    def close(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            stream.close()


class LocalStream:
    """The pipes of one subprocess."""

    def __init__(self, host: str, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        self._host = host
        self._child = child
        self._stdin, self._stdout, self._stderr = child.stdin, child.stdout, child.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._reading, self._writing, self._closing = (threading.Lock() for _ in range(3))
        self._wake_read, self._wake_write = os.pipe()  # closing makes every poll return
        self._tail = b""
        self._status: int | None = None
        self.closed = False
        self._drain = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drain.start()

    def write(self, data: bytes, timeout_s: float = 30.0) -> None:
        rest = memoryview(data)
        with self._writing:
            while len(rest):
                if self.closed:
                    raise ConnectFailed(self._host, "the stream is closed")
                if not self._poll(self._stdin.fileno(), select.POLLOUT, timeout_s):
                    raise DeadlinePassed("sending", self._host, timeout_s)
                try:
                    rest = rest[os.write(self._stdin.fileno(), rest) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ConnectFailed(
                        self._host,
                        "the program at the other end takes no more input",
                        details=self.stderr_tail().splitlines()[-10:],
                    ) from error

    def read(self, max_bytes: int, timeout_s: float | None) -> bytes:
        with self._reading:
            if self.closed:
                return b""
            if not self._poll(self._stdout.fileno(), select.POLLIN, timeout_s):
                raise TimeoutError(f"{self._host}: nothing came for {timeout_s} s")
            return b"" if self.closed else os.read(self._stdout.fileno(), max_bytes)

    def stderr_tail(self) -> str:
        return self._tail.decode("utf-8", "replace")[-STDERR_TAIL_BYTES:]

    def wait(self, timeout_s: float) -> int:
        deadline, pause_s = time.monotonic() + timeout_s, 0.001
        while True:
            with self._closing:
                self._look()
            if self._status is not None:
                return self._status
            if time.monotonic() > deadline:
                raise DeadlinePassed("ending", self._host, timeout_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def close(self) -> None:
        """The program's input and output end, and soon it does, by itself or by KILL: what it holds
        for us, such as a lock, it can give back."""
        with self._closing:
            if self.closed:
                return
            self._look()
            self.closed = True
        os.close(self._wake_write)
        self._drain.join()
        with self._reading, self._writing:
            for pipe in (self._stdin, self._stdout, self._stderr):
                pipe.close()
            os.close(self._wake_read)
        self._await_end()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._status is None:
            self._status = self._child.returncode

    def _await_end(self) -> None:
        """The leader's end, without reaping it; not for long."""
        deadline, pause_s = time.monotonic() + GRACE_S, 0.0005
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)

    def _look(self) -> None:
        """Learn the exit status without reaping: the pid must stay ours until the group is dead."""
        if self._status is None and not self.closed:
            flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
            seen = os.waitid(os.P_PID, self._child.pid, flags)
            if seen is not None:
                exited = seen.si_code == os.CLD_EXITED
                self._status = seen.si_status if exited else -seen.si_status

    def _poll(self, descriptor: int, event: int, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._wake_read, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))))

    def _drain_stderr(self) -> None:
        while not self.closed:
            self._poll(self._stderr.fileno(), select.POLLIN, None)
            if self.closed:
                break
            part = os.read(self._stderr.fileno(), 65536)
            if not part:
                break
            self._tail = (self._tail + part)[-STDERR_TAIL_BYTES:]
