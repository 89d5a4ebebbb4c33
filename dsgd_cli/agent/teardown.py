"""Ending a cluster on this host, and looking afterwards whether anything is left.

`teardown` asks a living agent first, then trusts nobody: whatever files or environments name is
ended by TERM, grace and KILL, and the files go. It works without an agent, with a dead, a frozen
or a deaf one, and without a run directory. `verify` is a separate look, meant for a fresh process:
it reports what is there and touches nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from dsgd_cli.agent import launch, names, paths, processes, runs
from dsgd_cli.agent.framing import Message, Refused

GRACE_S = 5.0
REPLY_MARGIN_S = 4.0  # for the agent's own KILL phase
LATE_GRACE_S = 1.0  # for the others when the agent has already used up the grace


def grace(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 3600:
        raise Refused("invalid", f"not a grace period in seconds: {ascii(value)[:100]}")
    return float(value)


def teardown(cluster: str, grace_s: float) -> Message:
    """{stopped, killed}: daemons that were alive before and are not now; those that needed KILL."""
    run_dirs = runs.here(cluster)
    before = daemons(cluster)
    started = time.monotonic()
    killed: set[str] = set()
    for run_dir in run_dirs:
        agent = runs.agent_of(run_dir)
        if agent is not None and agent["alive"]:
            killed |= _ask(run_dir, agent, grace_s)
    left_s = max(LATE_GRACE_S, grace_s - (time.monotonic() - started))
    pids = processes.end_all(lambda: launch.members(cluster), left_s)
    after = daemons(cluster)
    names_of = {pid: name for name, members in before.items() for pid in members}
    killed |= {names_of[pid] for pid in pids if pid in names_of}
    if not launch.members(cluster):
        for run_dir in run_dirs:
            paths.remove_run(run_dir)
    return {"stopped": len(before.keys() - after.keys()), "killed": len(killed - after.keys())}


def _ask(run_dir: Path, agent: Message, grace_s: float) -> set[str]:
    """Let the agent do it. The daemons for which it needed KILL."""
    seen = processes.stat(agent["pid"])
    if seen is None or seen.state in "Tt":
        return set()  # frozen: it would only cost the whole deadline
    try:
        request = {"id": 0, "do": "shutdown", "grace_s": grace_s}
        said = launch.ask(run_dir, request, grace_s + REPLY_MARGIN_S)
    except Refused:
        return set()
    target = processes.Target(agent["pid"], agent["start_time"])
    processes.wait_gone([target], REPLY_MARGIN_S)
    target.close()
    return set(said.get("killed_processes", ()))


def daemons(cluster: str) -> dict[str, set[int]]:
    """The living daemons, by name, with their pids: what `stopped` counts."""
    found: dict[str, set[int]] = {}
    for run_dir in runs.here(cluster):
        for name, process in runs.processes_of(run_dir).items():
            if process["alive"]:
                found.setdefault(name, set()).add(process["pid"])
    for member in processes.sweep(paths.run_dir(cluster)):
        found.setdefault(member.process, set()).add(member.pid)
    return {name: pids for name, pids in found.items() if names.DAEMON.fullmatch(name)}


def verify(cluster: str) -> Message:
    """{left, files, results}: empty lists when nothing is there."""
    left = {
        member.pid: {"pid": member.pid, "process": member.process, "cmdline": member.cmdline}
        for member in processes.sweep(paths.run_dir(cluster))
    }
    for pid, _ in launch.members(cluster):
        left.setdefault(pid, {"pid": pid, "process": "", "cmdline": processes.cmdline(pid)})
    places: dict[Path, None] = {}  # in order, each once
    for run_dir in runs.here(cluster):
        found = [run_dir, paths.socket_path(run_dir), *paths.discarded(run_dir)]
        places |= dict.fromkeys(found)
    return {
        "left": [left[pid] for pid in sorted(left)],
        "files": [str(place) for place in places if os.path.lexists(place)],
        "results": results(cluster),
    }


def results(cluster: str) -> list[Message]:
    """Every file that is not home yet."""
    folder = paths.results_dir(cluster)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [{"path": str(path), "bytes": path.lstat().st_size} for path in files]


def purge(cluster: str) -> Message:
    """Remove the results that are not home yet."""
    gone = results(cluster)
    shutil.rmtree(paths.results_dir(cluster), ignore_errors=True)
    paths.prune()
    return {"removed": gone}
