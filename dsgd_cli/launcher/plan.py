"""Observed and desired -> steps. Pure: no I/O, the same input gives the same plan.

Each step says on which host it happens and why; `execute` carries them out and decides nothing.
A cluster is replaced as a whole when what its processes depend on has changed; otherwise only
what is missing is started, and a plan without steps means that there is nothing to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsgd_cli.launcher.observe import ObservedHost
from dsgd_cli.launcher.placement import Placed


@dataclass(frozen=True, slots=True)
class Ship:
    """Send what the host's cache lacks."""

    host: str
    code: bool
    wheels: tuple[str, ...]
    files: tuple[str, ...]

    def __str__(self) -> str:
        things = ["code"] if self.code else []
        things += [f"{len(self.wheels)} wheels"] if self.wheels else []
        things += [f"{len(self.files)} files"] if self.files else []
        return f"+ {self.host}  send {', '.join(things)}  (not in its cache)"


@dataclass(frozen=True, slots=True)
class Clear:
    """Take down what is there."""

    host: str
    why: str

    def __str__(self) -> str:
        return f"- {self.host}  clear  ({self.why})"


@dataclass(frozen=True, slots=True)
class StartAgent:
    """Start the host's agent."""

    host: str
    why: str

    def __str__(self) -> str:
        return f"+ {self.host}  agent  ({self.why})"


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start one process under the host's agent."""

    host: str
    process: str
    why: str

    def __str__(self) -> str:
        return f"+ {self.process}@{self.host}  ({self.why})"


Step = Ship | Clear | StartAgent | StartProcess


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in their order, and what they amount to."""

    steps: tuple[Step, ...]
    cluster_id: str | None  # of the living cluster that is kept; None: a new one is made
    replaces: bool  # a living cluster is stopped for it

    @property
    def starts(self) -> tuple[StartProcess, ...]:
        return tuple(step for step in self.steps if isinstance(step, StartProcess))

    def __str__(self) -> str:
        return "\n".join(str(step) for step in self.steps)


def fingerprint(process_spec: Mapping[str, Any]) -> str:
    """A short hash of all that the running processes depend on."""
    text = json.dumps(process_spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plan(placed: Sequence[Placed], wanted_print: str, observed: Mapping[str, ObservedHost]) -> Plan:
    """The steps from `observed` to all of `placed` running."""
    used = _ordered_hosts(placed)
    keep = _kept_cluster(wanted_print, observed)
    living = any(host.agent_alive for host in observed.values())
    steps: list[Step] = []
    for name, host in observed.items():
        if host.agent_alive and keep is None:
            steps.append(Clear(name, "the cluster there differs from this description"))
        elif host.remains:
            steps.append(Clear(name, "left by a cluster whose agent is gone"))
    steps += [_ship(observed[name]) for name in used if _lacks(observed[name])]
    for name in used:
        if keep is None or not observed[name].agent_alive:
            steps.append(StartAgent(name, "not running"))
    for item in placed:
        host = observed[item.host]
        if keep is None or not host.agent_alive:
            steps.append(StartProcess(item.host, item.process, "not running"))
        elif not host.processes.get(item.process, False):
            why = "died" if item.process in host.processes else "not running"
            steps.append(StartProcess(item.host, item.process, why))
    return Plan(tuple(steps), keep, living and keep is None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`~ threads: 1 -> 2`, a line for each leaf that differs."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"~ {name}: {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _ordered_hosts(placed: Sequence[Placed]) -> list[str]:
    return list(dict.fromkeys(item.host for item in placed))


def _kept_cluster(wanted_print: str, observed: Mapping[str, ObservedHost]) -> str | None:
    """The id of the living cluster if all its agents agree and it is the one described."""
    alive = [host for host in observed.values() if host.agent_alive]
    ids = {host.cluster_id for host in alive}
    prints = {(host.spec or {}).get("fingerprint") for host in alive}
    return ids.pop() if len(ids) == 1 and prints == {wanted_print} else None


def _lacks(host: ObservedHost) -> bool:
    return bool(host.missing.code or host.missing.env or host.missing.files)


def _ship(host: ObservedHost) -> Ship:
    return Ship(host.host, host.missing.code is not None, host.missing.env, host.missing.files)
