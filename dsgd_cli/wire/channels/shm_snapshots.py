"""Copies of a small shard's blocks, for workers that read while others push.

Where a shard is a block or two, whoever reads it and whoever changes it would exclude each other,
and all of its workers take turns. So the server, after it has applied what everybody sent, copies
the block once more, out of its cache, and announces that copy to all; it is free to apply the next
pushes while they read. The ring is short: stamps tell a reader that its copy has been replaced by
a later one, and then it reads the shard itself, like the reader of a large shard.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsgd_cli.wire.channels.base import HeldShard, Shape
from dsgd_cli.wire.channels.memory import sealed
from dsgd_cli.wire.channels.shm_memory import PAGE, Bytes, as_bytes, order

if TYPE_CHECKING:
    from dsgd_cli.wire.channels.shm_member import Member

RING = 4
BLOCKS = 4  # of a larger shard, readers and writers rarely meet in one
BLOCK_BYTES = 1 << 17  # a smaller one is copied before anybody could wait for it


def pays(shape: Shape) -> bool:
    return shape.blocks <= BLOCKS and shape.block_bytes >= BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`place` counts from 1 in the ring; it holds this as long as its stamp is this one."""

    place: int
    stamp: int
    version: int


class Snapshots:
    """The server's end: the ring, and who may still be reading in it."""

    def __init__(self, shape: Shape) -> None:
        self.size_bytes = ring_bytes(shape)
        self.fd, memory = sealed("dsgd-snapshots", self.size_bytes)
        self._stamps, self._places = ring(memory, shape)
        self._next = 0
        self._readers: list[tuple[int, list[tuple[Member, int]]]] = [(0, [])] * RING

    def take(self, held: HeldShard, worker: int, block: int) -> Snapshot:
        """The block as it is now."""
        index = self._next
        self._next = (index + 1) % RING
        self._readers[index] = (block, [])
        place = self._places[index]

        def copy(data: memoryview) -> None:
            np.copyto(place[: len(data)], np.frombuffer(data, np.uint8))

        self._stamps[index] += 1
        order()
        version, _ = held.read(worker, block, copy)
        order()
        self._stamps[index] += 1
        return Snapshot(index + 1, self._stamps[index], version)

    def reads(self, snapshot: Snapshot, member: Member) -> None:
        """It has been announced to the member."""
        self._readers[snapshot.place - 1][1].append((member, member.announced))

    def next_readers(self) -> tuple[int, list[tuple[Member, int]]]:
        """(block, members) of the copy that the next one replaces."""
        return self._readers[self._next]


def ring_bytes(shape: Shape) -> int:
    return PAGE + RING * _stride(shape)


def ring(memory: mmap.mmap, shape: Shape) -> tuple[memoryview, list[Bytes]]:
    """(stamps, places) of a mapping."""
    stride = _stride(shape)
    whole = as_bytes(memory)
    places = [whole[PAGE + index * stride :][:stride] for index in range(RING)]
    return memoryview(memory)[:PAGE].cast("Q"), places


def _stride(shape: Shape) -> int:
    return -(-min(shape.block_bytes, shape.size_bytes) // PAGE) * PAGE
