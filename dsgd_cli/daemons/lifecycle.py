"""How a daemon lives and dies: its line to the agent, its setup, its signals.

The line is a socketpair (its number in DSGD_AGENT_FD) with one JSON object per line both ways. Two
threads serve it, so that it works whatever the daemon does. When the agent's end closes, the
daemon kills its own process group: nothing of a cluster outlives its agent. SIGTERM means: leave,
with status 0.
Standard library only, so that a process is ready before it has imported anything heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

MAX_LINE_BYTES = 64 << 20
SETUP_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 2.0

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the agent says first. `tls` holds PEM texts, never to be printed."""

    process: str
    cluster: str
    cluster_id: str
    bind: str
    tls: Mapping[str, str]
    results: str

    def __repr__(self) -> str:
        return f"Setup({self.process} of {self.cluster}/{self.cluster_id})"

    @classmethod
    def of(cls, message: Message) -> Setup:
        return cls(
            process=message["process"],
            cluster=message["cluster"],
            cluster_id=message["cluster_id"],
            bind=message["bind"],
            tls=message["tls"],
            results=message.get("results", ""),
        )


class Line:
    """The daemon's end of the socketpair. `send` never blocks; `receive` is for one thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._listener: Callable[[Message], None] | None = None
        self._lock = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="agent-out", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="agent-in", daemon=True).start()

    @classmethod
    def of_environment(cls) -> Line:
        """The one that the agent passed on; children of this process do not inherit it."""
        fd = int(os.environ.pop("DSGD_AGENT_FD"))
        end = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        return cls(end)

    def send(self, message: Message) -> None:
        self._outgoing.put(json.dumps(message, allow_nan=False).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. Raises queue.Empty."""
        return self._incoming.get(timeout=timeout_s)

    def listen(self, listener: Callable[[Message], None]) -> None:
        """From now on hands each message to `listener`, on the reading thread."""
        with self._lock:
            self._listener = listener
            with contextlib.suppress(queue.Empty):
                while True:
                    listener(self._incoming.get_nowait())

    def flush(self) -> None:
        """Waits, bounded, until what was sent has left; the line is closed for sending."""
        self._outgoing.put(None)
        self._writer.join(FLUSH_TIMEOUT_S)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader sees the same end
            for data in iter(self._outgoing.get, None):
                self._end.sendall(data)

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError), self._end.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES):
                    self._deliver(json.loads(line))
        finally:
            kill_group()

    def _deliver(self, message: Message) -> None:
        if message.get("type") == "stop":
            leave(self, 0)
        if message.get("type") == "usage":
            self.send(usage())
            return
        with self._lock:
            if self._listener is None:
                self._incoming.put(message)
            else:
                self._listener(message)


def usage() -> Message:
    """What this process has used up to now, to whoever asks."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE")
    return {"type": "usage", "cpu_s": time.process_time(), "memory_bytes": memory}


def kill_group() -> NoReturn:
    """The agent is gone: so is everything that it started here."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def leave(line: Line, status: int) -> NoReturn:
    """Ends this process now, from any thread, after the last messages are out."""
    line.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # user code may have replaced it
            stream.flush()
    os._exit(status)


def fail(line: Line, error: str, kind: str, details: str = "") -> NoReturn:
    """Says why, and ends this process with status 1."""
    with contextlib.suppress(Exception):  # user code may have closed it
        print(f"failed: {error}", file=sys.stderr, flush=True)
    line.send({"type": "failed", "error": error, "traceback": details, "kind": kind})
    leave(line, 1)


def leave_on_term(line: Line) -> None:
    """SIGTERM ends the process at once, even while its main thread waits or is in C code.

    Python runs handlers on the main thread, when that gets to it; the wakeup fd is written by the
    signal itself, and a thread of ours reads it.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        with theirs:  # kept open
            while received := ours.recv(1):
                if received[0] == signal.SIGTERM:
                    leave(line, 0)

    signal.signal(signal.SIGTERM, _nothing)
    threading.Thread(target=wait, name="signals", daemon=True).start()


def _nothing(signum: int, frame: FrameType | None) -> None:
    """A handler must exist for the wakeup fd to be written."""


def live(role: Callable[[Line, Message], None]) -> NoReturn:
    """The life of a daemon: first message, the role until it returns, and a last word."""
    line = Line.of_environment()
    leave_on_term(line)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business
    try:
        first = line.receive(SETUP_TIMEOUT_S)
        if first.get("type") != "setup":
            raise ValueError(f"expected the setup, got {first.get('type')!r}")
        role(line, first)
    except queue.Empty:
        fail(line, f"no setup within {SETUP_TIMEOUT_S:g} s", "internal")
    except BaseException as error:
        kind = getattr(error, "kind", "internal")
        fail(line, one_sentence(error), kind, traceback.format_exc())
    leave(line, 0)


def one_sentence(error: BaseException) -> str:
    """`ValueError: text`; an error of dsgd is its own text."""
    if type(error).__module__.startswith("dsgd_cli."):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def private_folder(path: str | Path) -> Path:
    """The folder, made if it is missing, for this user alone."""
    folder = Path(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
