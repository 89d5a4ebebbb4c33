"""When the held-out set is evaluated next: every so many epochs, steps or seconds.

Whoever comes late skips: the next evaluation is due at the first multiple after the newest state,
not at each of the multiples that went by, so tiny epochs never queue up behind the evaluator.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsgd_cli.engine.events import Every


@dataclass(slots=True)
class Schedule:
    """`due` until `taken` says that an evaluation of this state was begun."""

    every: Every
    _periods: int = 0  # whole periods that have been evaluated
    _before: int = 0

    def due(self, *, epochs: int, steps: int, elapsed_s: float) -> bool:
        return self._whole(epochs, steps, elapsed_s) > self._periods

    def taken(self, *, epochs: int, steps: int, elapsed_s: float) -> None:
        self._before, self._periods = self._periods, self._whole(epochs, steps, elapsed_s)

    def again(self) -> None:
        """The evaluation that was begun last will never be answered."""
        self._periods = self._before

    def _whole(self, epochs: int, steps: int, elapsed_s: float) -> int:
        reached = {"epoch": float(epochs), "step": float(steps), "s": elapsed_s}
        return int(reached[self.every.unit] // self.every.count)
