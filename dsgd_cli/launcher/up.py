"""Bring a cluster up: connect, hold, observe, plan, execute, wait until every process answers.

The executing part carries out the steps of a plan and decides nothing. Before the lock is held
nothing is changed anywhere; from then on `Cluster.touched` says where a failed start must clean up.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsgd_cli.contract.errors import ChangesPending, DsgdError
from dsgd_cli.launcher import requirements
from dsgd_cli.launcher.cluster import Cluster, python_of
from dsgd_cli.launcher.identity import new_cluster_id
from dsgd_cli.launcher.interrupt import Interrupts
from dsgd_cli.launcher.needs import Needs, needs_of, send_missing
from dsgd_cli.launcher.observe import ObservedHost
from dsgd_cli.launcher.parallel import on_all
from dsgd_cli.launcher.plan import (
    Clear,
    Plan,
    Ship,
    StartAgent,
    differences,
    fingerprint,
    plan,
)
from dsgd_cli.launcher.remote import AgentLink, Message
from dsgd_cli.launcher.running import Running, running_cluster
from dsgd_cli.launcher.start import START_TIMEOUT_S, probe, start_processes
from dsgd_cli.launcher.watch import Screen

CLEAR_TIMEOUT_S = 30.0


def bring_up(
    cluster: Cluster,
    screen: Screen,
    *,
    phase: Callable[[str], Any],
    confirm: Callable[[str], bool],
    interrupts: Interrupts,
    trains: bool,
) -> tuple[Running, Plan]:
    """Make what the description says run. Raises a DsgdError; `cluster.touched` says where."""
    with phase("up"):
        _check_here(cluster)
        cluster.connect()
        cluster.hold()
        first = cluster.observe({})
        cluster.check(first)
    with phase("ship"):
        needs = needs_of(cluster, first, screen)
        observed = cluster.observe(needs.wanted(list(first)))
    wanted = process_spec(cluster, needs)
    todo = plan(cluster.placed, fingerprint(wanted), observed)
    _agree(todo, wanted, observed, confirm)
    with phase("ship"):
        _clear(cluster, [step.host for step in todo.steps if isinstance(step, Clear)])
        send_missing(cluster, [s for s in todo.steps if isinstance(s, Ship)], needs, screen)
    with phase("up"):
        with interrupts.held():  # an agent that is being started must be known to the teardown
            running = _join_agents(cluster, screen, todo, observed, needs, wanted, trains)
        try:
            if trains or todo.starts:
                probe(running)
            start_processes(running, todo.starts)
        except BaseException:
            _give_back(running, todo, trains)
            raise
    return running, todo


def _check_here(cluster: Cluster) -> None:
    """What processes on this machine need and cannot be sent, before anything is touched."""
    listed = cluster.spec.env.requirements
    for host in cluster.with_workers:
        if listed and cluster.hosts[host].transport == "local":
            requirements.check(host, Path(listed))


def process_spec(cluster: Cluster, needs: Needs) -> Message:
    """All that the running processes depend on: a change of it replaces the cluster."""
    spec = cluster.spec
    return {
        "placed": {item.process: item.host for item in cluster.placed},
        "code": needs.code_hash,
        "env": {host: list(needs.env_hashes(host)) for host in cluster.used},
        "python": {host: python_of(cluster.hosts[host]) for host in cluster.used},
        "threads": spec.workers.threads,
        "worker_env": dict(spec.workers.env),
        "gpus": cluster.gpus,
        "advertise": {host: cluster.hosts[host].advertise for host in cluster.used},
    }


def _agree(
    todo: Plan,
    wanted: Message,
    observed: dict[str, ObservedHost],
    confirm: Callable[[str], bool],
) -> None:
    """Ask before a living cluster is replaced. Raises ChangesPending."""
    if not todo.replaces:
        return
    old = next(host.spec for host in observed.values() if host.agent_alive)
    lines = differences((old or {}).get("processes") or {}, wanted)
    if not confirm("\n".join([*lines, "the running cluster differs: replace it?"])):
        raise ChangesPending(
            "the running cluster differs from the description; nothing was changed",
            details=lines,
            remedy="run again with --yes to replace it",
        )


def _clear(cluster: Cluster, hosts: Sequence[str]) -> None:
    """Take down what is on these hosts."""
    cluster.touched |= set(hosts)
    on_all(
        hosts,
        lambda host: cluster.remotes[host].call("teardown", cluster=cluster.spec.name, grace_s=5.0),
        phase="clear",
        deadline_s=CLEAR_TIMEOUT_S,
    )


def _join_agents(
    cluster: Cluster,
    screen: Screen,
    todo: Plan,
    observed: dict[str, ObservedHost],
    needs: Needs,
    wanted: Message,
    trains: bool,
) -> Running:
    """Start the agents that are missing and attach to all. A training answers for all of them."""
    cluster_id = todo.cluster_id or new_cluster_id()
    spec = {"fingerprint": fingerprint(wanted), "processes": wanted}
    starting = {step.host for step in todo.steps if isinstance(step, StartAgent)}
    cluster.touched |= set(cluster.used) if trains else starting

    def join(host: str, events: queue.SimpleQueue[tuple[str, Message]]) -> AgentLink:
        remote = cluster.remotes.pop(host)
        if host in starting:
            remote.call(
                "start_agent",
                cluster=cluster.spec.name,
                cluster_id=cluster_id,
                host=host,
                host_id=observed[host].host_id,
                spec=spec,
                lease_s=cluster.spec.lease_s,
            )
        link = remote.attach(cluster.spec.name, events)
        link.call("lease", holder="launcher", seconds=cluster.spec.lease_s)
        link.call("subscribe", logs=True)
        return link

    return running_cluster(cluster, cluster_id, observed, needs, join, screen, START_TIMEOUT_S)


def _give_back(running: Running, todo: Plan, trains: bool) -> None:
    """A failed `up` leaves a cluster that ran before as it was: idle."""
    if todo.cluster_id is not None and not trains:
        with contextlib.suppress(DsgdError):
            running.release(running.cluster.spec.idle_timeout_s)
    running.close()
