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
from typing import Any

import numpy as np

from dsgd_cli.engine.layout import Layout, flatten, unflatten
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels import base
from dsgd_cli.wire.channels.base import Channel, Exchange, Operation, Route, Shape
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
        self.views = unflatten(layout, self.flat)
        self.parts = [self.flat[shard.start : shard.stop].data.cast("B") for shard in layout.shards]


class Copy:
    """The parameters as one fetch brought them."""

    def __init__(self, layout: Layout) -> None:
        buffer = Buffer(layout)
        self.parts = buffer.parts
        user = buffer.flat.view()
        user.flags.writeable = False
        self.views = unflatten(layout, user)
        self.versions: list[list[int]] = []  # of each shard's blocks
        self.seq = 0  # the own pushes that it contains


@dataclass(frozen=True, slots=True)
class Flight:
    """An exchange under way, and what its gradient was computed with."""

    operation: Operation
    exchanges: list[Exchange]
    computed_with: Copy
    seq: int


class Parameters:
    """From the first parameters of a run to its end; for one thread, but for `close`."""

    def __init__(self, layout: Layout, channels: Sequence[Channel]) -> None:
        self.layout = layout
        self.nbytes = layout.size * np.dtype(layout.dtype).itemsize
        first, second = share(channels, self.nbytes) or (None, None)
        self.gradient = Buffer(layout, first)  # to be filled next
        self._sent = Buffer(layout, second)
        self._shown = Copy(layout)
        self._spare = Copy(layout)
        self._scratch: Buffer | None = None
        self._seq = 0
        self._flight: Flight | None = None
        direct = max(len(part) for part in self.gradient.parts) <= DIRECT_BYTES
        self._carrier: Direct | Background = Direct(channels) if direct else Background(channels)

    @property
    def views(self) -> dict[str, Vector]:
        return self._shown.views

    @property
    def scratch(self) -> Buffer:
        """For a gradient that is added to the sum; needed with push_every > 1 only."""
        if self._scratch is None:
            self._scratch = Buffer(self.layout)
        return self._scratch

    def write(self, params: dict[str, Vector]) -> None:
        """Sets the shards' first values."""
        flatten(self.layout, params, self.gradient.flat)
        self._carrier.begin([Exchange(Operation.WRITE, data=part) for part in self.gradient.parts])
        self._carrier.settle()

    def begin(self, operation: Operation) -> None:
        """Sends the gradient, or asks for the parameters, or both. `settle` must follow."""
        assert self._flight is None
        data: Sequence[memoryview | None] = [None] * len(self.layout.shards)
        into = data
        if operation.sends:
            self._seq += 1
            data = self.gradient.parts
            self.gradient, self._sent = self._sent, self.gradient
        if operation.fetches:
            into = self._spare.parts
        exchanges = [
            Exchange(operation, self._seq if operation.sends else 0, up, down)
            for up, down in zip(data, into, strict=True)
        ]
        self._flight = Flight(operation, exchanges, self._shown, self._seq)
        self._carrier.begin(exchanges)

    def settle(self) -> tuple[Operation, int]:
        """Waits until every shard has answered; what was fetched is shown from now on.

        Returns what it was and, of a push, its staleness: the most updates by others, in any
        block, since the fetch of the parameters that its gradient was computed with.
        """
        flight, self._flight = self._flight, None
        assert flight is not None
        self._carrier.settle()
        versions = [exchange.versions for exchange in flight.exchanges]
        stale = 0
        if flight.operation.sends:
            stale = staleness(versions, flight.computed_with, flight.seq)
        if flight.operation.fetches:
            self._spare.versions, self._spare.seq = versions, flight.seq
            self._shown, self._spare = self._spare, self._shown
        return flight.operation, stale

    def pull(self) -> None:
        """Fetches, and waits for it."""
        self.begin(Operation.PULL)
        self.settle()

    def peek(self) -> dict[str, Vector]:
        """The newest parameters, good until the next fetch; what is shown stays."""
        assert self._flight is None
        self._carrier.begin([Exchange(Operation.PULL, into=part) for part in self._spare.parts])
        self._carrier.settle()
        return self._spare.views

    def close(self) -> None:
        """Breaks off what is under way; from any thread."""
        self._carrier.close()


def staleness(versions: Sequence[Sequence[int]], computed_with: Copy, seq: int) -> int:
    """The most updates by others in any block between a fetch and the push `seq`."""
    own = seq - computed_with.seq
    updates = max(
        after - before
        for shard, fetched in zip(versions, computed_with.versions, strict=True)
        for after, before in zip(shard, fetched, strict=True)
    )
    return max(0, updates - own)


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
