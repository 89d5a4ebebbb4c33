"""Whether to poll for a while before sleeping.

A process that sleeps is woken 20 to 150 µs after its answer came, which is longer than a small
model's whole step; and whoever wakes it pays, too. So a waiting end polls first: for twice as long
as its waits have lately taken, `LEAST_S` to `MOST_S`. That only helps while every process has a
core of its own: `Spin` does not poll where the processes that take part outnumber the cores which
this one may use, while the machine has more runnable threads than cores, or when polling has lately
not been worth it. Then it rests, longer each time, and tries again with the longest limit: two ends
that both sleep make each other's waits long, so how long a sleep took says nothing. It never
changes what is waited for, only how.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

LEAST_S = 100e-6
MOST_S = 1e-3
LOOK_S = 0.01  # between two looks at the machine's load
WORTH = 0.4  # of the recent waits must have been short
MEMORY = 0.1  # the weight of the newest wait
REST_S = 0.05  # without polling: the first time, and at most
MAX_REST_S = 0.8
TRIAL = 0.5  # the share of short waits that is assumed after a rest: three in vain end the trial

Answer = TypeVar("Answer")


class Spin:
    """Of one thread. `most_s`: 0 turns it off."""

    def __init__(
        self,
        most_s: float = MOST_S,
        *,
        cores: int | None = None,
        runnable: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.processes = 1  # that take part on this host, this one included
        self._most_s = most_s
        self._limit_s = most_s
        self._cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._machine_cores = cores or os.cpu_count() or 1
        self._runnable = runnable_threads if runnable is None else runnable
        self._clock = clock
        self._short = 1.0  # the share of recent waits that polling has caught
        self._rest_s = REST_S
        self._rests_until = 0.0
        self._crowded = False
        self._look_at = 0.0

    def wait(self, poll: Callable[[], Answer], sleep: Callable[[], Answer]) -> Answer:
        """The first true answer of `poll`, or else what `sleep` says, which waits in the kernel."""
        began = now = self._clock()
        if not self.worthwhile(began):
            return sleep()
        until = began + self._limit_s
        while now < until:
            answer = poll()
            if answer:
                self._caught(now - began)
                return answer
            now = self._clock()
        self._missed(now)
        return sleep()

    def worthwhile(self, now: float) -> bool:
        """Whether a wait that begins now should poll first."""
        if self._most_s <= 0 or self.processes > self._cores or now < self._rests_until:
            return False
        if now >= self._look_at:
            self._crowded = self._runnable() > self._machine_cores
            self._look_at = now + LOOK_S
        return not self._crowded

    def _caught(self, waited_s: float) -> None:
        self._short += MEMORY * (1.0 - self._short)
        self._rest_s = REST_S
        limit_s = min(max(2 * waited_s, LEAST_S), self._most_s)
        self._limit_s += MEMORY * (limit_s - self._limit_s)

    def _missed(self, now: float) -> None:
        self._short -= MEMORY * self._short
        if self._short < WORTH:
            self._rests_until = now + self._rest_s
            self._rest_s = min(2 * self._rest_s, MAX_REST_S)
            self._short, self._limit_s = TRIAL, self._most_s


class _LoadAverage:
    """The kernel's count of threads that run or wait for a core, now: field 4 of loadavg."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def __call__(self) -> int:
        try:
            if self._fd is None:
                self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            return int(os.pread(self._fd, 128, 0).split()[3].split(b"/")[0])
        except (OSError, IndexError, ValueError):
            return 0  # not Linux as we know it: the number of processes has to do


runnable_threads = _LoadAverage()
