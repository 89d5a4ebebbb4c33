"""Names: the few strings that become file names, DNS names and log prefixes.

Every name that enters the program passes one of these patterns, so that no path, certificate or
command line is ever built from free text.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ROLES = ("coordinator", "server", "worker")
PROCESS = re.compile(r"(coordinator|server|worker)/(0|[1-9][0-9]{0,4})")
COORDINATOR = "coordinator/0"
TRAINING_METRIC = "training_"  # begins the names of metrics that are not of the held-out examples


def process_name(role: str, index: int) -> str:
    """`worker/3`: how a process is written everywhere (logs, run directory, errors)."""
    return f"{role}/{index}"


def split_process(process: str) -> tuple[str, int]:
    """`worker/3` -> ("worker", 3). Raises ValueError when it is not a process name."""
    match = PROCESS.fullmatch(process)
    if match is None:
        raise ValueError(f"not a process name: {process!r}")
    return match[1], int(match[2])


def dns_name(process: str, cluster_id: str) -> str:
    """The DNS name in a daemon's certificate: `worker-3.<cluster_id>.dsgd`."""
    role, index = split_process(process)
    return f"{role}-{index}.{cluster_id}.dsgd"


def parse_dns_name(name: str) -> tuple[str, str]:
    """`worker-3.<cluster_id>.dsgd` -> ("worker/3", cluster_id). Raises ValueError otherwise."""
    match = re.fullmatch(r"(coordinator|server|worker)-([0-9]{1,5})\.([0-9a-f]{16})\.dsgd", name)
    if match is None:
        raise ValueError(f"not a dsgd certificate name: {name!r}")
    return process_name(match[1], int(match[2])), match[3]


def counted(number: int, what: str) -> str:
    """`1 server`, `2 servers`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
