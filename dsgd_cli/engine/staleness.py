"""What a push is worth that comes late: dropped, damped, or as good as any.

A push is τ late when others have pushed τ times since the fetch that its gradient was computed
with. A shard measures that once, at its first block, and treats all of its blocks alike. Pure; the
caller sees to it that first blocks are measured one at a time.

Damping by `inverse` is that of Zhang et al., "Staleness-aware Async-SGD for Distributed Deep
Learning", 2016, equation 2; `relative` leaves the usual push alone and damps only those that are
later than the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MEMORY = 0.05  # of the mean: the weight of the newest push


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one push. `factor`: what its learning rate is multiplied by."""

    late: int = 0
    dropped: bool = False
    factor: float = 1.0


class Staleness:
    """Verdicts on the newest push of each worker."""

    def __init__(self, most: int | None = None, damping: str = "none") -> None:
        self._most = most
        self._damping = damping
        self._mean = 0.0
        self._verdicts: dict[int, tuple[tuple[int, int], Verdict]] = {}

    @property
    def matters(self) -> bool:
        """Whether anything follows from being late."""
        return self._most is not None or self._damping != "none"

    def judge(self, worker: int, push: tuple[int, int], late: Callable[[], int]) -> Verdict:
        """The verdict on `push`, which is (incarnation, seq); `late` is asked once for it."""
        known = self._verdicts.get(worker)
        if known is None or known[0] != push:
            known = (push, self._verdict(max(0, late())))
            self._verdicts[worker] = known
        return known[1]

    def dropped(self, worker: int, push: tuple[int, int]) -> bool:
        """Whether this, the worker's newest push, was dropped."""
        known = self._verdicts.get(worker)
        return known is not None and known[0] == push and known[1].dropped

    def _verdict(self, late: int) -> Verdict:
        if self._most is not None and late > self._most:
            return Verdict(late, dropped=True, factor=0.0)
        self._mean += MEMORY * (late - self._mean)
        if self._damping == "inverse":
            return Verdict(late, factor=1.0 / max(1, late))
        if self._damping == "relative":
            return Verdict(late, factor=min(1.0, (self._mean + 1.0) / (late + 1.0)))
        return Verdict(late)
