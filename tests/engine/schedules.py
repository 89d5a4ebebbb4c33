"""What tests by simulated schedules have in common: a clock, seeds, and planted mistakes."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytest

World = TypeVar("World")


class Clockwork:
    """What is to be done when, in a world whose time is a number."""

    def __init__(self) -> None:
        self.now = 0.0
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()  # what is due at one time is done in this order

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        self.at(self.now + delay_s, do)

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (time_s, next(self._ids), do))

    def next(self) -> None:
        """It is as late as the next thing is due, and that is done."""
        self.now, _, do = heapq.heappop(self.agenda)
        do()


def some_places(seed: int, workers: int) -> tuple[int, ...]:
    """Two or three partitions of so many workers in a third of all schedules, else ()."""
    partitions = min(2 + seed // 3 % 2, workers)
    return () if seed % 3 or partitions < 2 else tuple(w % partitions for w in range(workers))


def checked(check: Callable[[int], World], seeds: Iterable[int]) -> Iterator[World]:
    """The world of each seed; a failure names its seed."""
    for seed in seeds:
        try:
            world = check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        yield world


def assert_caught(check: Callable[[int], Any], seeds: Iterable[int]) -> None:
    """A mistake that was planted breaks a promise in one of the schedules, or the books."""
    with pytest.raises((AssertionError, KeyError)):
        for seed in seeds:
            check(seed)
