"""Starting processes under their agents, and introducing them to each other.

A cluster has started when every process has said that it is ready, the coordinator has reached
every server, and every worker has joined and reached every server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DeadlinePassed, DsgdError, HostError
from dsgd_cli.launcher.cluster import python_of
from dsgd_cli.launcher.identity import Authority, make_authority
from dsgd_cli.launcher.parallel import on_all
from dsgd_cli.launcher.plan import StartProcess
from dsgd_cli.launcher.remote import Message, Missing
from dsgd_cli.launcher.running import Running
from dsgd_cli.launcher.watch import PROBE, Said, wait_for

START_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 300.0  # it loads the user's data
FEW_SERVERS = 4  # that many can share the smallest of the built-in models
CA_KEY = "ca.key"
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def probe(running: Running) -> None:
    """Try the user's own model and data on the first worker's host, before any server starts.

    What is built in was checked with the description, but for whether so many servers can share
    it. Raises ProcessDied with the traceback, SpecError for too many servers.
    """
    spec = running.cluster.spec
    built_in = spec.train.model.kind == spec.train.data.kind == "builtin"
    if built_in and spec.servers.count <= FEW_SERVERS:
        return
    first = names.process_name("worker", 0)
    host = running.host_of[first]
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
        env=daemon_env(running, host, first),
        restart=False,
        setup=setup,
    )
    wait_for(
        running.watch,
        lambda said: said.process == PROBE and said.message.get("type") == "probed",
        PROBE_TIMEOUT_S,
        "loading model and data",
        lambda: DeadlinePassed("loading model and data", host, PROBE_TIMEOUT_S),
    )


def start_processes(running: Running, starts: Sequence[StartProcess]) -> None:
    """Start what is missing and wait until all of the cluster's processes answer."""
    _take_ready(running, {step.process for step in starts})
    if starts:
        _start(running, starts)
    _await_ready(running)
    form(running)


def _take_ready(running: Running, starting: set[str]) -> None:
    """What runs already has said that it is ready to somebody else, long ago."""
    hello = on_all(
        running.links,
        lambda host: running.links[host].call("hello"),
        phase="agent",
        deadline_s=START_TIMEOUT_S,
    )
    for state in hello.values():
        for process, entry in state["processes"].items():
            if entry.get("ready") and process not in starting:
                running.ready[process] = entry["ready"]


def _start(running: Running, starts: Sequence[StartProcess]) -> None:
    authority = _authority(running)
    by_host: dict[str, list[StartProcess]] = {}
    for step in starts:
        by_host.setdefault(step.host, []).append(step)

    def start(host: str) -> None:
        for step in by_host[host]:
            running.links[host].call("start", **_start_command(running, step, authority))

    on_all(by_host, start, phase="start", deadline_s=START_TIMEOUT_S)


def _authority(running: Running) -> Authority:
    """The cluster's CA: a new one, or the one that the coordinator's host keeps."""
    link = running.links[running.cluster.coordinator_host]
    try:
        return Authority.from_pem(running.cluster_id, link.call("get_secret", name=CA_KEY)["text"])
    except Missing:
        authority = make_authority(running.cluster_id)
        link.call("put_secret", name=CA_KEY, text=authority.pem)
        return authority


def _start_command(running: Running, step: StartProcess, authority: Authority) -> Message:
    """The agent's `start` command for one process."""
    cluster, host = running.cluster, step.host
    role, _ = names.split_process(step.process)
    return {
        "process": step.process,
        "argv": daemon_argv(running, host, step.process),
        "env": daemon_env(running, host, step.process),
        "restart": role == "worker",
        "setup": {
            "process": step.process,
            "cluster": cluster.spec.name,
            "cluster_id": running.cluster_id,
            "bind": running.addresses[host].bind,
            "tls": authority.issue(step.process),
            "results": f"{running.observed[host].state}/results/{cluster.spec.name}",
        },
    }


def daemon_argv(running: Running, host: str, process: str) -> list[str]:
    """The command line of a daemon: no secret and no free text in it."""
    code = running.needs.code_path(host, running.observed[host].cache)
    python = python_of(running.cluster.hosts[host])
    cluster = running.cluster.spec.name
    return [python, "-I", "-u", f"{code}/dsgd_cli/daemons/__main__.py", process, cluster]


def daemon_env(running: Running, host: str, process: str) -> dict[str, str]:
    """One BLAS thread per process unless `threads` says otherwise, its GPU, the path to wheels."""
    workers = running.cluster.spec.workers
    role, _ = names.split_process(process)
    threads = str(workers.threads if role == "worker" else 1)
    env = dict.fromkeys(BLAS_THREADS, threads)
    gpus = running.cluster.gpus
    if process in gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(gpus[process])
    env |= workers.env if role == "worker" else {}
    env["DSGD_PATH"] = ":".join(running.needs.env_paths(host, running.observed[host].cache))
    return env


def _await_ready(running: Running) -> None:
    def waiting() -> list[str]:
        return [p for p in running.host_of if p not in running.ready]

    def done(said: Said) -> bool:
        if said.message.get("type") == "ready":
            running.ready[said.process] = said.message
        return not waiting()

    def late() -> DsgdError:
        first = waiting()[0]
        where = ", ".join(f"{process}@{running.host_of[process]}" for process in waiting())
        return DeadlinePassed(
            "start", where, START_TIMEOUT_S, details=running.watch.last_lines(first)
        )

    if waiting():
        wait_for(running.watch, done, START_TIMEOUT_S, "processes ready?", late)


def form(running: Running) -> None:
    """Introduce the processes to each other; wait until each has reached those it needs."""
    cluster = running.cluster
    servers = range(cluster.spec.servers.count)
    introduction = {
        "type": "cluster",
        "servers": [running.address_of(names.process_name("server", i)) for i in servers],
        "workers": cluster.spec.workers.count,
    }
    running.tell(names.COORDINATOR, introduction, keep=True)
    join = {"type": "join", "coordinator": running.address_of(names.COORDINATOR)}
    running.tell_all("worker", lambda host: join, keep=True)
    began = time.monotonic()

    def done(said: Said) -> bool:
        if said.message.get("type") == "unreachable":
            raise unreachable(said.message, running.host_of)
        return said.process == names.COORDINATOR and said.message.get("type") == "formed"

    def late() -> DsgdError:
        seconds = round(time.monotonic() - began)
        return DeadlinePassed(
            "forming the cluster",
            cluster.spec.name,
            seconds,
            remedy="`dsgd down`, then `dsgd up`: a process there does not answer",
        )

    wait_for(running.watch, done, START_TIMEOUT_S, "processes joined?", late)


def unreachable(message: Message, host_of: Mapping[str, str]) -> HostError:
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
