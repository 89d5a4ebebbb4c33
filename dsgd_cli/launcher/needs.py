"""What each host must have before its processes can start, and where they find it there.

Hosts over SSH get dsgd's code, the wheels that fit them (and those of the user's requirements) and
the user's files, each in their cache under its content hash. This machine uses what it has: the
launcher's interpreter, its packages, and the user's files where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dsgd_cli
from dsgd_cli.contract.references import DataRef, ModelRef
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher import ship
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.environment import EXTRAS, Extra, Wheel, pip_timeout_s, wheels_for
from dsgd_cli.launcher.modules import find_module
from dsgd_cli.launcher.observe import ObservedHost, Wanted
from dsgd_cli.launcher.parallel import on_all
from dsgd_cli.launcher.plan import Ship
from dsgd_cli.launcher.watch import Screen

SHIP_DEADLINE_S = 600.0  # above the progress-based deadline of each stream
WHEELS_SLACK_S = 30.0  # for all but pip
HERE = Path(dsgd_cli.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Needs:
    """What to have on which host. Hashes name folders in a host's cache."""

    code: ship.Bundle
    wheels: Mapping[str, tuple[Wheel, ...]]  # host -> wheels; nothing for this machine
    files: Mapping[str, Path]  # "model" | "data" -> the user's file or folder on this machine
    on_host: Mapping[str, str]  # "model" | "data" -> a path that is on the hosts already
    local: frozenset[str]

    @property
    def code_hash(self) -> str:
        return self.code.hash

    @cached_property
    def bundles(self) -> Mapping[str, ship.Bundle]:
        """The user's files as bundles: hashed only when some host is not this machine."""
        return {what: ship.file_bundle(path) for what, path in self.files.items()}

    def wanted(self, hosts: Sequence[str]) -> dict[str, Wanted]:
        """Content hashes per host."""
        return {
            host: Wanted(
                self.code.hash,
                self.env_hashes(host),
                tuple(bundle.hash for bundle in self.bundles.values()),
            )
            for host in hosts
            if host not in self.local
        }

    def env_hashes(self, host: str) -> tuple[str, ...]:
        return tuple(wheel.hash for wheel in self.wheels.get(host, ()))

    def code_path(self, host: str, cache: str) -> str:
        """The folder that holds the package `dsgd_cli` on this host."""
        return str(HERE) if host in self.local else f"{cache}/code/{self.code.hash}"

    def env_paths(self, host: str, cache: str) -> list[str]:
        """The folders of the wheels on this host, for sys.path."""
        return [f"{cache}/env/{name}" for name in self.env_hashes(host)]

    def file_path(self, host: str, cache: str, what: str) -> str | None:
        """Where the user's model or data is on this host; None for what is built in."""
        if what in self.on_host:
            return self.on_host[what]
        if what not in self.files:
            return None
        path = self.files[what]
        if host in self.local:
            return str(path)
        return f"{cache}/files/{self.bundles[what].hash}/{path.name}"


def needs_of(cluster: Cluster, observed: Mapping[str, ObservedHost], screen: Screen) -> Needs:
    """Find out what each observed host needs. Downloads wheels that nobody has yet."""
    spec = cluster.spec
    local = frozenset(name for name, host in cluster.hosts.items() if host.transport == "local")
    remote = [name for name in observed if name not in local]
    wheels = _wheels(cluster, remote, observed, screen) if spec.env.packages == "ship" else {}
    files: dict[str, Path] = {}
    on_host: dict[str, str] = {}
    references: dict[str, ModelRef | DataRef] = {"model": spec.train.model, "data": spec.train.data}
    for what, reference in references.items():
        if reference.on_host:
            on_host[what] = reference.path
        elif reference.path:
            files[what] = Path(reference.path).resolve()
        elif reference.kind == "module" and (found := find_module(reference.name)) is not None:
            files[what] = found
    return Needs(ship.code_bundle(), wheels, files, on_host, local)


def _wheels(
    cluster: Cluster, hosts: Sequence[str], observed: Mapping[str, ObservedHost], screen: Screen
) -> dict[str, tuple[Wheel, ...]]:
    """What every host needs; and where there are workers, what these need besides."""
    extras = _extras(cluster.spec)

    def one(host: str) -> tuple[Wheel, ...]:
        besides = extras if host in cluster.with_workers else ()
        return wheels_for(host, observed[host].raw, screen.note, besides)

    deadline_s = pip_timeout_s(extras) + WHEELS_SLACK_S
    return on_all(hosts, one, phase="wheels", deadline_s=deadline_s)


def _extras(spec: ClusterSpec) -> list[Extra]:
    """What reads the data, and what the user's model imports."""
    extras: list[Extra] = [name for name in EXTRAS if name == spec.train.data.kind]
    if spec.env.requirements:
        extras.append(Path(spec.env.requirements))
    return extras


def send_missing(cluster: Cluster, steps: Sequence[Ship], needs: Needs, screen: Screen) -> None:
    """Send each host what its cache lacks, all hosts at once, on a stream of their own."""
    by_host = {step.host: step for step in steps}

    def one(host: str) -> None:
        step = by_host[host]
        bundles = [needs.code] if step.code else []
        bundles += [
            ship.wheel_bundle(wheel) for wheel in needs.wheels[host] if wheel.hash in step.wheels
        ]
        bundles += [each for each in needs.bundles.values() if each.hash in step.files]
        size = sum(bundle.size for bundle in bundles)
        screen.note(f"{host}: sending {len(bundles)} bundles, {size / 1e6:.1f} MB")
        remote = cluster.open(host)
        try:
            ship.send_all(remote, bundles)
        finally:
            remote.close()

    on_all(by_host, one, phase="ship", deadline_s=SHIP_DEADLINE_S)
