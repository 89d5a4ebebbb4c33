"""Stopping a process so that it cannot be left behind.

A stopped process does not notice that whoever started it is gone, so a test run that is killed in
the middle would leave it for ever.
"""

from __future__ import annotations

import os
import signal
import subprocess

_guards: list[subprocess.Popen[bytes]] = []  # for as long as the tests run


def freeze(pid: int) -> None:
    """SIGSTOP; SIGCONT as soon as this process is gone, however it goes."""
    script = f"read _; kill -CONT {pid} 2>/dev/null"  # when nobody can write to it any more
    guard = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    _guards.append(guard)
    os.kill(pid, signal.SIGSTOP)
