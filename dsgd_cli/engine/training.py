"""The run as a state machine: events in, decisions out, time as an argument."""

from __future__ import annotations

from dsgd_cli.engine.events import Decision, Event, Settings


class Training:
    """One run, from the first worker that joins to `Finish`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def on(self, event: Event, now_s: float) -> list[Decision]:
        """Take one event, return what to do now."""
        raise NotImplementedError
