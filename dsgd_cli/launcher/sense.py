"""What an algorithm asks of the rest of the description: what cannot be, and what hardly helps.

Pure; paths lead into the specification.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsgd_cli.contract.mistakes import Mistake
from dsgd_cli.contract.names import counted
from dsgd_cli.contract.options import Downpour, Sandblaster, Synchronous
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher import placement

ALGORITHM = ("train", "algorithm")


def mistakes(spec: ClusterSpec) -> Iterator[Mistake]:
    """Why this algorithm cannot run on this cluster."""
    algorithm, workers = spec.train.algorithm, spec.workers.count
    if isinstance(algorithm, Synchronous) and algorithm.backup_workers >= workers:
        backups = algorithm.backup_workers
        yield Mistake(
            (*ALGORITHM, "synchronous", "backup_workers"),
            f"{counted(backups, 'backup worker')} of {counted(workers, 'worker')}:"
            " no gradient is left to wait for",
            f"use at most {workers - 1}, or more than {counted(backups, 'worker')}",
        )
    if isinstance(algorithm, Downpour) and algorithm.warm_start and spec.train.data.per_host:
        yield Mistake(
            (*ALGORITHM, "downpour", "warm_start"),
            "one worker begins alone, but it has the examples of its own host only (`per_host`)",
            "remove `warm_start`; `warm_up` of the optimizer is gentle, too",
        )


def doubts(spec: ClusterSpec) -> Iterator[Mistake]:
    """What is allowed, but is hardly what somebody wants."""
    algorithm, workers = spec.train.algorithm, spec.workers.count
    if isinstance(algorithm, Downpour):
        most = algorithm.max_staleness
        if most is not None and most < workers and workers > 1:  # alone, nothing is late
            yield Mistake(
                (*ALGORITHM, "downpour", "max_staleness"),
                f"with {counted(workers, 'worker')} a push comes about {workers - 1} late: a bound"
                f" of {most} will drop many",
                f"use at least {workers}, or stale_synchronous, which waits instead",
            )
    hosts = placement.eligible(spec.hosts, spec.workers.on)
    if spec.train.data.per_host and workers < len(hosts):
        yield Mistake(
            ("workers",),
            f"{counted(workers, 'worker')} on {len(hosts)} hosts that may have one: with"
            " `per_host`, the examples of hosts without a worker are not used",
            f"use at least {len(hosts)} workers, or name those hosts in `workers.on`",
        )
    if isinstance(algorithm, Sandblaster) and "optimizer" in spec.train.model_fields_set:
        yield Mistake(
            ("train", "optimizer"),
            "sandblaster uses no optimizer: its method finds direction and step",
            "remove it",
            key=True,
        )
