"""What every peer prints: one JSON object, short enough that several processes share a pipe.

The peers run in a virtual environment of their own and import nothing of dsgd.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any


def repeat(call: Callable[[], Any], at_least: int, for_s: float = 0.5) -> list[float]:
    """Seconds of each call: at least so many, for at least so long. The first two do not count."""
    call()
    call()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < at_least or time.perf_counter() - began < for_s:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def cpu_s() -> float:
    return time.process_time()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)
