"""How often the kernel killed for memory here: a process that got SIGKILL from nobody we know.

Counted in our own control group where there is one (v2), else on the whole machine.
"""

from __future__ import annotations

from pathlib import Path


def kills(root: Path = Path("/")) -> int:
    """A counter that only grows. 0 where it cannot be known."""
    events = _cgroup(root) / "memory.events"
    for path in (events, root / "proc/vmstat"):
        try:
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            continue
    return 0


def _cgroup(root: Path) -> Path:
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return root / "sys/fs/cgroup" / line[3:].lstrip("/")
    except OSError:
        pass
    return root / "sys/fs/cgroup"
