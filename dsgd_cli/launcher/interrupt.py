"""Signals: the first asks for a clean stop, the second kills.

While `deliver` is set (during a run) the first signal is handed to it, and the run ends in order.
Otherwise the first signal raises `Interrupted` in the main thread, wherever that is. The second
always raises `Forced`. Ctrl-Z is refused: a stopped launcher would let the leases end.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from dsgd_cli.contract.errors import Interrupted

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGALRM: 124}
FORCED_CODE = 131


class Forced(BaseException):
    """A second signal: stop waiting, kill."""


class Interrupts:
    """A context manager that handles the signals while a command works on a cluster."""

    def __init__(self, note: Callable[[str], None], timeout_s: float | None = None) -> None:
        self.code: int | None = None
        self.deliver: Callable[[str], None] | None = None
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM and self.code is not None:
            return  # already stopping
        if self.code is not None:
            self.code = FORCED_CODE
            raise Forced
        self.code = CODES[signal.Signals(number)]
        self._first()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the first signal back until the block has ended."""
        pending: list[str] = []
        before, self.deliver = self.deliver, pending.append
        try:
            yield
        finally:
            self.deliver = before
        if pending:
            self._first()

    def _first(self) -> None:
        assert self.code is not None
        if self.deliver is not None:
            self.deliver(self.reason)
        else:
            raise Interrupted(f"stopped by {self.reason}", self.code)

    @property
    def reason(self) -> str:
        """What stopped us, in words."""
        words = {130: "Ctrl-C", 143: "SIGTERM", 129: "SIGHUP", 124: "--timeout", 131: "Ctrl-C"}
        return words[self.code or 130]

    def _refuse(self, number: int, frame: FrameType | None) -> None:
        self._note("Ctrl-Z is refused: the hosts would stop a launcher that is silent")
