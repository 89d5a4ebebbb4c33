"""Reading the events of a run until it ends: progress to the screen, records to a file."""

from __future__ import annotations

import time
from typing import Protocol

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import ProcessDied
from dsgd_cli.launcher.records import Records
from dsgd_cli.launcher.remote import Message
from dsgd_cli.launcher.result import Result
from dsgd_cli.launcher.running import Running
from dsgd_cli.launcher.start import unreachable
from dsgd_cli.launcher.watch import Said, Screen, run_error

STOP_TIMEOUT_S = 15.0  # from Ctrl-C to the end of the run; the coordinator needs less
TELL_TIMEOUT_S = 3.0
SILENCE_S = 12.0  # the coordinator says something at least every 2 s


class TrainScreen(Screen, Protocol):
    """What a training shows."""

    def progress(self, message: Message) -> None: ...
    def record(self, record: Message) -> None: ...
    def progress_ends(self) -> None: ...


def follow(running: Running, result: Result, screen: TrainScreen, records: Records) -> Message:
    """The run's `finished` message. Raises what ended the run before that."""
    stop_by: float | None = None
    heard_at = time.monotonic()
    while True:
        said = running.watch.next(0.5)
        now = time.monotonic()
        if stop_by is not None and now > stop_by:
            raise ProcessDied(f"the run did not stop within {STOP_TIMEOUT_S:g} s")
        if now - heard_at > SILENCE_S:
            raise ProcessDied(
                f"{names.COORDINATOR}@{running.cluster.coordinator_host} "
                f"has said nothing for {SILENCE_S:g} s"
            )
        if said is None:
            continue
        if said.message.get("event") == "interrupt":
            why = str(said.message["why"])
            screen.note(f"{why}: stopping {running.cluster.spec.name} (again = kill now)")
            finish = {"type": "finish", "why": why}
            running.tell(names.COORDINATOR, finish, timeout_s=TELL_TIMEOUT_S)
            stop_by = now + STOP_TIMEOUT_S
        elif said.process == names.COORDINATOR:
            heard_at = now
            if (finished := _heard(running, result, screen, records, said)) is not None:
                return finished


def _heard(
    running: Running, result: Result, screen: TrainScreen, records: Records, said: Said
) -> Message | None:
    """One message of the coordinator; the last one is returned."""
    message, kind = said.message, said.message.get("type")
    if kind == "progress":
        result.last_progress = message
        screen.progress(message)
    elif kind == "record":
        records.add(message["record"])
        screen.record(message["record"])
    elif kind == "unreachable":
        raise ProcessDied(unreachable(message, running.host_of).message)
    elif kind == "run_error":  # `finished` follows, with what there is to bring home
        result.error = run_error(message, running.host_of)
    elif kind == "finished":
        return message
    return None
