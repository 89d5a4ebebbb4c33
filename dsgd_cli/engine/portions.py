"""Who computes which part of one pass over all examples, with help for stragglers at the end.

Source: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, section 4.2: portions
are much smaller than a worker's share, so that fast workers do more of them, and near the end of a
pass the portions that are still out are given to a second worker; the first copy to be done counts.

Invariant: a portion is free, out (with one or two workers), or done; once done it stays done. A
worker gets what follows on its last portion where that is free: it has those examples at hand. This
module knows workers by number only and no clock but the one that it is told.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import pairwise

COPIES = 2  # of a portion at a time
LATE = 1.5  # times the median: then a portion may be given out again


@dataclass(slots=True)
class _Portion:
    start: int
    stop: int
    out: dict[int, float] = field(default_factory=dict)  # worker -> since when


class Portions:
    """Of one pass. Portions are numbered from 0 in the order of the examples."""

    def __init__(self, examples: int, count: int) -> None:
        count = min(count, examples)
        ends = [examples * part // count for part in range(count + 1)]
        self._portions = [_Portion(start, stop) for start, stop in pairwise(ends)]
        self._last: dict[int, int] = {}  # worker -> its newest portion
        self._open = dict(enumerate(self._portions))  # those that are not done
        self._took_s: list[float] = []  # in order

    @property
    def count(self) -> int:
        return len(self._portions)

    @property
    def complete(self) -> bool:
        return not self._open

    def bounds(self, portion: int) -> tuple[int, int]:
        """Its examples [start, stop)."""
        return self._portions[portion].start, self._portions[portion].stop

    def free(self) -> int:
        """How many nobody has."""
        return sum(not portion.out for portion in self._open.values())

    def next(self, worker: int, now_s: float) -> int | None:
        """Hands a portion out: a free one, or a copy of one that is late; None: nothing to do."""
        found = self._free_for(worker)
        if found is None:
            found = self._late_for(worker, now_s)
        if found is not None:
            self._portions[found].out[worker] = now_s
            self._last[worker] = found
        return found

    def done(self, worker: int, portion: int, now_s: float) -> tuple[bool, tuple[int, ...]]:
        """(whether this copy is the one that counts, the workers whose copies do not)."""
        item = self._portions[portion]
        since_s = item.out.pop(worker, None)
        if portion not in self._open:
            return False, ()
        if since_s is not None:
            insort(self._took_s, now_s - since_s)
        del self._open[portion]
        return True, tuple(item.out)

    def leave(self, worker: int) -> None:
        """The worker is gone: what it had, and nobody else has, is free."""
        for portion in self._open.values():
            portion.out.pop(worker, None)
        self._last.pop(worker, None)

    def _free_for(self, worker: int) -> int | None:
        free = [number for number, item in self._open.items() if not item.out]
        if not free:
            return None
        follows = self._last.get(worker, -2) + 1
        if follows in free:
            return follows
        if worker in self._last:
            return free[0]
        return self._fresh_start(free)

    def _fresh_start(self, free: list[int]) -> int:
        """Where a newcomer begins: in the middle of the longest free stretch, or at its front if
        that is the beginning of all."""
        best, start, length = (0, free[0]), free[0], 0
        for number in free:
            start, length = (start, length + 1) if number == start + length else (number, 1)
            best = max(best, (length, start), key=lambda stretch: (stretch[0], -stretch[1]))
        length, start = best
        return start if start == 0 else start + length // 2

    def _late_for(self, worker: int, now_s: float) -> int | None:
        """The portion that is out for longest, if that is too long; never the worker's own."""
        if not self._took_s:
            return None
        bound_s = LATE * self._took_s[len(self._took_s) // 2]
        late = [
            (now_s - min(item.out.values()), -number)
            for number, item in self._open.items()
            if item.out and worker not in item.out and len(item.out) < COPIES
        ]
        longest_s, number = max(late, default=(0.0, 0))
        return -number if late and longest_s > bound_s else None
