"""What the tests of the agent share: a client of a bootstrap, one of an agent, and a child."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dsgd_cli.agent import payload, processes
from dsgd_cli.transport.base import Stream
from dsgd_cli.transport.local import LocalStream, LocalTransport

ID = "0123456789abcdef"
T = TypeVar("T")

# A daemon as small as it gets: ready, then BEHAVIOUR, then it echoes; EOF kills its group.
CHILD = """
import json, os, signal, socket, subprocess, sys, time
channel = socket.socket(fileno=int(os.environ["DSGD_AGENT_FD"]))
lines = channel.makefile("r")
def send(**message):
    channel.sendall((json.dumps(message) + "\\n").encode())
setup = json.loads(lines.readline())
exec(sys.argv[1])
send(type="ready", port=7, pid=os.getpid(), setup=setup)
for line in lines:
    message = json.loads(line)
    if message["type"] == "do":
        exec(message["code"])
    elif message["type"] == "stop":
        sys.exit(0)
    else:
        send(type="echo", got=message)
os.killpg(0, signal.SIGKILL)
"""


class Refusal(Exception):
    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.error = error
        self.kind = error["kind"]


def eventually(look: Callable[[], T], what: str = "", timeout_s: float = 15.0) -> T:
    """The first true value of `look`."""
    deadline = time.monotonic() + timeout_s
    while not (value := look()):
        assert time.monotonic() < deadline, f"never: {what or look}"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    found = processes.stat(pid)
    return found is not None and not found.dead


class Lines:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self._next_id = 0

    def line(self, timeout_s: float = 20.0) -> bytes:
        while b"\n" not in self.buffer:
            data = self.stream.read(1 << 20, timeout_s)
            if not data:
                raise EOFError(self.stream.stderr_tail())
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = self.stream.read(1 << 20, 20.0)
            assert data
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def ask(self, do: str, **arguments: Any) -> int:
        self._next_id += 1
        request = {"id": self._next_id, "do": do, **arguments}
        self.stream.write(json.dumps(request).encode() + b"\n")
        return self._next_id

    def reply(self, number: int, timeout_s: float = 20.0) -> dict[str, Any]:
        """The reply to a request; events that come first are kept."""
        while True:
            message: dict[str, Any] = json.loads(self.line(timeout_s))
            if "event" in message:
                self.events.append(message)
                continue
            assert message["id"] == number, message
            if "error" in message:
                raise Refusal(message["error"])
            ok: dict[str, Any] = message["ok"]
            return ok

    def call(self, do: str, timeout_s: float = 20.0, **arguments: Any) -> dict[str, Any]:
        return self.reply(self.ask(do, **arguments), timeout_s)

    def event(self, kind: str, timeout_s: float = 20.0, **fields: Any) -> dict[str, Any]:
        """The next event of that kind and those fields; what comes before it is forgotten."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == kind and fields.items() <= event.items():
                    return event
            message = json.loads(self.line(max(0.01, deadline - time.monotonic())))
            assert "event" in message, message
            self.events.append(message)

    def child(self, process: str, kind: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """The next message of that type from that process."""
        while True:
            event = self.event("child", timeout_s, process=process)
            message: dict[str, Any] = event["message"]
            if message["type"] == kind:
                return message

    def hang_up(self) -> None:
        """Only close its stdin: all that a host sees of a launcher that was killed."""
        assert isinstance(self.stream, LocalStream)
        self.stream._stdin.close()

    def kill(self) -> None:
        """KILL for the program and its group, as when its host's memory runs out."""
        assert isinstance(self.stream, LocalStream)
        os.killpg(self.stream._child.pid, signal.SIGKILL)
        assert self.stream.wait(5) == -signal.SIGKILL
        self.close()

    def close(self) -> None:
        self.stream.close()


class Host:
    """This machine with folders of its own, and all connections to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.transport = LocalTransport()

    def connect(self, python: str = sys.executable) -> Lines:
        lines = Lines(self.transport.open([python, "-I", "-u", "-c", payload.STUB]))
        lines.stream.write(payload.payload())
        while not (line := lines.line()).startswith(b"DSGD-READY "):
            assert line == b"", line
        return lines

    def run_dir(self, cluster: str = "lab") -> Path:
        from dsgd_cli.agent import paths

        return paths.run_dir(cluster)

    def start_agent(self, **more: Any) -> int:
        remote = self.connect()
        pid = start_agent(remote, **more)
        remote.close()
        return pid

    def attach(self, cluster: str = "lab", logs: bool = False) -> Lines:
        """A subscribed link to the agent."""
        return attach(self.connect(), cluster, logs)

    def agent(self, logs: bool = False, **more: Any) -> Lines:
        """A new agent and a link to it, over one connection."""
        remote = self.connect()
        start_agent(remote, **more)
        return attach(remote, "lab", logs)

    def members(self) -> list[int]:
        """Everything that carries a mark of our folders."""
        found = []
        for name in os.listdir("/proc"):  # noqa: PTH208
            if name.isdecimal():
                run_dir = processes.environment(int(name)).get(processes.RUN_DIR, "")
                if run_dir.startswith(f"{self.root}/"):
                    found.append(int(name))
        return found

    def close(self) -> None:
        self.transport.close()
        for _ in range(20):
            for pid in (found := self.members()):
                os.kill(pid, signal.SIGKILL)
            if not found:
                break
            time.sleep(0.02)


def start_agent(remote: Lines, **more: Any) -> int:
    request = {"cluster": "lab", "cluster_id": ID, "host": "here", "spec": {}, "lease_s": 60.0}
    pid: int = remote.call("start_agent", **{**request, **more})["pid"]
    return pid


def attach(remote: Lines, cluster: str, logs: bool) -> Lines:
    remote.call("attach", cluster=cluster)
    remote.call("subscribe", logs=logs)
    return remote


def start(link: Lines, process: str, behaviour: str = "", **more: Any) -> int:
    argv = [sys.executable, "-I", "-u", "-c", CHILD, behaviour]
    arguments = {"argv": argv, "env": {}, "setup": {"process": process}, "restart": False}
    pid: int = link.call("start", process=process, **{**arguments, **more})["pid"]
    return pid


def started(link: Lines, process: str, behaviour: str = "", **more: Any) -> int:
    """Start, and wait until it is ready."""
    pid = start(link, process, behaviour, **more)
    link.child(process, "ready")
    return pid
