"""How long the agent may go on unheard: a deadline on CLOCK_BOOTTIME, which counts suspension too.

Whoever sets it may shorten it; a renewal that a child passes on only ever lengthens it.
"""

from __future__ import annotations

import math
import time
from typing import Any

from dsgd_cli.agent.framing import Refused

LONGEST_S = 10 * 365 * 86400.0


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused("invalid", f"not a lease in seconds: {ascii(value)[:100]}")
    if not math.isfinite(value) or not 0 < value <= LONGEST_S:
        raise Refused("invalid", f"not a lease in seconds: {value}")
    return float(value)


class Lease:
    def __init__(self, seconds: float) -> None:
        self.holder: Any = None
        self.deadline_s = now_s() + seconds

    def set(self, holder: Any, seconds: float) -> None:
        self.holder = holder
        self.deadline_s = now_s() + seconds

    def extend(self, seconds: float) -> None:
        self.deadline_s = max(self.deadline_s, now_s() + seconds)

    @property
    def remaining_s(self) -> float:
        return self.deadline_s - now_s()
