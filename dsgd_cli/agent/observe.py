"""What is on this host of a cluster: agent, processes, leftovers, as they are and not as written.

Files say what should be; /proc says what is. A run directory of an earlier boot, or of an agent
that was killed, shows as `alive: false`, and its processes as they really are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsgd_cli.agent import cache, facts, paths, processes
from dsgd_cli.agent.framing import Message


def read_json(path: Path) -> Any:
    """None when it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def agent_of(run_dir: Path) -> Message | None:
    """agent.json, with `alive`. Alive means that very process on this boot, answering or not."""
    agent = read_json(run_dir / "agent.json")
    if not isinstance(agent, dict):
        return None
    this_boot = agent.get("boot_id") == processes.boot_id()
    return {**agent, "alive": this_boot and _alive(agent)}


def processes_of(run_dir: Path) -> Message:
    """processes.json, each with `alive`."""
    found = read_json(run_dir / "processes.json")
    agent = read_json(run_dir / "agent.json")
    this_boot = isinstance(agent, dict) and agent.get("boot_id") == processes.boot_id()
    if not isinstance(found, dict):
        return {}
    return {
        name: {**process, "alive": this_boot and _alive(process)}
        for name, process in found.items()
        if isinstance(process, dict)
    }


def _alive(entry: Message) -> bool:
    pid, started = entry.get("pid"), entry.get("start_time")
    return isinstance(pid, int) and isinstance(started, int) and processes.alive(pid, started)


def observe(cluster: str, wanted: Message) -> Message:
    run_dir = paths.run_dir(cluster)
    agent = agent_of(run_dir)
    living = agent["cluster_id"] if agent and agent["alive"] else None
    strays = [member for member in processes.sweep(run_dir) if member.cluster_id != living]
    return {
        **facts.facts(),
        "run_dir": str(run_dir),
        "missing": cache.missing(wanted),
        "agent": agent,
        "processes": processes_of(run_dir),
        "spec": read_json(run_dir / "spec.json"),
        "leftovers": [{"pid": s.pid, "process": s.process, "cmdline": s.cmdline} for s in strays],
    }
