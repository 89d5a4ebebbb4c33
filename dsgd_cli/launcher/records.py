"""Where the records of a run are written while it goes on.

Line by line: what was recorded is there for whoever looks, also when this process is killed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from dsgd_cli.launcher.remote import Message


class Records:
    """metrics.jsonl in the run's folder and, if wanted, a TensorBoard event file beside it."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._file = (folder / "metrics.jsonl").open("w", buffering=1)
        self._events = None
        if tensorboard:
            from dsgd_cli.reporting.tensorboard import EventFile

            self._events = EventFile(folder, time.time())

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def add(self, record: Message) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._events is not None:
            self._events.add(record, time.time())
