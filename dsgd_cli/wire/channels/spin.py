"""Whether to poll for a while before sleeping.

A process that sleeps is woken 20 to 50 µs after its answer came, which is as long as a small
model's whole step. So a waiting end polls for up to `LIMIT_S` first. That only helps while every
process has a core of its own: `Spin` does not poll where the processes that take part outnumber the
cores which this one may use, while the machine has more runnable threads than cores, or when
polling has lately not been worth it. It never changes what is waited for, only how.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 100e-6
LOOK_S = 0.05  # between two looks at the machine's load
WORTH = 0.4  # of the recent waits must have been short
MEMORY = 0.1  # the weight of the newest wait

Answer = TypeVar("Answer")


class Spin:
    """Of one thread."""

    def __init__(
        self,
        limit_s: float = LIMIT_S,
        *,
        cores: int | None = None,
        runnable: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.processes = 1  # that take part on this host, this one included
        self._limit_s = limit_s
        self._cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._machine_cores = cores or os.cpu_count() or 1
        self._runnable = runnable_threads if runnable is None else runnable
        self._clock = clock
        self._short = 1.0  # the share of recent waits that polling would have caught
        self._crowded = False
        self._look_at = 0.0

    def wait(self, poll: Callable[[], Answer], sleep: Callable[[], Answer]) -> Answer:
        """The first true answer of `poll`, or else what `sleep` says, which waits in the kernel."""
        began = now = self._clock()
        if self.worthwhile(began):
            until = began + self._limit_s
            while now < until:
                answer = poll()
                if answer:
                    self._short += MEMORY * (1.0 - self._short)
                    return answer
                now = self._clock()
        answer = sleep()
        # A sleeper cannot tell its wait from the time that waking it took: hence twice the limit.
        short = bool(answer) and self._clock() - began < 2 * self._limit_s and now == began
        self._short += MEMORY * (short - self._short)
        return answer

    def worthwhile(self, now: float) -> bool:
        """Whether a wait that begins now should poll first."""
        if self._limit_s <= 0 or self.processes > self._cores or self._short < WORTH:
            return False
        if now >= self._look_at:
            self._crowded = self._runnable() > self._machine_cores
            self._look_at = now + LOOK_S
        return not self._crowded


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
