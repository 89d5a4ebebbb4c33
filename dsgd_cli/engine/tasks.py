"""Who computes which examples: the epoch's permutation, cut into leased tasks.

A task is a range of positions in the epoch's permutation; coordinator and workers compute that
permutation from (seed, epoch) alone, so no index ever travels. Where hosts have different examples,
each partition has a permutation and positions of its own, and a worker gets tasks of its partition.
Invariant: at any moment each position of an open epoch is either free, leased, withdrawn or
acknowledged, so that none is lost and, while nobody dies, none is computed twice. An epoch is
complete when all positions of all partitions are acknowledged. This module knows workers by number
only; who lives is `training`'s.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.engine.partitions import Partitions

TASK_S = 0.25  # the work that a task should cover; a bit more than the 0.2 s promised
FIRST_BATCHES = 4  # the size of a task for a worker whose speed is not known yet
EPOCHS_AHEAD = 2  # so many epochs may be open behind the oldest incomplete one


@dataclass(frozen=True, slots=True)
class Task:
    """Positions [start, stop) of the permutation of `epoch` (the first epoch is 1)."""

    id: int
    epoch: int
    start: int
    stop: int
    partition: int = 0


@dataclass(frozen=True, slots=True)
class Remainder:
    """Positions of a withdrawn task that nobody has acknowledged."""

    epoch: int
    start: int
    stop: int
    partition: int = 0


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """A complete epoch: `examples` counts repeats, `distinct` does not; both are known from
    reports, so what a worker did between its last report and its death is in neither."""

    epoch: int
    examples: int
    distinct: int
    n: int


def order(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    """The examples of an epoch in the order in which its positions stand for them."""
    return np.random.default_rng([seed % (1 << 64), epoch]).permutation(examples)


@dataclass(slots=True)
class _Lease:
    task: Task
    done: int  # positions before it are acknowledged

    def left(self) -> Remainder:
        return Remainder(self.task.epoch, self.done, self.task.stop, self.task.partition)


@dataclass(slots=True)
class _Epoch:
    free: list[list[tuple[int, int]]]  # of each partition: sorted, disjoint, none empty
    distinct: int = 0
    examples: int = 0


@dataclass(slots=True)
class _Speed:
    """Examples per busy second; the past fades with a half-life of about a second of work."""

    examples: float = 0.0
    busy_s: float = 0.0

    def add(self, examples: int, busy_s: float) -> None:
        self.examples += examples
        self.busy_s += busy_s
        if self.busy_s > 2.0:
            self.examples /= 2
            self.busy_s /= 2

    def rate(self) -> float:
        return self.examples / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(slots=True)
class TaskQueue:
    """The open epochs, and who holds what of them."""

    partitions: Partitions
    batch_size: int
    max_epochs: int | None = None
    ahead: int = EPOCHS_AHEAD
    complete: int = 0  # epochs 1..complete are done
    _last_id: int = 0
    _open: dict[int, _Epoch] = field(default_factory=dict)
    _leases: dict[int, dict[int, _Lease]] = field(default_factory=dict)  # of present workers
    _speeds: dict[int, _Speed] = field(default_factory=dict)

    def join(self, worker: int) -> None:
        """The worker takes tasks from now on, and has a share in the epoch."""
        self._leases.setdefault(worker, {})
        self._speeds.setdefault(worker, _Speed())

    def leave(self, worker: int) -> tuple[Remainder, ...]:
        """The worker is gone. What it had not acknowledged is nobody's until `put_back`."""
        remainders = self.withdraw(worker)
        self._leases.pop(worker, None)
        return remainders

    def withdraw(self, worker: int) -> tuple[Remainder, ...]:
        """End all leases of a worker; what it had not acknowledged is nobody's until `put_back`."""
        leases = self._leases.get(worker, {})
        left = [lease.left() for lease in leases.values()]
        leases.clear()
        return tuple(left)

    def cancel(self, worker: int, task_id: int) -> tuple[Remainder, ...]:
        """End one lease; what was not acknowledged of it is nobody's until `put_back`."""
        lease = self._leases.get(worker, {}).pop(task_id, None)
        return () if lease is None else (lease.left(),)

    def put_back(self, remainders: Iterable[Remainder]) -> None:
        """These positions may be leased again."""
        for remainder in remainders:
            free = self._open[remainder.epoch].free[remainder.partition]
            insort(free, (remainder.start, remainder.stop))

    def held(self, worker: int) -> int:
        """How many tasks the worker holds."""
        return len(self._leases.get(worker, ()))

    def outstanding_batches(self) -> int:
        """Batches in all leases that are not acknowledged yet."""
        leases = [lease for held in self._leases.values() for lease in held.values()]
        return sum(-(-(lease.task.stop - lease.done) // self.batch_size) for lease in leases)

    def batch_s(self, worker: int) -> float | None:
        """What a batch usually takes this worker; if that is not known, the slowest of all."""
        rates = {who: speed.rate() for who, speed in self._speeds.items()}
        rate = rates.get(worker) or min(filter(None, rates.values()), default=0.0)
        return self.batch_size / rate if rate else None

    def epoch_of(self, worker: int, task_id: int) -> int | None:
        """The epoch of a task that this worker holds; None for any other task."""
        lease = self._leases.get(worker, {}).get(task_id)
        return None if lease is None else lease.task.epoch

    def offers(self) -> set[int]:
        """The partitions of which something may be leased now."""
        numbers = range(len(self.partitions.sizes))
        return {number for number in numbers if self._next_epoch(number) is not None}

    def lease(self, worker: int, max_batches: int | None = None) -> Task | None:
        """Cut the next task for this worker, or None when nothing may be leased now."""
        partition = self.partitions.of(worker)
        number = self._next_epoch(partition)
        if number is None or (max_batches is not None and max_batches <= 0):
            return None
        free = self._open[number].free[partition]
        start, stop = free.pop(0)
        size = self._size(worker, free, stop - start)
        if max_batches is not None:
            size = min(size, max_batches * self.batch_size)
        end = min(stop, start + size)
        if end < stop:
            free.insert(0, (end, stop))
        self._last_id += 1
        task = Task(self._last_id, number, start, end, partition)
        self._leases[worker][task.id] = _Lease(task, start)
        return task

    def report(
        self, worker: int, task_id: int, done_upto: int, examples: int, busy_s: float
    ) -> list[EpochRecord]:
        """Acknowledge positions; returns the epochs that this completes, oldest first.

        A task that the worker does not hold, or a `done_upto` that goes back, changes nothing.
        """
        lease = self._leases.get(worker, {}).get(task_id)
        if lease is None:
            return []
        epoch = self._open[lease.task.epoch]
        done = max(lease.done, min(done_upto, lease.task.stop))
        epoch.distinct += done - lease.done
        epoch.examples += examples
        lease.done = done
        if done == lease.task.stop:
            del self._leases[worker][task_id]
        if busy_s > 0:
            self._speeds[worker].add(examples, busy_s)
        return self._close()

    def _close(self) -> list[EpochRecord]:
        """Epochs are closed in order, even if a later one is complete first."""
        records = []
        n = self.partitions.examples
        while (epoch := self._open.get(self.complete + 1)) and epoch.distinct == n:
            self.complete += 1
            del self._open[self.complete]
            records.append(EpochRecord(self.complete, epoch.examples, epoch.distinct, n))
        return records

    def _next_epoch(self, partition: int) -> int | None:
        """The oldest epoch with something free of this partition, opened if need be."""
        for number in range(self.complete + 1, self.complete + 2 + self.ahead):
            if self.max_epochs is not None and number > self.max_epochs:
                return None
            if number not in self._open:
                self._open[number] = _Epoch([[(0, size)] for size in self.partitions.sizes])
            if self._open[number].free[partition]:
                return number
        return None

    def _size(self, worker: int, others: list[tuple[int, int]], first_free: int) -> int:
        """Enough work, at most a fair share, whole batches, smaller at the end of a long epoch.
        `others`: what is free behind the first."""
        fair = self._fair(worker)
        share = self.partitions.sizes[self.partitions.of(worker)] * fair
        rate = self._speeds[worker].rate()
        wanted = rate * TASK_S if rate else float(FIRST_BATCHES * self.batch_size)
        if wanted < share:
            free = first_free + sum(stop - start for start, stop in others)
            wanted = min(wanted, max(wanted / 4, free * fair))
        batches = max(1, math.ceil(min(wanted, share) / self.batch_size))
        size = batches * self.batch_size
        # A sliver would cost a whole grant: it goes with what is before it.
        return first_free if first_free - size < size / 4 else size

    def _fair(self, worker: int) -> float:
        """The fraction of a partition that lets all who have it end an epoch together."""
        partition = self.partitions.of(worker)
        mates = [other for other in self._leases if self.partitions.of(other) == partition]
        rates = [self._speeds[other].rate() for other in mates]
        if all(rates):
            return self._speeds[worker].rate() / sum(rates)
        return 1 / len(mates)
