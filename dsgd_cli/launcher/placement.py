"""Which process runs on which host. Pure: the same specification gives the same placement.

Servers and workers are spread in contiguous, even blocks over their hosts, in the order in which
the hosts are listed; a host's `slots` bounds its workers. The coordinator runs with `server/0`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.contract.mistakes import Mistake, did_you_mean, show
from dsgd_cli.contract.names import COORDINATOR, counted, process_name, split_process
from dsgd_cli.contract.spec import ClusterSpec, Host
from dsgd_cli.launcher.hosts import expand


@dataclass(frozen=True, slots=True)
class Placed:
    """One process and the name of its host."""

    process: str
    host: str


def place(spec: ClusterSpec) -> tuple[Placed, ...]:
    """Every process of the cluster, the coordinator first. Raises SpecError when it cannot be."""
    wrong = list(mistakes(spec))
    if wrong:
        raise SpecError(str(wrong[0]))
    servers = _spread(spec.servers.count, eligible(spec.hosts, spec.servers.on), None)
    workers = eligible(spec.hosts, spec.workers.on)
    placed = [Placed(COORDINATOR, servers[0])]
    placed += [Placed(process_name("server", i), host) for i, host in enumerate(servers)]
    where = _spread(spec.workers.count, workers, [_limit(host) for host in workers])
    placed += [Placed(process_name("worker", i), host) for i, host in enumerate(where)]
    return tuple(placed)


def mistakes(spec: ClusterSpec) -> Iterator[Mistake]:
    """Why this specification cannot be placed; paths lead into `spec`."""
    yield from _unmatched(spec.hosts, "servers", spec.servers.on)
    unmatched = list(_unmatched(spec.hosts, "workers", spec.workers.on))
    yield from unmatched
    hosts = [] if unmatched else eligible(spec.hosts, spec.workers.on)
    limits = map(_limit, hosts)
    slots = sum(spec.workers.count if limit is None else limit for limit in limits)
    if hosts and spec.workers.count > slots:
        workers = counted(spec.workers.count, "worker")
        what = f"{workers}, but their hosts have {counted(slots, 'slot')}"
        yield Mistake(("workers", "count"), what, "add hosts or slots, or use fewer workers")


def gpus(placed: Iterable[Placed], hosts: Iterable[Host]) -> dict[str, int]:
    """worker -> which of its host's GPUs is its own, on hosts with `slots: {gpu: n}`."""
    free = {host.name: itertools.count() for host in hosts if host.slots and host.slots.gpu}
    return {
        item.process: next(free[item.host])
        for item in placed
        if item.host in free and split_process(item.process)[0] == "worker"
    }


def partitions(hosts: Sequence[str]) -> list[int]:
    """The hosts of the workers -> numbers from 0 in the order in which they first come."""
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]


def _limit(host: Host) -> int | None:
    return None if host.slots is None else host.slots.limit


def _unmatched(hosts: Sequence[Host], role: str, patterns: Sequence[str]) -> Iterator[Mistake]:
    """Patterns that are wrong, or match no host."""
    for index, pattern in enumerate(patterns):
        try:
            matched = eligible(hosts, (pattern,))
        except ValueError as bad:
            yield Mistake((role, "on", index), *bad.args)
            continue
        if not matched:
            hint = did_you_mean(pattern, [host.name for host in hosts[:20]])
            yield Mistake((role, "on", index), f"no host matches {show(pattern)}", hint)


def eligible(hosts: Sequence[Host], patterns: Sequence[str]) -> list[Host]:
    """The hosts whose names match any of the patterns, in their own order; no pattern: all.

    A pattern is a name, a glob (`gpu*`), or a range (`gpu[1-4]`, which is never a glob's set).
    """
    if not patterns:
        return list(hosts)
    globs = [name for pattern in patterns for name in expand(pattern)]
    exact = {name for name in globs if "*" not in name and "?" not in name}
    wild = [name for name in globs if name not in exact]
    return [
        host
        for host in hosts
        if host.name in exact or any(fnmatchcase(host.name, glob) for glob in wild)
    ]


def _spread(count: int, hosts: Sequence[Host], slots: Sequence[int | None] | None) -> list[str]:
    """`count` processes in contiguous blocks over the hosts, as even as their slots allow.

    The slots must suffice. Who has the fewest is filled first; as soon as all that are left have
    room for an even share, they get it.
    """
    limits = [count if slot is None else slot for slot in slots or [None] * len(hosts)]
    shares = [0] * len(hosts)
    left = count
    by_room = sorted(range(len(hosts)), key=lambda i: limits[i])
    for done, i in enumerate(by_room):
        others = len(hosts) - done
        if limits[i] * others > left:
            share, extra = divmod(left, others)
            for position, other in enumerate(sorted(by_room[done:])):
                shares[other] = share + (position < extra)
            break
        shares[i] = limits[i]
        left -= limits[i]
    return [host.name for host, share in zip(hosts, shares, strict=True) for _ in range(share)]
