"""Downpour SGD, the worker's half: when to push the gradients summed so far, and when to pull.

Source: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, section 4.1 and
algorithm 1.1 of the appendix: a replica adds each minibatch's gradient to an accrued sum, sends
the sum every n_push steps and starts it anew, and asks for the parameters every n_fetch steps.

What differs from the paper: counts run from the last push or fetch instead of from the first step;
the sum is also sent when a task ends, so that a task that ended is in the parameters as a whole; a
gradient that is not finite is left out of the sum. As in the paper pushes and fetches go on while
the next gradient is computed, but never more than one exchange: a gradient is of parameters that
lack at most this replica's last push. The replica's own steps between two fetches (the paper's
w -= α·g) are the loop's (`daemons.streams`), and are done again on what a fetch has brought, for
the gradients that it cannot contain. The optimizer (Adagrad in the paper) is the server's, and sees
the sum as one gradient.

Pure bookkeeping: the caller owns the buffers and does what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What the worker does before it computes the next gradient."""

    NOTHING = "nothing"
    PUSH = "push"
    PULL = "pull"
    PUSH_PULL = "push_pull"


@dataclass(slots=True)
class Downpour:
    """Counts since the last push and the last fetch. The worker has just pulled when it begins."""

    push_every: int = 1
    fetch_every: int = 1
    summed: int = 0  # gradients in the sum: not pushed yet
    pushed: int = 0  # gradients in the newest push
    _since_push: int = 0
    _since_fetch: int = 0

    @property
    def fresh(self) -> bool:
        """The next gradient begins a new sum: it may be written straight into the push buffer."""
        return self.summed == 0

    @property
    def skipped(self) -> bool:
        """After a gradient: a push was due, and there was nothing to send."""
        return self._since_push == 0 and self.pushed == 0

    def after_gradient(self, finite: bool = True, ends: bool = False) -> Action:
        """A gradient was computed and, if finite, is now in the sum. `ends`: so does the task."""
        self.summed += finite
        self._since_push += 1
        self._since_fetch += 1
        pull = self._since_fetch >= self.fetch_every
        due = ends or self._since_push >= self.push_every
        push = due and self.summed > 0
        if pull:
            self._since_fetch = 0
        if due:
            self._sent()
        return _action(push, pull)

    def flush(self) -> Action:
        """The worker is drained: nothing may stay behind."""
        push = self.summed > 0
        self._sent()
        return _action(push, pull=False)

    def pulled(self) -> None:
        """The worker pulled for another reason (a start, an evaluation)."""
        self._since_fetch = 0

    def _sent(self) -> None:
        self.pushed = self.summed
        self.summed = 0
        self._since_push = 0


def _action(push: bool, pull: bool) -> Action:
    if push:
        return Action.PUSH_PULL if pull else Action.PUSH
    return Action.PULL if pull else Action.NOTHING
