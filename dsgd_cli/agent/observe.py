"""What is on this host of a cluster: agent, processes, leftovers, as they are and not as written.

Files say what should be; /proc says what is. A run directory of an earlier boot, or of an agent
that was killed, shows as `alive: false`, and its processes as they really are.
"""

from __future__ import annotations

from dsgd_cli.agent import cache, facts, processes, runs
from dsgd_cli.agent.framing import Message


def observe(cluster: str, wanted: Message) -> Message:
    run_dir = runs.current(cluster)
    agent = runs.agent_of(run_dir)
    living = agent["cluster_id"] if agent and agent["alive"] else None
    strays = [member for member in processes.sweep(run_dir) if member.cluster_id != living]
    return {
        **facts.facts(),
        "run_dir": str(run_dir),
        "missing": cache.missing(wanted),
        "agent": agent,
        "processes": runs.processes_of(run_dir),
        "spec": runs.read_json(run_dir / "spec.json"),
        "leftovers": [{"pid": s.pid, "process": s.process, "cmdline": s.cmdline} for s in strays],
    }
