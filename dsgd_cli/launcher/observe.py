"""What is there: a snapshot of one host, taken by its bootstrap. Reads only.

The only place that makes `ObservedHost` values, so that what a host says is checked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsgd_cli.contract.errors import HostUnfit
from dsgd_cli.launcher.remote import Remote

MINIMUM_PYTHON = (3, 10)
MINIMUM_FREE_BYTES = 300 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """Content hashes that a host should have in its cache."""

    code: str | None = None
    env: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ObservedHost:
    """One host as it is now. `raw` is the whole answer, for what only one reader needs."""

    host: str
    host_id: str
    cluster_id: str | None  # of the living agent
    agent_alive: bool
    remains: bool  # a run directory or processes without a living agent
    processes: Mapping[str, bool]  # name -> alive, as the run directory knows them
    spec: Mapping[str, Any] | None
    missing: Wanted
    ssh_connection: tuple[str, str] | None  # (the launcher's address, the host's address)
    cache: str
    state: str
    run_dir: str
    raw: Mapping[str, Any]


def observe(remote: Remote, cluster: str, wanted: Wanted) -> ObservedHost:
    """Ask a host what is there. Raises HostUnfit where dsgd cannot run."""
    answer = remote.call(
        "observe",
        cluster=cluster,
        wanted={"code": wanted.code, "env": list(wanted.env), "files": list(wanted.files)},
    )
    agent = answer.get("agent") or {}
    alive = bool(agent.get("alive"))
    processes = answer.get("processes") or {}
    missing = answer["missing"]
    return ObservedHost(
        host=remote.host,
        host_id=str(answer["host_id"]),
        cluster_id=str(agent["cluster_id"]) if alive else None,
        agent_alive=alive,
        remains=not alive and bool(agent or processes or answer.get("leftovers")),
        processes={name: bool(entry.get("alive")) for name, entry in processes.items()},
        spec=answer.get("spec") if alive else None,
        missing=Wanted(
            code=wanted.code if missing.get("code") else None,
            env=tuple(missing.get("env") or ()),
            files=tuple(missing.get("files") or ()),
        ),
        ssh_connection=_ends(answer.get("ssh_connection")),
        cache=str(answer["cache"]),
        state=str(answer["state"]),
        run_dir=str(answer["run_dir"]),
        raw=answer,
    )


def check_fit(observed: ObservedHost) -> None:
    """Raise HostUnfit for a host that could not run the daemons."""
    raw = observed.raw
    version = tuple(raw["python"][:2])
    if version < MINIMUM_PYTHON:
        raise HostUnfit(
            observed.host,
            f"python {'.'.join(map(str, raw['python']))} is too old: dsgd needs 3.10 or newer",
            remedy="set `python:` for this host to a newer python3",
        )
    if raw["system"] != "Linux":
        raise HostUnfit(observed.host, f"runs {raw['system']}: dsgd's processes need Linux")
    free = int(raw.get("disk_free_bytes") or MINIMUM_FREE_BYTES)
    if free < MINIMUM_FREE_BYTES:
        raise HostUnfit(
            observed.host,
            f"only {free >> 20} MB free at {observed.cache}, dsgd needs {MINIMUM_FREE_BYTES >> 20}",
            remedy="free some space there, or set XDG_CACHE_HOME for that user",
        )


def check_distinct(observed: Sequence[ObservedHost]) -> None:
    """Raise HostUnfit when two entries of `hosts` are the same machine."""
    seen: dict[str, str] = {}
    for host in observed:
        first = seen.setdefault(host.host_id, host.host)
        if first != host.host:
            raise HostUnfit(
                host.host,
                f"is the same machine as {first!r} ({host.host_id})",
                remedy="list each machine once under `hosts`",
            )


def _ends(ssh_connection: str | None) -> tuple[str, str] | None:
    """SSH_CONNECTION is `client_ip client_port server_ip server_port`."""
    parts = (ssh_connection or "").split()
    return (parts[0], parts[2]) if len(parts) == 4 else None
