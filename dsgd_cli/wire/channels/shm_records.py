"""What the two ends of a shm channel say to each other: records of fixed sizes, host byte order.

    worker  hello (+ the descriptor of its gradients)                          once
    server  welcome (+ the descriptors of the shard and of snapshots, if any)  once
    worker  request [+ a version per block]                                    per exchange
    server  reply [+ the message of a refusal] ... the last one is marked      per block

No length comes from the other side's memory, and none in a record is believed: what is not exactly
what the shard's shape says ends the connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsgd_cli.wire.channels.base import HeldShard, Route

MAGIC = b"dsgdshm1"
TICKET_BYTES = 16

HELLO = struct.Struct("=8s16sQII")  # magic, ticket, memory bytes, word, processes like the server
WELCOME = struct.Struct("=8sQI")  # magic, memory bytes, whether there are snapshots
REQUEST = struct.Struct("=QQIB3x")  # seq, offset, number of versions that follow, operation
REPLY = struct.Struct("=QQQQIHBBB")

STATE, FRESH, REFUSED = range(3)


class Reply(NamedTuple):
    """About one block. A refusal: `version` is the reason, `seq` the length of its message."""

    version: int
    incarnation: int
    seq: int
    stamp: int  # of the snapshot
    block: int
    processes: int  # that take part on the server's host, as the server knows
    place: int  # of the snapshot to read; 0: read the shard
    kind: int
    last: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """What lets one connection in."""

    route: Route
    held: HeldShard
    ends_at: float  # by the monotonic clock


def host() -> str:
    """Two processes that say the same can meet at an abstract socket: one kernel, one network."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return ""
