"""What left its process's group and session but still carries our marks: killed, tick by tick.

Nothing here waits: a look, KILL to whatever it finds, and another look soon after, until one finds
nothing. What survives KILL for seconds hangs in the kernel and is left to the verification.
"""

from __future__ import annotations

import signal
from collections.abc import Collection
from pathlib import Path

from dsgd_cli.agent import processes

PAUSE_S = 0.02
GIVE_UP_S = 5.0


class Strays:
    """A stray belongs to a life that has ended: a restarted process's own children are none."""

    def __init__(self, run_dir: Path, cluster_id: str) -> None:
        self._run_dir, self._cluster_id = run_dir, cluster_id
        self._give_up_at = 0.0
        self.due_s: float | None = None  # when `tick` has something to do

    def suspect(self, now_s: float) -> None:
        """A life has ended: there may be some."""
        self.due_s, self._give_up_at = now_s, now_s + GIVE_UP_S

    def tick(self, now_s: float, lives: Collection[str]) -> None:
        """Kill what belongs to none of these `lives`, when it is time to look."""
        if self.due_s is None or now_s < self.due_s:
            return
        found = [
            member
            for member in processes.sweep(self._run_dir, self._cluster_id)
            if member.process != processes.AGENT and member.life not in lives
        ]
        for member in found:
            target = processes.Target(member.pid, member.start_time)
            target.send(signal.SIGKILL)
            target.close()
        self.due_s = now_s + PAUSE_S if found and now_s < self._give_up_at else None
