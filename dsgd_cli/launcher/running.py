"""A living cluster as its launcher sees it: links to the agents, their events, the lease."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from dsgd_cli.launcher.cluster import Address, Cluster, advertised
from dsgd_cli.launcher.lease import Renewal
from dsgd_cli.launcher.needs import Needs
from dsgd_cli.launcher.observe import ObservedHost
from dsgd_cli.launcher.parallel import on_all
from dsgd_cli.launcher.remote import AgentLink, Message
from dsgd_cli.launcher.watch import Screen, Watch

RELEASE_TIMEOUT_S = 10.0


@dataclass
class Running:
    """Made when every agent is joined; `ready` fills up as the processes answer."""

    cluster: Cluster
    cluster_id: str
    observed: dict[str, ObservedHost]
    needs: Needs
    links: dict[str, AgentLink]
    watch: Watch
    renewal: Renewal
    ready: dict[str, Message] = field(default_factory=dict)

    @cached_property
    def addresses(self) -> dict[str, Address]:
        """Where the daemons of each host listen."""
        return advertised(list(self.cluster.hosts.values()), self.observed)

    @cached_property
    def host_of(self) -> dict[str, str]:
        """process -> host"""
        return {item.process: item.host for item in self.cluster.placed}

    def address_of(self, process: str) -> str:
        """`host:port` at which the others find a process that listens."""
        host = self.addresses[self.host_of[process]].advertise
        port = self.ready[process]["port"]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def files(self, host: str) -> Message:
        """Where the user's model and data are on this host."""
        cache = self.observed[host].cache
        return {what: self.needs.file_path(host, cache, what) for what in ("model", "data")}

    def tell(
        self, process: str, message: Message, *, keep: bool = False, timeout_s: float = 30.0
    ) -> None:
        """Send a message to a process, through its agent."""
        link = self.links[self.host_of[process]]
        link.call("tell", process=process, message=message, keep=keep, timeout_s=timeout_s)

    def tell_all(self, role: str, message: Callable[[str], Message], *, keep: bool) -> None:
        """Send each process of a role the message for its host."""
        for item in self.cluster.placed:
            if item.process.startswith(f"{role}/"):
                self.tell(item.process, message(item.host), keep=keep)

    def release(self, idle_s: float) -> None:
        """Stop renewing and leave the cluster alive for `idle_s`."""
        self.renewal.stop()
        on_all(
            self.links,
            lambda host: self.links[host].call("lease", holder="idle", seconds=idle_s),
            phase="release",
            deadline_s=RELEASE_TIMEOUT_S,
        )

    def close(self) -> None:
        self.watch.ending = True
        self.renewal.stop()
        for link in self.links.values():
            link.close()


def running_cluster(
    cluster: Cluster,
    cluster_id: str,
    observed: dict[str, ObservedHost],
    needs: Needs,
    join: Callable[[str, queue.SimpleQueue[tuple[str, Message]]], AgentLink],
    screen: Screen,
    timeout_s: float,
) -> Running:
    """Join the agents of all hosts at once and begin to renew their lease."""
    events: queue.SimpleQueue[tuple[str, Message]] = queue.SimpleQueue()
    links = on_all(
        cluster.used, lambda host: join(host, events), phase="agent", deadline_s=timeout_s
    )
    watch = Watch(events, screen, cluster.coordinator_host)
    renewal = Renewal(links, cluster.spec.lease_s)
    renewal.start()
    return Running(cluster, cluster_id, observed, needs, links, watch, renewal)
