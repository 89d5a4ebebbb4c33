"""The patterns of everything that becomes a file name or a process's marker on a host.

Checked again here, on the host, whatever the launcher checked: a request that does not match is
refused before any path is built from it.
"""

from __future__ import annotations

import re
from typing import Any

from dsgd_cli.agent.framing import Refused

CLUSTER = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
CLUSTER_ID = re.compile(r"[0-9a-f]{16}")
DAEMON = re.compile(r"(coordinator|server|worker)/(0|[1-9][0-9]{0,4})")
PROCESS = re.compile(DAEMON.pattern + "|probe")
HASH = re.compile(r"[0-9a-f]{8,128}")
SECRET = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\.key")


def checked(pattern: re.Pattern[str], value: Any, what: str) -> str:
    """`value`, when it is a string that matches as a whole; Refused("invalid") otherwise."""
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise Refused("invalid", f"not a {what}: {ascii(value)[:100]}")
    return value


def cluster(value: Any) -> str:
    return checked(CLUSTER, value, "cluster name")


def process(value: Any) -> str:
    return checked(PROCESS, value, "process name")


def file_stem(process: str) -> str:
    """`worker/3` -> `worker-3`: the process's name as a file name."""
    return process.replace("/", "-")


def process_of(stem: str) -> str:
    """`worker-3` -> `worker/3`."""
    return stem.replace("-", "/")
