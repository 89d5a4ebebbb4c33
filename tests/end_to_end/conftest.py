"""The command line as a user has it: real processes, a home and a cluster name of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.agent import paths

REPOSITORY = Path(__file__).parents[2]


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; fails the test when there is none in time."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
    return value


@dataclass
class Member:
    """A process of a cluster, found by its environment."""

    pid: int
    process: str


@dataclass
class Run:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return next(line for line in reversed(self.lines) if line["type"] == "summary")


@dataclass
class User:
    """Somebody with a home, a working folder and a cluster."""

    folder: Path
    name: str
    env: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, text: str, name: str = "cluster.yaml") -> Path:
        path = self.folder / name
        path.write_text(text.replace("NAME", self.name))
        return path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsgd_cli", *arguments],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 60) -> Run:
        began = time.monotonic()
        out, err = process.communicate(timeout=timeout_s)
        return Run(process.returncode, out, err, time.monotonic() - began)

    def dsgd(self, *arguments: str, timeout_s: float = 60) -> Run:
        return self.finish(self.start(*arguments), timeout_s)

    def members(self) -> list[Member]:
        """All living processes whose environment names this cluster."""
        marker = f"DSGD_CLUSTER={self.name}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                names = (entry / "environ").read_bytes().split(b"\0")
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if marker in names and line != [b""]:
                words = [word.decode("utf-8", "replace") for word in line]
                daemon = next((w for w in words if w.split("/")[0] in ROLES), "agent")
                found.append(Member(int(entry.name), daemon))
        return found

    def pid_of(self, process: str) -> int | None:
        return next((m.pid for m in self.members() if m.process == process), None)

    def files_left(self) -> list[str]:
        """What a cluster may not leave behind (results and caches excepted)."""
        state = Path(self.env["XDG_STATE_HOME"]) / "dsgd" / "run"
        return [str(path) for path in state.glob("*")] if state.exists() else []

    def assert_nothing_left(self) -> None:
        assert self.members() == []
        assert self.files_left() == []

    def metrics(self, run_dir: str) -> list[dict[str, Any]]:
        text = (self.folder / run_dir / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


ROLES = ("coordinator", "server", "worker")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    folder = tmp_path / "work"
    folder.mkdir()
    name = f"t{os.getpid()}-{time.monotonic_ns() % 10**9}"
    env = {key: value for key, value in os.environ.items() if not key.startswith("DSGD_")}
    env |= {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "error",
        "NO_COLOR": "1",
    }
    somebody = User(folder, name, env)
    yield somebody
    for process in somebody.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for member in somebody.members():
        os.kill(member.pid, signal.SIGKILL)
    for run_dir in somebody.files_left():  # of a test that failed: an agent's socket is elsewhere
        paths.socket_path(Path(run_dir)).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others may have theirs there
        paths.socket_dir().rmdir()
