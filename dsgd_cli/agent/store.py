"""The files of a run directory that the agent alone writes. Readers see each as a whole.

What is known of the processes changes while they work, so a disk that is full must not end them:
it is kept here and written as soon as that is possible again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgd_cli.agent import names, paths, processes, runs
from dsgd_cli.agent.framing import Message, Refused

VERSION = 1
RETRY_S = 1.0


class Store:
    def __init__(self, run_dir: Path, note: Callable[[str], None]) -> None:
        self._run_dir, self._note = run_dir, note
        self._unsaved: Message | None = None
        self._retry_at = 0.0

    def begin(self, cluster: str, cluster_id: str, host: str, spec: Any) -> None:
        """Write all of them, or raise OSError: without them nobody could find us."""
        self._write("spec.json", spec)
        self._write("processes.json", {})
        self._agent(cluster, cluster_id, host)

    def _agent(self, cluster: str, cluster_id: str, host: str) -> None:
        self._write(
            "agent.json",
            {
                "pid": os.getpid(),
                "start_time": processes.start_time(os.getpid()),
                **runs.identity(),
                "cluster": cluster,
                "cluster_id": cluster_id,
                "host": host,
                "python": sys.executable,
                "agent_version": VERSION,
                "since": time.time(),
            },
        )

    def processes(self, found: Message, now_s: float) -> None:
        """Now, or when it becomes possible: the first failure of a row is told, and no other."""
        try:
            self._write("processes.json", found)
            self._unsaved = None
        except OSError as error:
            first, self._unsaved = self._unsaved is None, found
            self._retry_at = now_s + RETRY_S
            if first:
                why = error.strerror or str(error)
                self._note(f"cannot write to {self._run_dir}: {why}; it goes on, and tries again")

    def tick(self, now_s: float) -> None:
        """Try again, when it is time to."""
        if self._unsaved is not None and now_s >= self._retry_at:
            self.processes(self._unsaved, now_s)

    def put_secret(self, name: Any, text: Any) -> Message:
        if not isinstance(text, str):
            raise Refused("invalid", "a secret is text")
        paths.write_private(self._secret(name), text)
        return {}

    def secret(self, name: Any) -> str:
        try:
            return self._secret(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise Refused("missing", f"no secret {name} here") from None

    def _secret(self, name: Any) -> Path:
        return self._run_dir / names.checked(names.SECRET, name, "name of a secret")

    def _write(self, name: str, value: Any) -> None:
        paths.write_private(self._run_dir / name, json.dumps(value))
