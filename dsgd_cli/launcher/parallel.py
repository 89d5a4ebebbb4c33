"""Do one thing on many hosts at once; report every host, whatever one of them does.

Threads are daemons: a host that never answers cannot keep the launcher from ending. Each job is
expected to keep its own deadlines; `deadline_s` is the last resort above them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from dsgd_cli.contract.errors import DeadlinePassed, DsgdError, HostsFailed

T = TypeVar("T")


def attempt(
    keys: Iterable[str], job: Callable[[str], T], *, phase: str, deadline_s: float
) -> tuple[dict[str, T], dict[str, DsgdError]]:
    """Run `job(key)` for all keys at once; (results, errors) by key.

    A programming error (anything but DsgdError) is raised at once, in the caller's thread.
    """
    wanted = list(keys)
    done: queue.Queue[tuple[str, T | BaseException]] = queue.Queue()

    def run(key: str) -> None:
        try:
            outcome: T | BaseException = job(key)
        except BaseException as error:
            outcome = error
        done.put((key, outcome))

    for key in wanted:
        threading.Thread(target=run, args=(key,), name=f"{phase} {key}", daemon=True).start()
    results: dict[str, T] = {}
    errors: dict[str, DsgdError] = {}
    end = time.monotonic() + deadline_s
    while len(results) + len(errors) < len(wanted):
        try:
            key, outcome = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(outcome, DsgdError):
            errors[key] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results[key] = outcome
    for key in wanted:
        if key not in results and key not in errors:
            errors[key] = DeadlinePassed(phase, key, deadline_s)
    return results, {key: errors[key] for key in wanted if key in errors}


def on_all(
    keys: Iterable[str], job: Callable[[str], T], *, phase: str, deadline_s: float
) -> dict[str, T]:
    """As `attempt`, but any host's failure is raised (several: one HostsFailed)."""
    results, errors = attempt(keys, job, phase=phase, deadline_s=deadline_s)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise HostsFailed(errors)
    return results
