"""Which examples are where: on all hosts the same, or on each host a partition of its own.

Positions are counted within a partition, so that a worker need know of no other. Whatever hands out
examples gives a worker those of its partition. Workers are known by number only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Partitions:
    """`sizes`: the examples of each; `places`: the partition of each worker, () if there is one."""

    sizes: tuple[int, ...]
    places: tuple[int, ...] = ()

    @classmethod
    def whole(cls, examples: int) -> Partitions:
        """One: every worker has all examples."""
        return cls((examples,))

    def owners(self) -> Partitions:
        """The same, with a number for each in a worker's place: for what belongs to no worker."""
        return Partitions(self.sizes, tuple(range(len(self.sizes))))

    @property
    def examples(self) -> int:
        """Of all together."""
        return sum(self.sizes)

    def of(self, worker: int) -> int:
        """The partition that the worker has."""
        return partition_of(worker, self.places)

    def workers(self, partition: int, workers: int) -> int:
        """How many of so many workers have it."""
        return self.places.count(partition) if self.places else workers


def partition_of(worker: int, places: tuple[int, ...]) -> int:
    """The partition that the worker has, also where nobody knows yet how large it is."""
    return places[worker] if places else 0
