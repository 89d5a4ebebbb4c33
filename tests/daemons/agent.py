"""Plays the agent for real daemons: starts them, speaks over the socketpair, kills them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsgd_cli.contract.spec import Train
from dsgd_cli.launcher.identity import Authority, make_authority, new_cluster_id

MAIN = Path(__file__).parents[2] / "dsgd_cli" / "daemons" / "__main__.py"
TIMEOUT_S = 60.0

Message = dict[str, Any]


class Child:
    """One daemon and everything that it has said."""

    def __init__(self, process: str, setup: Message, env: Mapping[str, str] | None = None) -> None:
        self.process = process
        self.messages: list[Message] = []
        self._changed = threading.Condition()
        self._ended = False
        ours, theirs = socket.socketpair()
        self._end = ours
        self.log = Path(setup["results"]) / f"{process.replace('/', '-')}.log"
        with theirs, self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-I", str(MAIN), process, setup.get("cluster", "test")],
                cwd=self.log.parent,  # as in its run directory
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "DSGD_AGENT_FD": str(theirs.fileno()),
                    **(env or {}),
                },
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(setup)

    def tell(self, message: Message) -> None:
        self._end.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._end.makefile("rb") as lines:
            for line in lines:
                with self._changed:
                    self.messages.append({**json.loads(line), "at_s": time.monotonic()})
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(
        self,
        kind: str,
        timeout_s: float = TIMEOUT_S,
        where: Callable[[Message], bool] = lambda _: True,
        after: int = 0,
    ) -> Message:
        """The first such message, past or future (`after`: not among the first ones)."""

        def found() -> list[Message]:
            return [m for m in self.messages[after:] if m["type"] == kind and where(m)]

        with self._changed:
            if self._changed.wait_for(lambda: found() or self._ended, timeout_s) and found():
                return found()[0]
            raise AssertionError(
                f"{self.process} did not say {kind!r} within {timeout_s} s; it said "
                f"{self.messages[-5:]}; its log ends with\n{self.tail()}"
            )

    def all(self, kind: str) -> list[Message]:
        with self._changed:
            return [message for message in self.messages if message["type"] == kind]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """SIGKILL to its group; idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._end.close()

    def hang_up(self) -> None:
        """As if the agent had died."""
        self._end.shutdown(socket.SHUT_RDWR)


class Cluster:
    """Daemons of one cluster on this machine."""

    def __init__(self, folder: Path, servers: int, workers: int) -> None:
        self.folder = folder
        self.servers = servers
        self.workers = workers
        self.cluster_id = new_cluster_id()
        self.authority: Authority = make_authority(self.cluster_id)
        self.children: dict[str, Child] = {}  # the newest of each name
        self._all: list[Child] = []
        self.runs = 0
        self._files: Message = {"type": "files", "model": None, "data": None}

    def start(
        self,
        process: str,
        authority: Authority | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        tls = (authority or self.authority).issue(process)
        child = Child(process, self.setup(process, tls), env)
        self.children[process] = child
        self._all.append(child)
        return child

    def setup(self, process: str, tls: Mapping[str, str]) -> Message:
        return {
            "type": "setup",
            "process": process,
            "cluster": "test",
            "cluster_id": self.cluster_id,
            "bind": "127.0.0.1",
            "advertise": "127.0.0.1",
            "tls": dict(tls),
            "results": str(self.folder),
            "workers": self.workers,
        }

    @property
    def coordinator(self) -> Child:
        return self.children["coordinator/0"]

    def address(self, process: str) -> str:
        return f"127.0.0.1:{self.children[process].wait_for('ready')['port']}"

    def form(self) -> None:
        """Everything started, all ready, all connected."""
        names = ["coordinator/0"]
        names += [f"server/{i}" for i in range(self.servers)]
        names += [f"worker/{i}" for i in range(self.workers)]
        for name in names:
            self.start(name)
        self.announce()
        for index in range(self.workers):
            self.join(index)
        self.coordinator.wait_for("formed")

    def announce(self) -> None:
        addresses = [self.address(f"server/{i}") for i in range(self.servers)]
        message = {"type": "cluster", "servers": addresses, "workers": self.workers}
        self.coordinator.tell(message)

    def join(self, worker: int) -> None:
        message = {"type": "join", "coordinator": self.address("coordinator/0")}
        self.children[f"worker/{worker}"].tell(message)

    def restart(self, worker: int) -> Child:
        """What an agent does: the messages to be kept are said again."""
        child = self.start(f"worker/{worker}")
        self.join(worker)
        child.tell(self._files)
        return child

    def run(self, train: Mapping[str, Any], **more: Any) -> str:
        """Gives the order; the files are where the `train` section says."""
        self.runs += 1
        spec = Train.model_validate(train).model_dump(mode="json")
        run_id = f"run-{self.runs}"
        self._files |= {what: spec[what]["path"] or None for what in ("model", "data")}
        self._files["run_id"] = run_id
        for name, child in self.children.items():
            if name.startswith("worker"):
                child.tell(self._files)
        order = {"type": "run", "run_id": run_id, "seed": 0, "train": spec}
        self.coordinator.tell({**order, "workers": self.workers, **more})
        return run_id

    def finished(self, run_id: str, timeout_s: float = TIMEOUT_S) -> Message:
        return self.coordinator.wait_for(
            "finished", timeout_s, where=lambda message: message["run_id"] == run_id
        )

    def records(self, kind: str) -> list[Message]:
        records = [message["record"] for message in self.coordinator.all("record")]
        return [record for record in records if record["kind"] == kind]

    def close(self) -> None:
        for child in self._all:
            child.kill()


@contextlib.contextmanager
def cluster(
    folder: Path, servers: int = 2, workers: int = 2, form: bool = True
) -> Iterator[Cluster]:
    made = Cluster(folder, servers, workers)
    try:
        if form:
            made.form()
        yield made
    finally:
        made.close()
