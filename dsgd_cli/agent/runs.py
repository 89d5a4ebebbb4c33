"""The run directories of a cluster on this machine, whatever its name was when they were made.

A machine that was renamed has another host id, and its agent's run directory keeps the old one. A
home may be shared by many machines, though, so a directory under another id is ours only if its
processes are: its agent was started on this boot of this machine, in our process namespace (a
container shares the boot, and often the machine's id, with others), or one of them is alive here.
Whatever that cannot be said of is not touched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsgd_cli.agent import paths, processes
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


def identity() -> Message:
    """What of agent.json tells this machine, this boot and these pids from all others."""
    return {
        "boot_id": processes.boot_id(),
        "machine_id": paths.machine_id(),
        "pid_namespace": processes.namespace("self"),
    }


def here(cluster: str) -> list[Path]:
    """This host id's run directory, there or not, and then those under its other ids."""
    own = paths.run_dir(cluster)
    named = {Path(member.run_dir) for member in processes.sweep(own)}
    others = {own.parent / path.name for path in named if path.is_dir()}
    return [own, *sorted((others | _renamed(own, cluster)) - {own})]


def current(cluster: str) -> Path:
    """Where the cluster's agent lives on this machine, or will."""
    own = paths.run_dir(cluster)
    for path in (own, *sorted(_renamed(own, cluster))):
        agent = agent_of(path)
        if agent is not None and agent["alive"]:
            return path
    return own


def _renamed(own: Path, cluster: str) -> set[Path]:
    return {path for path in own.parent.glob(f"{cluster}@*") if path != own and _is_ours(path)}


def _is_ours(run_dir: Path) -> bool:
    agent = read_json(run_dir / "agent.json")
    if not isinstance(agent, dict):
        return False
    known = identity()
    return bool(known["boot_id"] and known["pid_namespace"]) and known.items() <= agent.items()


def _alive(entry: Message) -> bool:
    pid, started = entry.get("pid"), entry.get("start_time")
    return isinstance(pid, int) and isinstance(started, int) and processes.alive(pid, started)
