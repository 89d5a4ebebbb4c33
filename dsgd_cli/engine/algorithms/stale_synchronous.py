"""Stale-synchronous parallel: nobody is more than a bound of clocks ahead of the slowest.

Source: Q. Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", NIPS 2013, section 3. A worker's clock counts the pushes of its that every shard has
acknowledged, and those that had nothing to send, as no gradient was finite. It may begin clock c
(counted from 0) only while c - min <= bound, where min is the least clock of all; and what it reads
for clock c contains every update of a clock below c - bound, and its own.

What differs from the paper: the cluster is elastic. Who joins begins at the least clock; who has
nothing to do does not count, and nor does who evaluates, from the moment that its last clock is in
all shards; both go on from the least clock, with parameters fetched anew; who is gone counts no
more from the moment that this is known.
`Clocks` is the coordinator's half, `Gate` the worker's, which checks its own reads; both are pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Clocks:
    """The coordinator's half. A worker's clock is `base` plus what it has completed itself."""

    bound: int
    _base: dict[int, int] = field(default_factory=dict)
    _completed: dict[int, int] = field(default_factory=dict)
    _counts: set[int] = field(default_factory=set)  # those that are waited for
    _limits: dict[int, int] = field(default_factory=dict)  # what each has been told last
    _floor: int = 0

    def join(self, worker: int) -> None:
        """It is here, but does not count before `resume`."""
        self._completed[worker] = 0
        self._base[worker] = self.least()

    def leave(self, worker: int) -> None:
        """It is gone, and nobody waits for it."""
        self._counts.discard(worker)
        for known in (self._base, self._completed, self._limits):
            known.pop(worker, None)

    def pause(self, worker: int) -> None:
        """It has nothing to do, or something else: nobody waits for it.

        What it has been told is forgotten: when it counts again it is told, even if it is the same.
        """
        self._counts.discard(worker)
        self._limits.pop(worker, None)

    def resume(self, worker: int) -> None:
        """It counts: from the least clock on, unless it is ahead of it."""
        if worker in self._completed and worker not in self._counts:
            behind = self.least() - self._completed[worker]
            self._base[worker] = max(self._base[worker], behind)
            self._counts.add(worker)

    def completed(self, worker: int, count: int) -> None:
        """So many of its clocks are in all shards."""
        if worker in self._completed:
            self._completed[worker] = max(count, self._completed[worker])
            self.least()  # which may have risen, and does not fall when this one pauses

    def has(self, worker: int, count: int) -> bool:
        """Whether so many are known already: who says it again has no clock in hand."""
        return count <= self._completed.get(worker, -1)

    def least(self) -> int:
        """The least clock of those that count; it never falls."""
        clocks = [self._base[worker] + self._completed[worker] for worker in self._counts]
        self._floor = max(min(clocks, default=self._floor), self._floor)
        return self._floor

    def blocked(self, worker: int) -> bool:
        """Whether it may not begin another clock before others complete theirs."""
        if worker not in self._counts:
            return False
        return self._completed[worker] > self._limit(worker, self.least())

    def news(self) -> list[tuple[int, int]]:
        """(worker, limit) of those whose limit has risen: it may begin its own clock `limit`."""
        found = []
        least = self.least()
        for worker in sorted(self._counts):
            limit = self._limit(worker, least)
            if limit > self._limits.get(worker, -1):
                self._limits[worker] = limit
                found.append((worker, limit))
        return found

    def _limit(self, worker: int, least: int) -> int:
        return least + self.bound - self._base[worker]


@dataclass(slots=True)
class Gate:
    """The worker's half: which clock may begin, and whether what it has read is new enough.

    Clocks are its own, from 0. `limit`: the last one that may begin, as the coordinator has said.
    A fetch is good for the clock that is next when it begins, if that is allowed then: everything
    that it must contain has been acknowledged. Not for the one after: its own push is missing.
    """

    limit: int = -1
    clock: int = 0  # the one in hand, or the next
    _good_for: int = -1  # of the parameters in hand
    _fetching_for: int = -1

    @property
    def open(self) -> bool:
        """Whether the clock may begin."""
        return self.clock <= self.limit

    @property
    def fresh(self) -> bool:
        """Whether the parameters in hand may be read for it."""
        return self.clock <= self._good_for

    def fetch_begins(self) -> None:
        self._fetching_for = min(self.clock, self.limit)

    def fetched(self) -> None:
        """The newest fetch is in hand."""
        self._good_for = self._fetching_for

    def pushed(self) -> None:
        """The clock's push has begun, or is left out: what comes is of the next one."""
        self.clock += 1

    def idled(self) -> None:
        """It had nothing to do, and nobody waited for it: what is in hand may be old."""
        self._good_for = -1

    def away(self) -> None:
        """It has evaluated meanwhile: closed until the coordinator, who counts it again, says."""
        self.idled()
        self.limit = self.clock - 1
