"""What carries blocks between one worker and one shard, whatever it is made of.

A worker drives a `Channel` per shard: `begin` an exchange, then `advance` until it is done. `run`
does so for all shards at once, so that they work in parallel. A server gives its carriers a
`Holding`: the shard of the current run.

Invariant of every carrier: an exchange is sent again, unchanged, until it is answered or refused;
exactly-once is the shard's doing (`seq` and `applied` per block). The buffers of an exchange belong
to the channel until it is done.
"""

from __future__ import annotations

import enum
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, cast

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.spin import Spin

PAUSE_S = (0.05, 1.0)  # between attempts to connect: the first, and at most
FROZEN_PAUSE_S = 0.02
DROPPED = 1 << 63  # in a version: see `Exchange`
LOOK_S = 0.5  # how long a wait lasts before the channel is asked whether it was closed

Data: TypeAlias = "bytes | memoryview"
Opened: TypeAlias = "pb.TcpTicket | pb.ShmTicket"


class Operation(enum.IntEnum):
    """What an exchange does; the numbers are those of the wire."""

    sends: bool  # blocks go up
    fetches: bool  # fresh values come down

    def __new__(cls, number: int, sends: bool, fetches: bool) -> Operation:
        made = int.__new__(cls, number)
        made._value_ = number
        made.sends = sends
        made.fetches = fetches
        return made

    PULL = 0, False, True
    PUSH = 1, True, False
    PUSH_PULL = 2, True, True
    WRITE = 3, True, False
    CONTRIBUTE = 4, True, False


OPERATIONS: dict[int, Operation] = {operation.value: operation for operation in Operation}


class Reason(enum.IntEnum):
    """Why a shard refuses an exchange; the numbers are those of the wire."""

    UNKNOWN = 0
    WRONG_CLUSTER = 1
    WRONG_EPOCH = 2
    WRONG_SHARD = 3
    WRONG_SIZE = 4
    WRONG_ORDER = 5
    FENCED = 6
    OUT_OF_ORDER = 7
    NOT_FINITE = 8
    FROZEN = 9
    NOT_CONFIGURED = 10
    NO_CARRIER = 11
    ROUND_OVER = 12


class Unavailable(Exception):
    """This kind of channel does not work between these two; another one may. `why` is printed."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind = kind
        self.why = why


class Refused(Exception):
    """The shard took the exchange, or the rest of it, for wrong. The channel lives on."""

    def __init__(self, reason: Reason, message: str, block: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.block = block


@dataclass(frozen=True, slots=True)
class Route:
    """From which worker to which shard, in which run."""

    cluster_id: str
    epoch: int
    shard: int
    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Shape:
    """How a shard's bytes are cut: whole blocks, the last one may be shorter."""

    size_bytes: int
    block_bytes: int

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    def bounds(self, block: int) -> tuple[int, int]:
        """Where a block's bytes start and stop."""
        start = block * self.block_bytes
        return start, min(start + self.block_bytes, self.size_bytes)


@dataclass(slots=True)
class Exchange:
    """One exchange with a whole shard; its answers are filled in.

    A version of which `DROPPED` is set says that the push was too late to be applied.
    """

    operation: Operation
    seq: int = 0  # of a push; CONTRIBUTE: the round
    data: memoryview | None = None  # bytes that go up: the shard's gradient, or first values
    into: memoryview | None = None  # writable bytes for what comes down
    since: Sequence[int] = ()  # PULL: only blocks newer than these
    tag: int = 0  # see `Header`
    versions: list[int] = field(default_factory=list)  # per block, after this exchange
    applied: list[tuple[int, int]] = field(default_factory=list)  # my newest (incarnation, seq)


class Channel(Protocol):
    """The worker's end. Used by one thread."""

    def begin(self, exchange: Exchange) -> None:
        """Start to send. The exchange before it must be done."""

    def advance(self) -> bool:
        """Wait for the next answer; True when the exchange is done.

        Raises Refused, or PeerUnreachable when the shard did not answer within the deadline.
        """

    def close(self) -> None:
        """Break off whatever is in flight. Idempotent."""


class Pollable(Channel, Protocol):
    """A channel that needs its thread to move, but lets it wait for others, too."""

    spin: Spin

    def turn(self) -> bool | None:
        """`advance` without waiting; None where nothing moved."""

    def waits_for(self) -> tuple[int, int]:
        """After that: a file, and the events of it (`select.poll`) that make another worth it."""


def begin(channels: Sequence[Channel], exchanges: Sequence[Exchange]) -> None:
    """Start all exchanges, each on its channel; `settle` must follow."""
    for channel, exchange in zip(channels, exchanges, strict=True):
        channel.begin(exchange)


def settle(channels: Sequence[Channel]) -> None:
    """Wait for all at once. Raises the first refusal after all are done."""
    pollable = [cast(Pollable, channel) for channel in channels if hasattr(channel, "turn")]
    refusal = None
    pending = list(channels)
    if len(pollable) > 1:
        refusal = _settle_together(pollable)
        pending = [channel for channel in channels if not hasattr(channel, "turn")]
    while pending:
        for channel in tuple(pending):
            try:
                done = channel.advance()
            except Refused as error:
                refusal = refusal or error
                done = True
            if done:
                pending.remove(channel)
    if refusal is not None:
        raise refusal


def _settle_together(pending: list[Pollable]) -> Refused | None:
    """Turn by turn, so that each shard always has something to do."""
    refusal: Refused | None = None
    while pending:
        moved = False
        for channel in tuple(pending):
            try:
                done = channel.turn()
            except Refused as error:
                refusal = refusal or error
                done = True
            if done:
                pending.remove(channel)
            moved = moved or done is not None
        if not moved:
            _wait(pending)
    return refusal


def _wait(pending: Sequence[Pollable]) -> None:
    poll = select.poll()
    for channel in pending:
        poll.register(*channel.waits_for())
    pending[0].spin.wait(lambda: poll.poll(0), lambda: poll.poll(LOOK_S * 1000))


def run(channels: Sequence[Channel], exchanges: Sequence[Exchange]) -> None:
    """All exchanges, from the beginning to the end."""
    begin(channels, exchanges)
    settle(channels)


class Header(NamedTuple):
    """What opens an exchange, as the server reads it."""

    route: Route
    seq: int  # CONTRIBUTE: the round
    operation: Operation
    # a push: the version of the first block that its gradient was computed with, plus the worker's
    # own pushes since then; CONTRIBUTE: the part
    tag: int = 0


State: TypeAlias = tuple[int, tuple[int, int]]  # of a block: (version, applied[worker])
Take: TypeAlias = Callable[[memoryview], object]  # gets a block's bytes, which stand still


class HeldShard(Protocol):
    """One run's shard. From any thread; each call is atomic for its block.

    `take` is called with the block's bytes, read-only and gone when it returns: it copies, encrypts
    or sends them. It runs under the block's lock, so it must not wait for a peer.
    """

    @property
    def shape(self) -> Shape:
        """How it is cut."""

    @property
    def memory(self) -> int:
        """A memfd: the values (`shape.size_bytes`, rounded up to 64), then one 8-byte stamp for
        each block: 2 x version in the lower 40 bits, the number of first values written above, and
        odd while the block changes."""

    def change(self, header: Header, block: int, data: Data, take: Take | None = None) -> State:
        """What the header says: apply a gradient (once), set first values, contribute to a sum.

        Raises Refused. `take` gets the fresh values, of an operation that fetches.
        """

    def read(self, worker: int, block: int, take: Take | None = None) -> State:
        """The state and, with `take`, the values that belong to it."""


class Holding(Protocol):
    """The server's end of all carriers."""

    def admit(self, header: Header) -> HeldShard:
        """Raises Refused unless this exchange belongs to the current run and a living worker."""


class Carrier(Protocol):
    """A server's end of one kind of channel: made with the Holding, before the first run.

    A carrier has threads of its own; `open`, `retire` and `close` are called from the server's
    loop and must not wait for a peer.
    """

    def open(self, request: pb.OpenChannelRequest, route: Route, held: HeldShard) -> Opened:
        """What the worker needs to connect, once. Raises Refused."""

    def retire(self, is_over: Callable[[Route], bool]) -> None:
        """Close the connections and drop the tickets of what is over: a run or an incarnation."""

    def close(self) -> None:
        """The server goes."""
