"""Events of the agents -> what they mean. A dead process is a value until it is a verdict here.

`Watch.next` hands out what the processes say, one message at a time; on the way it shows log lines,
notes restarts, and raises when a death ends the run: a server's, the coordinator's, or a worker's
that its agent has given up on. The first failure is the one that is raised.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DsgdError, ProcessDied, SpecError
from dsgd_cli.launcher.remote import Message

PROBE = "probe"
TAIL_LINES = 20
POLL_S = 0.5
LAST_WORDS = "failed: "  # how a daemon's own account of its end begins in its log


class Screen(Protocol):
    """What the launcher shows while it works (see `console`)."""

    def note(self, text: str) -> None: ...
    def waiting(self, text: str) -> None: ...
    def log_line(self, process: str, host: str, line: str, stream: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Said:
    """A message of one process; process "" is the launcher's own (an interrupt)."""

    host: str
    process: str
    message: Message


class Watch:
    """The events of a cluster, in the order in which they came."""

    def __init__(
        self, events: queue.SimpleQueue[tuple[str, Message]], screen: Screen, coordinator_host: str
    ) -> None:
        self._events = events
        self._screen = screen
        self._coordinator_host = coordinator_host
        self._failures: dict[str, Message] = {}
        self._probed = False
        self.ending = False  # deaths are expected now
        self.lost: set[str] = set()  # hosts whose connection is gone
        self._recent: dict[str, deque[str]] = {}

    def last_lines(self, process: str) -> list[str]:
        """What a process printed last."""
        return [f"  {line}" for line in self._recent.get(process, ())]

    def waiting(self, text: str) -> None:
        """Show what is waited for."""
        self._screen.waiting(text)

    def interrupt(self, why: str) -> None:
        """Hand the main loop an interrupt, in order with everything else.

        Called by a signal handler: a SimpleQueue's put may interrupt its own get.
        """
        self._events.put(("", {"event": "interrupt", "why": why}))

    def next(self, timeout_s: float) -> Said | None:
        """The next message, or None when there is none for `timeout_s`. Raises ProcessDied."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                host, event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            said = self._take(host, event)
            if said is not None:
                return said

    def _take(self, host: str, event: Message) -> Said | None:
        kind = event["event"]
        if kind == "child":
            return self._child(host, event["process"], event["message"])
        if kind == "interrupt":
            return Said("", "", event)
        if kind == "log":
            self._log(host, event)
        elif kind == "note":
            self._screen.note(f"{host}: {event['text']}")
        elif kind == "crashed":
            raise ProcessDied(
                f"{host}: its agent failed", details=str(event["traceback"]).splitlines()
            )
        elif kind == "skipped":
            line = f"... {event['lines']} lines skipped on screen (kept in file)"
            self._screen.log_line(event["process"], host, line, "stderr")
        elif kind == "started" and event.get("restarts"):
            self._screen.note(f"{event['process']}@{host} restarted ({event['restarts']}/5)")
        elif kind == "exited":
            self._exited(host, event)
        elif kind == "lapsed":
            raise ProcessDied(f"{host}: its agent heard nothing for a lease and stopped everything")
        elif kind == "lost":
            self._lost(host)
        return None

    def _log(self, host: str, event: Message) -> None:
        lines = self._recent.setdefault(event["process"], deque(maxlen=TAIL_LINES))
        lines.append(event["line"])
        if not event["line"].startswith(LAST_WORDS):  # they come again, as the error
            self._screen.log_line(event["process"], host, event["line"], event["stream"])

    def _child(self, host: str, process: str, message: Message) -> Said | None:
        if message.get("type") == "failed":
            self._failures[process] = message
        if process == PROBE and message.get("type") == "probed":
            self._probed = True
        return Said(host, process, message)

    def _lost(self, host: str) -> None:
        self.lost.add(host)
        if self.ending:
            return
        if host == self._coordinator_host:
            raise ProcessDied(
                f"{host}: the connection to the coordinator's host is lost",
                remedy="what runs there stops by itself when its lease ends",
            )
        self._screen.note(f"the connection to {host} is lost; the run goes on without its logs")

    def _exited(self, host: str, event: Message) -> None:
        process = event["process"]
        if self.ending or (process == PROBE and self._probed):
            return
        error = death(host, event, self._failures.pop(process, None))
        again = event.get("restart_in_s")
        if again is None:
            raise error
        self._screen.note(
            f"{error.message}; its agent restarts it in {again:g} s ({event['restarts'] + 1}/5)"
        )


def death(host: str, event: Message, failure: Message | None) -> DsgdError:
    """The error for an `exited` event and the process's own last words, if it had any."""
    where = f"{event['process']}@{host}"
    if failure is not None:
        return last_words(where, failure)
    details: list[str] = []
    if event.get("oom"):
        details.append("the kernel killed it because memory ran out")
    if event.get("tail"):
        details += ["its last lines:", *(f"  {line}" for line in event["tail"])]
    what = how_it_ended(event)
    return ProcessDied(f"{where} (pid {event.get('pid')}) failed: {what}", details=details)


def last_words(where: str, failure: Message) -> DsgdError:
    """The error for what a process said of its own failure: {error, traceback, kind}."""
    if failure.get("kind") == "spec":  # the description asked for what the model cannot do
        return SpecError(str(failure.get("error")))
    traceback = str(failure.get("traceback") or "").rstrip().splitlines()
    return ProcessDied(f"{where} failed: {failure.get('error')}", details=traceback)


def how_it_ended(event: Message) -> str:
    """`killed by SIGKILL` or `exit status 1`."""
    if event.get("signal"):
        return f"killed by {event['signal']}"
    return f"exit status {event.get('status')}"


def run_error(message: Message, hosts: Mapping[str, str]) -> DsgdError:
    """The error for the coordinator's report that a run cannot go on."""
    process = str(message.get("process") or names.COORDINATOR)
    return last_words(f"{process}@{hosts.get(process, '?')}", message)


def wait_for(
    watch: Watch,
    done: Callable[[Said], bool],
    timeout_s: float,
    question: str,
    late: Callable[[], DsgdError],
) -> None:
    """Read messages until `done` says so; raise `late()` when that takes too long."""
    began = time.monotonic()
    while True:
        said = watch.next(POLL_S)
        if said is not None and done(said):
            watch.waiting("")
            return
        seconds = time.monotonic() - began
        if seconds > timeout_s:
            raise late()
        if seconds > 1:
            watch.waiting(f"{question} {seconds:.0f}s/{timeout_s:.0f}s")
