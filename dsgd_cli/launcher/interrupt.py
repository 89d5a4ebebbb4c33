"""Signals: the first asks for a clean stop, the second kills, later ones change nothing.

The first signal raises `Interrupted` in the main thread, wherever that is, unless somebody takes
it: `deliver` (the run's loop, which then ends the run in order), `held` (a few seconds in which an
interruption would lose track of something) or `noted` (we are finishing anyway). The second raises
`Forced`. Ctrl-Z is refused: a stopped launcher would let the leases end.

Handlers run between two instructions of the main thread: what they call must not wait for a lock
that the main thread may hold.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from dsgd_cli.contract.errors import Interrupted

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGALRM: 124}
REASONS = {130: "Ctrl-C", 143: "SIGTERM", 129: "SIGHUP", 124: "--timeout"}
FORCED_CODE = 131


class Forced(BaseException):
    """A second signal: stop waiting, kill."""


class Interrupts:
    """A context manager that handles the signals while a command works on a cluster."""

    def __init__(self, note: Callable[[str], None], timeout_s: float | None = None) -> None:
        self.code: int | None = None  # the exit code of the first signal, once there was one
        self.deliver: Callable[[str], None] | None = None
        self._forced = False
        self._note = note
        self._timeout_s = timeout_s
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in CODES:
            self._before[number] = signal.signal(number, self._handle)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._refuse)
        if self._timeout_s is not None:
            signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str:
        """What stopped us, in words."""
        return REASONS[self.code or 130]

    def error(self) -> Interrupted:
        """The error of the first signal."""
        return Interrupted(f"stopped by {self.reason}", self.code or 130)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the first signal back until the block has ended."""
        pending: list[str] = []

        def hold(reason: str) -> None:
            pending.append(reason)
            self._note(f"{reason}: stopping in a moment (again = kill now)")

        with self._delivering(hold):
            yield
        if pending:
            self._first()

    @contextmanager
    def noted(self, doing: str) -> Iterator[None]:
        """The first signal is only noted: the block does what it would ask for."""
        with self._delivering(lambda reason: self._note(f"{reason}: {doing} (again = kill now)")):
            yield

    @contextmanager
    def _delivering(self, deliver: Callable[[str], None]) -> Iterator[None]:
        before, self.deliver = self.deliver, deliver
        try:
            yield
        finally:
            self.deliver = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._forced or (number == signal.SIGALRM and self.code is not None):
            return
        if self.code is not None:
            self._forced = True
            raise Forced
        self.code = CODES[signal.Signals(number)]
        self._first()

    def _first(self) -> None:
        if self.deliver is not None:
            self.deliver(self.reason)
        else:
            raise self.error()

    def _refuse(self, number: int, frame: FrameType | None) -> None:
        self._note("Ctrl-Z is refused: the hosts would stop a launcher that is silent")
