"""The worker's copy of the parameters, its gradients, and its channels to all shards at once.

There are two vectors of each, so that one exchange may be under way while the next gradient is
computed: what is sent is frozen until every shard has answered, and what is fetched is shown only
when it is there as a whole. A push gets its `seq` when it is sent. At most one exchange is under
way. The parameters are the servers' to change: the views of them are read-only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import gt, lt, sub
from typing import Any

import numpy as np

from dsgd_cli.engine.layout import Layout, flatten, unflatten
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels import base
from dsgd_cli.wire.channels.base import DROPPED, Channel, Exchange, Operation, Route, Shape
from dsgd_cli.wire.channels.choose import Wanted, open_channel
from dsgd_cli.wire.channels.shm import share

# A shard's push of this size fits into a socket's buffers, so that it leaves without a thread.
DIRECT_BYTES = 128 << 10

Vector = np.ndarray[Any, Any]


class Closed(Exception):
    """The run ended before this exchange began."""


class Buffer:
    """A vector, its named views, and the bytes of each shard in it."""

    def __init__(self, layout: Layout, memory: memoryview | None = None) -> None:
        if memory is None:
            self.flat = np.zeros(layout.size, layout.dtype)
        else:
            self.flat = np.frombuffer(memory, layout.dtype, layout.size)
        self.layout = layout
        self.views = unflatten(layout, self.flat)
        self.parts = [self.flat[shard.start : shard.stop].data.cast("B") for shard in layout.shards]


class Copy:
    """The parameters as one fetch brought them, and the worker's own steps since then."""

    def __init__(self, layout: Layout) -> None:
        buffer = Buffer(layout)
        self.parts = buffer.parts
        self.flat = buffer.flat
        user = buffer.flat.view()
        user.flags.writeable = False
        self.views = unflatten(layout, user)
        self.versions: list[list[int]] = []  # of each shard's blocks
        self.pushes: list[int] = []  # how many of its own each shard had applied
        self.own = False  # whether there are own steps in it

    @property
    def known(self) -> list[list[int]]:
        """The versions that a fetch need not bring once more; none if it must bring everything."""
        return [] if self.own else self.versions


@dataclass(frozen=True, slots=True)
class Base:
    """A fetch, by what was in it: see `Copy`."""

    versions: list[list[int]]
    pushes: list[int]


@dataclass(frozen=True, slots=True)
class Flight:
    """An exchange under way, and what its gradient was computed with."""

    operation: Operation
    exchanges: list[Exchange]
    base: Base


@dataclass(frozen=True, slots=True)
class Landed:
    """What came of an exchange. `stale`: the most updates by others, in any block, between the
    fetch of what the gradient was computed with and the push; `dropped`: it was too late."""

    operation: Operation
    stale: int = 0
    dropped: bool = False


class Moved:
    """The bytes of values that each shard got and gave, in answered exchanges, since the last look.

    What is refused, or sent once more after a connection broke, is not in them.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._shapes = shapes
        self._vectors = 0  # whole ones: what nearly every exchange moves
        self._picked = [0] * len(shapes)  # bytes of pulls of what was new

    def add(self, exchanges: Sequence[Exchange]) -> None:
        """Of one operation, one for each shard."""
        operation = exchanges[0].operation
        if not exchanges[0].since:
            self._vectors += operation.sends + operation.fetches
            return
        for shard, (exchange, shape) in enumerate(zip(exchanges, self._shapes, strict=True)):
            self._picked[shard] += newer_bytes(exchange, shape)

    def take(self) -> list[int]:
        """By shard; counts from 0 again."""
        moved = [
            self._vectors * shape.size_bytes + picked
            for shape, picked in zip(self._shapes, self._picked, strict=True)
        ]
        self._vectors, self._picked = 0, [0] * len(self._shapes)
        return moved


def newer_bytes(exchange: Exchange, shape: Shape) -> int:
    """What a pull of the blocks newer than `since` has brought."""
    newer: list[bool] = list(map(gt, exchange.versions, exchange.since))
    missing = shape.blocks * shape.block_bytes - shape.size_bytes  # of the last block
    return sum(newer) * shape.block_bytes - newer[-1] * missing


def _is_older(some: list[list[int]], than: list[list[int]]) -> bool:
    """Whether a block of some shard is newer in the other; nothing known is older than all."""
    if not some or not than:
        return bool(than)
    return any(any(map(lt, *pair)) for pair in zip(some, than, strict=True))


class Parameters:
    """From the first parameters of a run to its end; for one thread, but for `close`."""

    def __init__(self, layout: Layout, channels: Sequence[Channel]) -> None:
        self.layout = layout
        self.moved = Moved(shapes(layout))
        nbytes = layout.size * np.dtype(layout.dtype).itemsize
        first, second = share(channels, nbytes) or (None, None)
        self.gradient = Buffer(layout, first)  # to be filled next
        self._sent = Buffer(layout, second)
        self.shown = Copy(layout)
        self._spare = Copy(layout)
        self._step: Vector | None = None
        self._scratch: Buffer | None = None
        self._seq = 0
        self._applied = [0] * len(layout.shards)  # own pushes: one that came too late is in none
        self._base: Base | None = None  # of the gradient to be sent, if it is not what is shown
        self._flight: Flight | None = None
        direct = max(len(part) for part in self.gradient.parts) <= DIRECT_BYTES
        self._carrier: Direct | Background = Direct(channels) if direct else Background(channels)

    @property
    def buffers(self) -> tuple[Buffer, Buffer]:
        """Both gradients, for who does not stream them."""
        return self.gradient, self._sent

    @property
    def scratch(self) -> Buffer:
        """For a gradient that is added to the sum; needed with push_every > 1 only."""
        if self._scratch is None:
            self._scratch = Buffer(self.layout)
        return self._scratch

    def write(self, params: dict[str, Vector]) -> None:
        """Sets the shards' first values."""
        flatten(self.layout, params, self.gradient.flat)
        self._run([Exchange(Operation.WRITE, data=part) for part in self.gradient.parts])

    def based(self) -> None:
        """The gradient to be sent next is, or begins with, one of what is shown now."""
        self._base = Base(self.shown.versions, self.shown.pushes)

    def begin(self, operation: Operation) -> None:
        """Sends the gradient, or asks for the parameters, or both. `settle` must follow."""
        assert self._flight is None
        base = self._base or Base(self.shown.versions, self.shown.pushes)
        data: Sequence[memoryview | None] = [None] * len(self.layout.shards)
        into = data
        if operation.sends:
            self._seq += 1
            self._base = None
            data = self.gradient.parts
            self.gradient, self._sent = self._sent, self.gradient
        if operation.fetches:
            into = self._spare.parts
        exchanges = [
            self._exchange(operation, base, shard, up, down)
            for shard, (up, down) in enumerate(zip(data, into, strict=True))
        ]
        self._flight = Flight(operation, exchanges, base)
        self._carrier.begin(exchanges)

    def _exchange(
        self,
        operation: Operation,
        base: Base,
        shard: int,
        up: memoryview | None,
        down: memoryview | None,
    ) -> Exchange:
        if operation.sends:
            own = self._applied[shard] - base.pushes[shard]
            return Exchange(operation, self._seq, up, down, tag=base.versions[shard][0] + own)
        known = self._spare.known
        return Exchange(operation, into=down, since=known[shard] if known else ())

    def settle(self) -> Landed:
        """Waits until every shard has answered; what was fetched is shown from now on."""
        flight, self._flight = self._flight, None
        assert flight is not None
        self._carrier.settle()
        self.moved.add(flight.exchanges)
        versions = [exchange.versions for exchange in flight.exchanges]
        late = [bool(shard[0] & DROPPED) for shard in versions]  # all blocks of a shard are alike
        if any(late):
            versions = [[version & ~DROPPED for version in shard] for shard in versions]
        stale = 0
        if flight.operation.sends:
            self._applied = [n + (not it) for n, it in zip(self._applied, late, strict=True)]
            stale = staleness(versions, flight.base, self._applied)
        if flight.operation.fetches:
            self._show(versions)
        return Landed(flight.operation, stale, any(late))

    def _show(self, versions: list[list[int]]) -> None:
        """What has been fetched."""
        fetched = self._spare
        fetched.versions, fetched.pushes, fetched.own = versions, self._applied, False
        self.shown, self._spare = fetched, self.shown

    def step(self, gradient: Vector, learning_rate: float) -> None:
        """A step of the worker's own, on what is shown."""
        if self._step is None:
            self._step = np.empty_like(gradient)
        np.multiply(gradient, learning_rate, out=self._step)
        np.subtract(self.shown.flat, self._step, out=self.shown.flat)
        self.shown.own = True

    def catch_up(self, version: int) -> bool:
        """Fetches what is new; shown, and True, once every block has this version."""
        assert self._flight is None
        spare = self._spare
        if _is_older(spare.known, self.shown.known):  # a copy costs less than another fetch
            np.copyto(spare.flat, self.shown.flat)
            spare.versions, spare.own = self.shown.versions, False
        exchanges = [
            Exchange(Operation.PULL, into=part, since=known)
            for part, known in zip(spare.parts, spare.known or repeat(()), strict=False)
        ]
        self._run(exchanges)
        spare.versions, spare.own = [e.versions for e in exchanges], False
        if any(min(shard) < version for shard in spare.versions):
            return False
        self._show(spare.versions)
        return True

    def contribute(self, gradient: Buffer, round_: int, part: int) -> None:
        """Adds a gradient to a round's sum in all shards. Raises Refused."""
        assert self._flight is None
        self._run(
            [Exchange(Operation.CONTRIBUTE, round_, data, tag=part) for data in gradient.parts]
        )

    def pull(self) -> None:
        """Fetches, and waits for it."""
        self.begin(Operation.PULL)
        self.settle()

    def peek(self) -> Copy:
        """The newest parameters, good until the next fetch; what is shown stays."""
        assert self._flight is None
        spare = self._spare
        spare.versions = []  # till they are known: the next fetch brings all
        self._run([Exchange(Operation.PULL, into=part) for part in spare.parts])
        return spare

    def _run(self, exchanges: list[Exchange]) -> None:
        """From the beginning to the end."""
        self._carrier.begin(exchanges)
        self._carrier.settle()
        self.moved.add(exchanges)

    def close(self) -> None:
        """Breaks off what is under way; from any thread."""
        self._carrier.close()


def staleness(versions: Sequence[Sequence[int]], base: Base, applied: Sequence[int]) -> int:
    """The most updates by others in any block between a fetch and a push."""
    most = 0
    for shard, known, own, then in zip(versions, base.versions, applied, base.pushes, strict=True):
        most = max(most, max(map(sub, shard, known)) - (own - then))
    return most


def open_channels(
    layout: Layout,
    wanted: Wanted,
    identity: ids.Identity,
    addresses: Sequence[str],
    epoch: int,
    me: tuple[int, int],
) -> list[Channel]:
    """One to each shard. `me`: worker and incarnation."""

    def open_one(index: int, shape: Shape) -> Channel:
        route = Route(identity.cluster_id, epoch, index, *me)
        return open_channel(wanted, identity, addresses[index], route, shape, note)

    return [open_one(index, shape) for index, shape in enumerate(shapes(layout))]


def note(text: str) -> None:
    """For the log, where the launcher reads along."""
    print(text, flush=True)


def shapes(layout: Layout) -> list[Shape]:
    """How each shard's bytes are cut."""
    item_bytes = np.dtype(layout.dtype).itemsize
    return [
        Shape((shard.stop - shard.start) * item_bytes, layout.block_elements * item_bytes)
        for shard in layout.shards
    ]


# ── who drives the channels ────────────────────────────────────────────────────────────────────


class Direct:
    """The caller's thread: `begin` hands everything to the kernel, `settle` reads the answers."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels

    def begin(self, exchanges: list[Exchange]) -> None:
        base.begin(self._channels, exchanges)

    def settle(self) -> None:
        base.settle(self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class Background:
    """A thread of its own: a large exchange moves while the caller computes."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._jobs: queue.SimpleQueue[list[Exchange] | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._work, name="exchange", daemon=True).start()

    def begin(self, exchanges: list[Exchange]) -> None:
        with self._lock:
            if not self._closed:
                self._jobs.put(exchanges)
            else:
                self._ends.put(Closed())

    def settle(self) -> None:
        error = self._ends.get()
        if error is not None:
            raise error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        for channel in self._channels:
            channel.close()

    def _work(self) -> None:
        for exchanges in iter(self._jobs.get, None):
            try:
                base.run(self._channels, exchanges)
            except BaseException as error:  # it is the caller's to handle
                self._ends.put(error)
            else:
                self._ends.put(None)
