"""What an algorithm decides for the run (`engine.training`): the coordinator's half.

While the run is in TRAINING, a strategy hands out work and hears what became of it; everything
around that (who lives, evaluations, limits, the end) is the run's. A strategy is a state machine
like the run itself: it is told what happened and returns decisions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dsgd_cli.engine.events import Answered, Decision, FromStrategyWorker, Report
from dsgd_cli.engine.members import Member
from dsgd_cli.engine.tasks import EpochRecord, Remainder

Left = tuple[Remainder, ...]  # what a lost worker held: nobody's until every shard has fenced it


@dataclass(frozen=True, slots=True)
class Reached:
    """How far the run is. `max_steps`: where it ends, if that is set."""

    now_s: float
    elapsed_s: float
    steps: int
    epochs: int
    max_steps: int | None = None


@dataclass(slots=True, eq=False)
class Strategy(ABC):
    """One run's algorithm. Workers are known by number; each of them joins before all else.

    What is the same for most algorithms is here.
    """

    _away: set[int] = field(init=False, default_factory=set)
    _complete: list[EpochRecord] = field(init=False, default_factory=list)
    _steps: int = field(init=False, default=0)

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Complete passes over the examples."""

    @property
    def stands_still(self) -> bool:
        """Whether nothing may be done while the parameters are evaluated."""
        return False

    @property
    def rests(self) -> bool:
        """Whether the parameters are ones that may be evaluated and exported."""
        return True

    @abstractmethod
    def join(self, worker: int) -> None:
        """It has pulled, and may be given work."""

    @abstractmethod
    def leave(self, worker: int) -> Left:
        """It is gone."""

    @abstractmethod
    def put_back(self, left: Left) -> None:
        """Every shard has fenced the one who held this."""

    @abstractmethod
    def withdraw(self, worker: int) -> None:
        """It has drained: it holds nothing any more, and pushes nothing."""

    def away(self, worker: int) -> None:
        """It is given an evaluation: it will come back to its work later."""
        self._away.add(worker)

    def back(self, worker: int) -> None:
        """It has answered, or it has drained and will not."""
        self._away.discard(worker)

    @abstractmethod
    def expects(self, worker: int) -> bool:
        """Whether it should be getting on with something now."""

    def lags(self, worker: int) -> bool:
        """Whether somebody else has done its work, and it may still be busy with that."""
        return False

    @abstractmethod
    def batch_s(self, worker: int) -> float | None:
        """What a batch usually takes it, if that is known."""

    @abstractmethod
    def epoch_of(self, report: Report) -> int | None:
        """The epoch of what is reported; None: it is nothing that this worker holds."""

    @abstractmethod
    def report(self, report: Report, now_s: float) -> None:
        """Takes what a worker has done."""

    @abstractmethod
    def take(self, event: FromStrategyWorker | Answered, now_s: float) -> None:
        """Takes an event that only some algorithms have."""

    def complete(self) -> list[EpochRecord]:
        """The epochs that have been completed since the last call."""
        complete, self._complete = self._complete, []
        return complete

    def steps(self) -> int:
        """Steps taken since the last call."""
        steps, self._steps = self._steps, 0
        return steps

    @abstractmethod
    def work(self, members: Sequence[Member], reached: Reached) -> Iterator[Decision]:
        """What to do now; each decision is carried out before the next is asked for."""

    def end(self) -> Iterator[Decision]:
        """TRAINING ends, perhaps to begin again: nothing is handed out, and what is under way
        must not change the parameters after what is decided here."""
        yield from ()

    def over(self) -> str | None:
        """Why the algorithm itself has nothing left to do; None: it has."""
        return None
