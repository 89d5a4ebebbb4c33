"""The workers that are alive, as the run's state machine sees them.

At most one incarnation of a worker is a member. An incarnation is a member once: numbers only
grow, so whatever comes late from an older one finds nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dsgd_cli.engine.convergence import Streak


class MemberState(Enum):
    """PREPARING → PREPARED → STARTED; a lost worker is no member any more."""

    PREPARING = "preparing"  # loads model and data
    PREPARED = "prepared"  # waits for parameters
    STARTED = "started"  # may be given tasks and evaluations


@dataclass(slots=True)
class Member:
    """One living incarnation of a worker."""

    worker: int
    incarnation: int
    state: MemberState = MemberState.PREPARING
    touched: bool = False  # it may have written to shards, so it is fenced when it is lost
    turn: int = 0  # when it was given its last task or evaluation: the longest without is first
    steps: int = 0
    moved_s: float = 0.0  # when it last did something, or had nothing to do
    streak: Streak = field(init=False)

    def __post_init__(self) -> None:
        self.streak = Streak(self.worker)


@dataclass(slots=True)
class Members:
    """The living, by worker number."""

    _living: dict[int, Member] = field(default_factory=dict)
    _newest: dict[int, int] = field(default_factory=dict)
    _turns: int = 0

    def admit(self, worker: int, incarnation: int) -> Member | None:
        """A new incarnation; None when it is not newer than all that were seen."""
        if incarnation <= self._newest.get(worker, -1):
            return None
        self._newest[worker] = incarnation
        self._living[worker] = Member(worker, incarnation)
        return self._living[worker]

    def living(self, worker: int, incarnation: int | None = None) -> Member | None:
        """The member, if it lives and is that incarnation (None: whichever)."""
        member = self._living.get(worker)
        if member is None or incarnation in (None, member.incarnation):
            return member
        return None

    def remove(self, member: Member) -> None:
        del self._living[member.worker]

    def every(self) -> list[Member]:
        return [self._living[worker] for worker in sorted(self._living)]

    def who(self, state: MemberState) -> list[Member]:
        return [member for member in self.every() if member.state is state]

    def take_turn(self, member: Member) -> None:
        self._turns += 1
        member.turn = self._turns
