"""Bring a cluster up: connect, hold, observe, plan, execute, wait until every process answers.

`execute` carries out the steps of a plan and decides nothing. The result is a `Running` cluster:
links to its agents, their events, and a thread that renews its lease.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import (
    ChangesPending,
    ClusterHeld,
    DeadlinePassed,
    DsgdError,
    HostError,
)
from dsgd_cli.launcher.cluster import Address, Cluster, advertised, python_of
from dsgd_cli.launcher.identity import Authority, make_authority, new_cluster_id
from dsgd_cli.launcher.interrupt import Interrupts
from dsgd_cli.launcher.lease import Renewal
from dsgd_cli.launcher.needs import Needs, needs_of, send_missing
from dsgd_cli.launcher.observe import ObservedHost
from dsgd_cli.launcher.parallel import on_all
from dsgd_cli.launcher.plan import Clear, Plan, Ship, StartAgent, StartProcess, fingerprint, plan
from dsgd_cli.launcher.remote import AgentLink, Message
from dsgd_cli.launcher.watch import Said, Screen, Watch, wait_for

START_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 300.0  # it loads the user's data
PROBE = "probe"
CA_KEY = "ca.key"


@dataclass
class Running:
    """A living cluster, held by this launcher."""

    cluster: Cluster
    cluster_id: str
    observed: dict[str, ObservedHost]
    needs: Needs
    events: queue.Queue[tuple[str, Message]]
    links: dict[str, AgentLink]
    watch: Watch
    renewal: Renewal
    ready: dict[str, Message] = field(default_factory=dict)

    @property
    def addresses(self) -> dict[str, Address]:
        return advertised(list(self.cluster.hosts.values()), self.observed)

    @property
    def host_of(self) -> dict[str, str]:
        return {item.process: item.host for item in self.cluster.placed}

    def files(self, host: str) -> Message:
        """Where the user's model and data are on this host."""
        cache = self.observed[host].cache
        return {what: self.needs.file_path(host, cache, what) for what in ("model", "data")}

    def tell(self, process: str, message: Message, *, keep: bool = False) -> None:
        """Send a message to a process, through its agent."""
        link = self.links[self.host_of[process]]
        link.call("tell", process=process, message=message, keep=keep)

    def tell_all(self, role: str, message: Callable[[str], Message], *, keep: bool) -> None:
        """Send each process of a role its message."""
        for item in self.cluster.placed:
            if item.process.startswith(f"{role}/"):
                self.tell(item.process, message(item.host), keep=keep)

    def release(self, idle_s: float) -> None:
        """Leave the cluster alive for `idle_s` and stop renewing."""
        self.renewal.stop()
        on_all(
            self.links,
            lambda host: self.links[host].call("lease", holder="idle", seconds=idle_s),
            phase="release",
            deadline_s=10.0,
        )

    def close(self) -> None:
        self.watch.ending = True
        self.renewal.stop()
        for link in self.links.values():
            link.close()


def bring_up(
    cluster: Cluster,
    screen: Screen,
    *,
    phase: Callable[[str], Any],
    confirm: Callable[[str], bool],
    interrupts: Interrupts,
    trains: bool,
) -> tuple[Running, Plan]:
    """Make what the description says run. Raises a DsgdError; what was started is still there."""
    with phase("up"):
        cluster.connect()
        cluster.hold()
        first = cluster.observe({})
        cluster.check(first)
    with phase("ship"):
        needs = needs_of(cluster, first, screen)
        observed = cluster.observe(needs.wanted(list(first)))
    todo = plan(cluster.placed, fingerprint(process_spec(cluster, needs)), observed)
    if todo.replaces and not confirm(f"{todo}\nthe running cluster differs: replace it?"):
        raise ChangesPending(
            "the running cluster differs from the description; nothing was changed",
            details=str(todo).splitlines(),
            remedy="run again with --yes to replace it",
        )
    with phase("ship"), interrupts.held():
        clear(cluster, [step.host for step in todo.steps if isinstance(step, Clear)])
        send_missing(cluster, [s for s in todo.steps if isinstance(s, Ship)], needs, screen)
    with phase("up"):
        with interrupts.held():  # an agent that is being started must be known to the teardown
            running = _join_agents(cluster, screen, todo, observed, needs)
        try:
            if trains or todo.starts:
                probe(running)
            _start_processes(running, todo.starts)
        except BaseException:
            running.close()
            raise
    return running, todo


def started_something(error: DsgdError | None) -> bool:
    """Whether a start that failed with this error may have left something of ours."""
    return not isinstance(error, (ClusterHeld, ChangesPending))


def process_spec(cluster: Cluster, needs: Needs) -> Message:
    """All that the running processes depend on: a change of it replaces the cluster."""
    spec = cluster.spec
    return {
        "placed": [[item.process, item.host] for item in cluster.placed],
        "code": needs.code_hash,
        "env": {host: list(needs.env_hashes(host)) for host in cluster.used},
        "python": {host: python_of(cluster.hosts[host]) for host in cluster.used},
        "threads": spec.workers.threads,
        "worker_env": dict(spec.workers.env),
        "advertise": {host: cluster.hosts[host].advertise for host in cluster.used},
    }


def clear(cluster: Cluster, hosts: Sequence[str]) -> None:
    """Take down what is on these hosts."""
    on_all(
        hosts,
        lambda host: cluster.remotes[host].call("teardown", cluster=cluster.spec.name, grace_s=5.0),
        phase="clear",
        deadline_s=30.0,
    )


def _join_agents(
    cluster: Cluster,
    screen: Screen,
    todo: Plan,
    observed: dict[str, ObservedHost],
    needs: Needs,
) -> Running:
    cluster_id = todo.cluster_id or new_cluster_id()
    spec = {
        "fingerprint": fingerprint(process_spec(cluster, needs)),
        "spec": cluster.spec.model_dump(mode="json"),
    }
    agents = {step.host for step in todo.steps if isinstance(step, StartAgent)}
    events: queue.Queue[tuple[str, Message]] = queue.Queue()

    def join_agent(host: str) -> AgentLink:
        remote = cluster.remotes.pop(host)
        if host in agents:
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

    hosts = [name for name in cluster.used if name in observed]
    links = on_all(hosts, join_agent, phase="agent", deadline_s=START_TIMEOUT_S)
    running = Running(
        cluster,
        cluster_id,
        observed,
        needs,
        events,
        links,
        Watch(events, screen, cluster.coordinator_host),
        Renewal(links, cluster.spec.lease_s),
    )
    running.renewal.start()
    return running


def probe(running: Running) -> None:
    """Try the user's own model and data on the first worker's host, before any server starts.

    What is built in was checked with the description. Raises ProcessDied with the traceback.
    """
    spec = running.cluster.spec
    if spec.train.model.kind == "builtin" and spec.train.data.kind == "builtin":
        return
    host = running.host_of[names.process_name("worker", 0)]
    setup = {
        "train": spec.train.model_dump(mode="json"),
        "seed": spec.seed,
        "files": running.files(host),
        "servers": spec.servers.count,
    }
    running.links[host].call(
        "start",
        process=PROBE,
        argv=daemon_argv(running, host, PROBE),
        env=daemon_env(running, host, "worker"),
        restart=False,
        setup=setup,
    )
    wait_for(
        running.watch,
        lambda said: said.process == PROBE and said.message.get("type") == "probed",
        PROBE_TIMEOUT_S,
        lambda: DeadlinePassed("loading model and data", host, PROBE_TIMEOUT_S),
    )


def _start_processes(running: Running, starts: Sequence[StartProcess]) -> None:
    """Start what is missing and wait until all of the cluster's processes answer."""

    hello = on_all(
        running.links,
        lambda host: running.links[host].call("hello"),
        phase="agent",
        deadline_s=START_TIMEOUT_S,
    )
    for state in hello.values():
        for process, entry in state["processes"].items():
            if entry.get("ready"):
                running.ready[process] = entry["ready"]
    for step in starts:
        running.ready.pop(step.process, None)
    if starts:
        authority = _authority(running)
        by_host: dict[str, list[StartProcess]] = {}
        for step in starts:
            by_host.setdefault(step.host, []).append(step)

        def start(host: str) -> None:
            for step in by_host[host]:
                running.links[host].call("start", **_start(running, step, authority))

        on_all(by_host, start, phase="start", deadline_s=START_TIMEOUT_S)
        _await_ready(running, {step.process for step in starts})
        _form(running)


def _authority(running: Running) -> Authority:
    """The cluster's CA: a new one, or the one that the coordinator's host keeps."""
    link = running.links[running.cluster.coordinator_host]
    try:
        return Authority.from_pem(running.cluster_id, link.call("get_secret", name=CA_KEY)["text"])
    except HostError:
        authority = make_authority(running.cluster_id)
        link.call("put_secret", name=CA_KEY, text=authority.pem)
        return authority


def _start(
    running: Running,
    step: StartProcess,
    authority: Authority,
) -> Message:
    """The `start` command of one process."""
    cluster, host = running.cluster, step.host
    role, _ = names.split_process(step.process)
    address = running.addresses[host]
    return {
        "process": step.process,
        "argv": daemon_argv(running, host, step.process),
        "env": daemon_env(running, host, role),
        "restart": role == "worker",
        "setup": {
            "process": step.process,
            "cluster": cluster.spec.name,
            "cluster_id": running.cluster_id,
            "bind": address.bind,
            "advertise": address.advertise,
            "tls": authority.issue(step.process),
            "results": f"{running.observed[host].state}/results/{cluster.spec.name}",
            "workers": cluster.spec.workers.count,
        },
    }


def daemon_argv(running: Running, host: str, process: str) -> list[str]:
    """The command line of a daemon: no secret and no free text in it."""
    code = running.needs.code_path(host, running.observed[host].cache)
    python = python_of(running.cluster.hosts[host])
    cluster = running.cluster.spec.name
    return [python, "-I", "-u", f"{code}/dsgd_cli/daemons/__main__.py", process, cluster]


def daemon_env(running: Running, host: str, role: str) -> dict[str, str]:
    """One BLAS thread per process unless `threads` says otherwise, and the path to the wheels."""
    workers = running.cluster.spec.workers
    threads = str(workers.threads if role == "worker" else 1)
    env = dict(workers.env) if role == "worker" else {}
    env |= {
        name: threads
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        if name not in env
    }
    env["DSGD_PATH"] = ":".join(running.needs.env_paths(host, running.observed[host].cache))
    return env


def _await_ready(running: Running, waiting: set[str]) -> None:
    def done(said: Said) -> bool:
        if said.message.get("type") == "ready":
            running.ready[said.process] = said.message
            waiting.discard(said.process)
        return not waiting

    def late() -> DsgdError:
        some = sorted(waiting)
        where = ", ".join(f"{process}@{running.host_of[process]}" for process in some)
        return DeadlinePassed("start", where, START_TIMEOUT_S)

    wait_for(running.watch, done, START_TIMEOUT_S, late)


def _form(running: Running) -> None:
    """Introduce the processes to each other; wait until each has reached those it needs."""
    cluster = running.cluster

    def address(process: str) -> str:
        host = running.addresses[running.host_of[process]].advertise
        port = running.ready[process]["port"]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    servers = [address(names.process_name("server", i)) for i in range(cluster.spec.servers.count)]
    coordinator = address(names.COORDINATOR)
    running.tell(
        names.COORDINATOR,
        {"type": "cluster", "servers": servers, "workers": cluster.spec.workers.count},
        keep=True,
    )
    running.tell_all("worker", lambda host: {"type": "join", "coordinator": coordinator}, keep=True)
    began = time.monotonic()

    def done(said: Said) -> bool:
        if said.message.get("type") == "unreachable":
            raise unreachable(said.message, running.host_of)
        return said.process == names.COORDINATOR and said.message.get("type") == "formed"

    def late() -> DsgdError:
        return DeadlinePassed(
            "forming the cluster", cluster.spec.name, round(time.monotonic() - began)
        )

    wait_for(running.watch, done, START_TIMEOUT_S, late)


def unreachable(message: Message, host_of: dict[str, str]) -> HostError:
    """A process that cannot reach another one: who, whom, at which address, and the remedy."""
    source, target = str(message.get("process")), str(message.get("to"))
    address = str(message.get("address"))
    return HostError(
        host_of.get(source, "?"),
        f"{source} cannot reach {target}@{host_of.get(target, '?')} at {address}: "
        f"{message.get('why')}",
        remedy=f"let {host_of.get(source, 'it')} open TCP connections to {address}, or set "
        "`advertise:` of that host to an address that it can reach",
    )
