"""Connections to the hosts of one cluster: what every command begins with and ends by closing.

A `Cluster` knows how to reach each host of a description and opens bootstraps there, many hosts at
once. It remembers nothing else: what runs is asked of the hosts each time.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.contract.names import split_process
from dsgd_cli.contract.spec import ClusterSpec, Host
from dsgd_cli.launcher.hosts import with_defaults
from dsgd_cli.launcher.observe import ObservedHost, Wanted, check_distinct, check_fit, observe
from dsgd_cli.launcher.parallel import attempt, on_all
from dsgd_cli.launcher.placement import Placed, gpus, place
from dsgd_cli.launcher.remote import Message, Remote
from dsgd_cli.transport.base import Transport

CONNECT_DEADLINE_S = 45.0  # above the transport's own deadlines and retries


class Cluster:
    """The hosts of one description, and the open connections to them."""

    def __init__(
        self,
        spec: ClusterSpec,
        say: Callable[[str], None],
        connect_timeout_s: float | None = None,
    ) -> None:
        self.spec = spec = with_defaults(spec)
        self.say = say
        self.placed: tuple[Placed, ...] = place(spec)
        self.gpus: dict[str, int] = gpus(self.placed, spec.hosts)
        self.hosts: dict[str, Host] = {host.name: host for host in spec.hosts}
        self.used: tuple[str, ...] = tuple(dict.fromkeys(item.host for item in self.placed))
        self.with_workers = frozenset(
            item.host for item in self.placed if split_process(item.process)[0] == "worker"
        )
        self.coordinator_host = next(
            item.host for item in self.placed if item.process == "coordinator/0"
        )
        self.transports: dict[str, Transport] = {
            name: transport_for(host, spec, say, connect_timeout_s or spec.ssh.connect_timeout_s)
            for name, host in self.hosts.items()
        }
        self.remotes: dict[str, Remote] = {}
        self.touched: set[str] = set()  # hosts on which this command changed something

    def open(self, host: str) -> Remote:
        """A new bootstrap on this host."""
        return Remote(self.transports[host], python_of(self.hosts[host]))

    def connect(self, hosts: Iterable[str] | None = None) -> None:
        """Open one bootstrap on each host, all at once. Raises what `on_all` raises."""
        names = list(self.used if hosts is None else hosts)
        self.remotes.update(
            on_all(names, self.open, phase="connect", deadline_s=CONNECT_DEADLINE_S)
        )

    def connect_where_possible(self) -> dict[str, DsgdError]:
        """As `connect` on all hosts; returns the errors of those that do not answer."""
        remotes, errors = attempt(
            self.hosts, self.open, phase="connect", deadline_s=CONNECT_DEADLINE_S
        )
        self.remotes.update(remotes)
        return errors

    def hold(self) -> None:
        """Take the cluster's lock, at the coordinator's host. Raises ClusterHeld."""
        remote = self.remotes[self.coordinator_host]
        remote.call("hold", cluster=self.spec.name, owner=owner())

    def observe(self, wanted: dict[str, Wanted]) -> dict[str, ObservedHost]:
        """Look at all connected hosts at once."""
        return on_all(
            self.remotes,
            lambda name: observe(self.remotes[name], self.spec.name, wanted.get(name) or Wanted()),
            phase="observe",
            deadline_s=30.0,
        )

    def check(self, observed: dict[str, ObservedHost]) -> None:
        """Refuse hosts that cannot run dsgd, and the same machine listed twice."""
        for host in observed.values():
            check_fit(host)
        check_distinct(list(observed.values()))

    def close(self) -> None:
        # Copies: what a second Ctrl-C broke off may still be at them, in a thread of its own.
        for remote in tuple(self.remotes.values()):
            remote.close()
        for transport in tuple(self.transports.values()):
            transport.close()


def transport_for(
    host: Host, spec: ClusterSpec, say: Callable[[str], None], connect_timeout_s: float
) -> Transport:
    """The road to a host. paramiko is imported only when a host needs it."""
    if host.transport == "local":
        from dsgd_cli.transport.local import LocalTransport

        return LocalTransport(host.name)
    from dsgd_cli.transport.ssh import SshTransport

    return SshTransport(
        host.name,
        host.address,
        port=host.port,
        user=host.user,
        identity_file=host.identity_file,
        host_key=host.host_key,
        host_keys=spec.ssh.host_keys,
        connect_timeout_s=connect_timeout_s,
        on_accept=say,
    )


def python_of(host: Host) -> str:
    """The interpreter that starts things on a host: the launcher's own one on this machine."""
    return sys.executable if host.transport == "local" else host.python or "python3"


def owner() -> Message:
    """Who holds the cluster: shown to whoever else asks."""
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


@dataclass(frozen=True, slots=True)
class Address:
    """Where a host's daemons listen, and where the others find them."""

    bind: str
    advertise: str


def advertised(hosts: Sequence[Host], observed: dict[str, ObservedHost]) -> dict[str, Address]:
    """The addresses of each host's daemons.

    A host is advertised at the address on which we reached it; this machine, in a cluster with
    others, at the address at which they see us. `advertise:` in the YAML wins, and then the
    daemons listen on all addresses, since that one may be a translated one.
    """
    seen = [ends[0] for host in observed.values() if (ends := host.ssh_connection) is not None]
    addresses: dict[str, Address] = {}
    for host in hosts:
        if host.name not in observed:
            continue
        ends = observed[host.name].ssh_connection
        if host.advertise:
            addresses[host.name] = Address("0.0.0.0", host.advertise)
        elif host.transport == "ssh" and ends is not None:
            addresses[host.name] = Address(ends[1], ends[1])
        else:
            address = seen[0] if seen else "127.0.0.1"
            addresses[host.name] = Address(address, address)
    return addresses
