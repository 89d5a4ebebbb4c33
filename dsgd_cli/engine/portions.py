"""Who computes which part of one pass over all examples, with help for stragglers at the end.

Source: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, section 4.2: portions
are much smaller than a worker's share, so that fast workers do more of them, and near the end of a
pass the portions that are still out are given to a second worker; the first copy to be done counts.
A copy is given to who will have done it well before the one who has it, as far as their paces say,
or when that one is overdue.

Invariant: a portion is free, out (with one or two workers), or done; once done it stays done. A
worker gets what follows on its last portion where that is free: it has those examples at hand.
Where hosts have different examples, it gets, and helps with, those of its partition only. This
module knows workers by number only and no clock but the one that it is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dsgd_cli.engine.partitions import Partitions

LATE = 1.5  # times as long as it should take: then a portion may be given out again
MEMORY = 0.2  # of a pace: the weight of the newest portion


@dataclass(slots=True)
class _Portion:
    partition: int
    start: int
    stop: int
    out: dict[int, float] = field(default_factory=dict)  # worker -> since when


@dataclass(slots=True)
class Paces:
    """Seconds that a portion takes each worker, from pass to pass."""

    _seconds: dict[int, float] = field(default_factory=dict)
    _free_s: dict[int, float] = field(default_factory=dict)  # when it did its last portion

    def done(self, worker: int, since_s: float, now_s: float) -> None:
        """It has done a portion, which it was given at `since_s`, perhaps behind another."""
        took_s = now_s - self.begins(worker, since_s)
        usual_s = self._seconds.get(worker, took_s)
        self._seconds[worker] = usual_s + MEMORY * (took_s - usual_s)
        self._free_s[worker] = now_s

    def begins(self, worker: int, since_s: float) -> float:
        """When it began, or begins, with what it was given at `since_s`."""
        return max(since_s, self._free_s.get(worker, since_s))

    def of(self, worker: int) -> float | None:
        """What is usual for it, or for the others, if that is known."""
        known = self._seconds.get(worker)
        return known if known is not None or not self._seconds else self.median()

    def median(self) -> float:
        return statistics.median(self._seconds.values())


class Portions:
    """Of one pass. Portions are numbered from 0 in the order of the partitions and their examples;
    `counts` has the number of each one's."""

    def __init__(
        self, partitions: Partitions, counts: Sequence[int], paces: Paces | None = None
    ) -> None:
        self._partitions = partitions
        self._portions = [
            _Portion(partition, start, stop)
            for partition, (size, count) in enumerate(zip(partitions.sizes, counts, strict=True))
            for start, stop in _cut(size, count)
        ]
        self._last: dict[int, int] = {}  # worker -> its newest portion
        self._open = dict(enumerate(self._portions))  # those that are not done
        self._paces = paces if paces is not None else Paces()

    @property
    def count(self) -> int:
        return len(self._portions)

    @property
    def complete(self) -> bool:
        return not self._open

    def bounds(self, portion: int) -> tuple[int, int]:
        """Its examples [start, stop), counted within its partition."""
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
        if since_s is not None:
            self._paces.done(worker, since_s, now_s)
        if portion not in self._open:
            return False, ()
        del self._open[portion]
        return True, tuple(item.out)

    def leave(self, worker: int) -> None:
        """The worker is gone: what it had, and nobody else has, is free."""
        for portion in self._open.values():
            portion.out.pop(worker, None)
        self._last.pop(worker, None)

    def _free_for(self, worker: int) -> int | None:
        mine = self._partitions.of(worker)
        free = [n for n, item in self._open.items() if not item.out and item.partition == mine]
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
        that is the beginning of its partition."""
        best, start, length = (0, free[0]), free[0], 0
        for number in free:
            start, length = (start, length + 1) if number == start + length else (number, 1)
            best = max(best, (length, start), key=lambda stretch: (stretch[0], -stretch[1]))
        length, start = best
        return start if self._portions[start].start == 0 else start + length // 2

    def _late_for(self, worker: int, now_s: float) -> int | None:
        """The portion that is done last if nobody helps, where this worker would be much faster."""
        mine_s = self._paces.of(worker)
        if mine_s is None:
            return None
        held: dict[int, list[tuple[float, int]]] = {}  # worker -> what it has: since when, number
        for number, item in self._open.items():
            for holder, since_s in item.out.items():
                held.setdefault(holder, []).append((since_s, number))
        mine = self._partitions.of(worker)
        late = [
            (left_s, now_s - since_s, -number)
            for number, item in self._open.items()
            if item.partition == mine and len(item.out) == 1 and worker not in item.out
            for holder, since_s in item.out.items()
            if (left_s := self._left_s(holder, number, sorted(held[holder]), now_s)) > LATE * mine_s
        ]
        return -max(late)[2] if late else None

    def _left_s(
        self, holder: int, portion: int, held: list[tuple[float, int]], now_s: float
    ) -> float:
        """How long it will be, as far as the pace of who has it says; overdue: for ever."""
        pace_s = self._paces.of(holder)
        assert pace_s is not None
        begins_s = self._paces.begins(holder, held[0][0])
        takes_s = pace_s * (1 + [number for _, number in held].index(portion))  # in their order
        if now_s > begins_s + LATE * takes_s:
            return math.inf
        return begins_s + takes_s - now_s


def _cut(examples: int, count: int) -> Iterable[tuple[int, int]]:
    """[start, stop) of so many portions, all of nearly the same size, and none empty."""
    count = min(count, examples)
    return pairwise(examples * portion // count for portion in range(count + 1))
