"""What the two ends of a shm channel say to each other, and where: host byte order.

    worker  hello (+ the descriptor of its gradients)                     on the socket, once
    server  welcome (+ those of the shard, its answers and snapshots)     on the socket, once
    worker  its desk: a request, how far it has read, whether it sleeps   in its own memory
    server  its answers: one per block, a refusal, whether it sleeps      in its own memory

Each memory has one writer. A request is there when its number has changed; an answer when it bears
the number of the request. Both ends look while they have a core to look with; whoever is about to
sleep says so and looks once more, and is woken by a byte on the socket (`RING`), which otherwise
only shows that the other side lives. No length comes from the other side's memory: what is not
exactly what the shard's shape says ends the connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsgd_cli.wire.channels.base import HeldShard, Route

MAGIC = b"dsgdshm2"
TICKET_BYTES = 16
RING = b"!"

HELLO = struct.Struct("=8s16sQII")  # magic, ticket, memory bytes, desk, processes like the server
WELCOME = struct.Struct("=8sQI")  # magic, memory bytes, whether there are snapshots

# A desk: words of 8 bytes, a cache line, in the worker's memory.
DESK_BYTES = 64
PROGRESS, ASKED, SLEEPS, REQUEST_AT = range(4)
REQUEST = struct.Struct("=QQQQ")  # seq, offset, operation, tag

# The answers: a page of words about all of them, then a cache line for each block.
HEAD_BYTES = 4096
SERVER_SLEEPS, PROCESSES, REFUSED = range(3)  # the number of the request that was refused
REFUSAL_AT = 64
REFUSAL = struct.Struct("=III")  # reason, block, length of the message that follows
MESSAGE_BYTES = HEAD_BYTES - REFUSAL_AT - REFUSAL.size
ANSWER_BYTES = 64
ANSWER = struct.Struct("=QQQQHH")  # version, incarnation, seq, stamp, place, kind
ANSWERED = 7  # the word of the line that bears the request's number
MOST_BLOCKS = 1 << 16  # of a shard, so that the answers stay small

STATE, FRESH = range(2)


class Answer(NamedTuple):
    """About one block."""

    version: int
    incarnation: int
    seq: int
    stamp: int  # of the snapshot
    place: int  # of the snapshot to read; 0: read the shard
    kind: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """What lets one connection in."""

    route: Route
    held: HeldShard
    ends_at: float  # by the monotonic clock


def answers_bytes(blocks: int) -> int:
    """The size of the memory with the answers of a shard."""
    return HEAD_BYTES + ANSWER_BYTES * blocks


def answer_at(block: int) -> int:
    """Where a block's answer lies in it."""
    return HEAD_BYTES + ANSWER_BYTES * block


def host() -> str:
    """Two processes that say the same can meet at an abstract socket: one kernel, one network."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return ""
