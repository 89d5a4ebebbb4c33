"""Take a cluster down and verify it from outside: the receipt is not the agent's word.

Two bootstraps on each host: the first stops everything there, a fresh second one looks for what is
left. Idempotent: nothing there is not an error. A host that does not answer is reported with the
time at which its own lease ends; all the others are cleaned all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsgd_cli.contract.errors import ConnectFailed, DsgdError, Interrupted, TeardownIncomplete
from dsgd_cli.contract.names import PROCESS
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.interrupt import FORCED_CODE
from dsgd_cli.launcher.observe import Wanted, observe
from dsgd_cli.launcher.parallel import attempt
from dsgd_cli.launcher.remote import Message

GRACE_S = 5.0
DEADLINE_S = 30.0
FORCED_DOWN_S = 2.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a teardown did: counted by the hosts, verified by fresh bootstraps."""

    stopped: int
    left: tuple[str, ...]  # what is still there, in words; hosts that did not answer
    results: tuple[str, ...]  # results that are not home yet: host:path
    placed: int

    def __str__(self) -> str:
        if not self.stopped and not self.left:
            return "nothing running, 0 left"
        return f"stopped {self.stopped}/{max(self.placed, self.stopped)}, {len(self.left)} left"

    def check(self) -> None:
        """Raise TeardownIncomplete unless nothing is left."""
        if self.left:
            raise TeardownIncomplete(
                f"{self}",
                details=self.left,
                remedy="`dsgd down` again when the host answers",
            )


def take_down(
    cluster: Cluster,
    hosts: Iterable[str] | None = None,
    *,
    grace_s: float = GRACE_S,
    deadline_s: float = DEADLINE_S,
    purge: bool = False,
    lease_ends: Mapping[str, float | None] | None = None,
    known_errors: Mapping[str, DsgdError] | None = None,
) -> Receipt:
    """Stop everything that the cluster has on these hosts (default: all of its hosts).

    `known_errors` are hosts that have just failed to answer: they are reported, not tried again.
    """
    known = dict(known_errors or {})

    began = time.monotonic()
    chosen = [h for h in (cluster.hosts if hosts is None else hosts) if h not in known]
    # Count on all hosts before anything is stopped on any: the rest of a cluster may go by itself.
    before, lost = attempt(
        chosen, lambda host: _living(cluster, host), phase="down", deadline_s=deadline_s
    )
    results, errors = attempt(
        before,
        lambda host: _take_down_host(cluster, host, grace_s, purge),
        phase="down",
        deadline_s=max(0.5, deadline_s - (time.monotonic() - began)),
    )
    errors = {**known, **lost, **errors}
    left: list[str] = []
    for host, found in results.items():
        left += [
            f"{host}: process {entry['pid']} {entry.get('process') or entry.get('cmdline')}"
            for entry in found["left"]
        ]
        left += [f"{host}: {path}" for path in found["files"]]
    for host, error in errors.items():
        left.append(_unreachable(cluster, host, error, (lease_ends or {}).get(host)))
    return Receipt(
        stopped=sum(before[host] - len(found["left"]) for host, found in results.items()),
        left=tuple(left),
        results=tuple(
            f"{host}:{entry['path']}"
            for host, found in results.items()
            for entry in found.get("results") or ()
        ),
        placed=len(cluster.placed),
    )


def kill(cluster: Cluster, lease_ends: Mapping[str, float | None] | None = None) -> Receipt:
    """After a second Ctrl-C: KILL all that this command touched, and wait for two seconds."""
    return take_down(
        cluster,
        cluster.touched,
        grace_s=0.0,
        deadline_s=FORCED_DOWN_S,
        lease_ends=lease_ends,
    )


def killed(cluster: Cluster) -> Interrupted:
    """`kill`, and the error that ends the command."""
    receipt = kill(cluster)
    message = f"killed by a second Ctrl-C: {receipt}"
    return Interrupted(message, FORCED_CODE, details=receipt.left)


def _living(cluster: Cluster, host: str) -> int:
    """How many daemons of the cluster live on this host. Its connection stays open."""
    name = cluster.spec.name
    try:
        remote = cluster.remotes.get(host) or cluster.open(host)
        seen = observe(remote, name, Wanted())
    except ConnectFailed:
        if host not in cluster.remotes:
            raise
        cluster.remotes.pop(host).close()  # an old connection, broken meanwhile: a new one
        remote = cluster.open(host)
        seen = observe(remote, name, Wanted())
    cluster.remotes[host] = remote
    return sum(alive for process, alive in seen.processes.items() if PROCESS.fullmatch(process))


def _take_down_host(cluster: Cluster, host: str, grace_s: float, purge: bool) -> Message:
    """Stop everything there; what a fresh bootstrap finds afterwards."""
    name = cluster.spec.name
    remote = cluster.remotes.pop(host)
    try:
        remote.call("teardown", cluster=name, grace_s=grace_s)
        if purge:
            remote.call("purge", cluster=name)
    finally:
        remote.close()
    fresh = cluster.open(host)
    try:
        return fresh.call("verify", cluster=name)
    finally:
        fresh.close()


def _unreachable(cluster: Cluster, host: str, error: DsgdError, ends_at: float | None) -> str:
    if ends_at is None:  # somebody else's lease: the longest that it can be
        longest = max(cluster.spec.lease_s, cluster.spec.idle_timeout_s)
        return (
            f"{error.message}; what runs there stops by itself by "
            f"{_clock(time.time() + longest)} at the latest (lease)"
        )
    return f"{error.message}; {host} self-stops by {_clock(ends_at)} (lease)"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
