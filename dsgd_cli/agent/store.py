"""The files of a run directory that the agent alone writes. Readers see each as a whole."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dsgd_cli.agent import names, paths, processes
from dsgd_cli.agent.framing import Message, Refused

VERSION = 1


class Store:
    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def agent(self, cluster: str, cluster_id: str, host: str) -> None:
        self._write(
            "agent.json",
            {
                "pid": os.getpid(),
                "start_time": processes.start_time(os.getpid()),
                "boot_id": processes.boot_id(),
                "cluster": cluster,
                "cluster_id": cluster_id,
                "host": host,
                "python": sys.executable,
                "agent_version": VERSION,
                "since": time.time(),
            },
        )

    def processes(self, found: Message) -> None:
        self._write("processes.json", found)

    def spec(self, spec: Any) -> Message:
        self._write("spec.json", spec)
        return {}

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
