"""The two memories of a shm channel: the shard's, that only the server can write; the worker's.

Each is made by its one writer (`memory.sealed`) and mapped read-only by the other side, who checks
the seals first: a memory that could shrink would kill whoever reads it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import socket
import struct
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.wire.channels.memory import FIXED, sealed
from dsgd_cli.wire.channels.memory import stamps_at as stamps_at
from dsgd_cli.wire.channels.shm_records import DESK_BYTES

PAGE = mmap.PAGESIZE
SLOTS = 2  # of gradients: one is computed while the other one is on its way
DESKS = 256  # shm channels of one worker
SLOTS_AT = DESKS * DESK_BYTES
KNOWN = 2 * DESKS  # views of one memory whose place is remembered

Bytes = NDArray[np.uint8]
_UCRED = struct.Struct("=iII")  # pid, uid, gid
_pause = threading.Lock()


class Unfit(Exception):
    """The other side's memory is not what it must be."""


def fence() -> None:
    """No load or store moves across: two locks make a barrier on every processor."""
    with _pause:
        pass
    with _pause:
        pass


def _nothing() -> None:
    """x86 keeps loads in order among themselves, and stores."""


# The cheaper barrier: what was stored before is seen before what is stored after, and what is
# loaded before is not newer than what is loaded after.
order = _nothing if platform.machine() in ("x86_64", "AMD64") else fence


def attach(fd: int, size_bytes: int) -> mmap.mmap:
    """A read-only mapping of what another process created. Raises Unfit. Leaves `fd` open."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Unfit("not a memfd") from error
    if seals & FIXED != FIXED:
        raise Unfit("its size is not sealed")
    status = os.fstat(fd)
    if status.st_size != size_bytes or size_bytes < 1:
        raise Unfit(f"it has {status.st_size} bytes, not {size_bytes}")
    if status.st_blocks * 512 < size_bytes:  # reading a hole would make a page, on our account
        raise Unfit("it has holes")
    return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)


def owner(connection: socket.socket) -> int:
    """The user id of the process at the other end of a unix socket, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return int(uid)


def as_bytes(memory: mmap.mmap | memoryview) -> Bytes:
    return np.frombuffer(memory, np.uint8)


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class GradientMemory:
    """A worker's gradients: a desk for each channel, then `slots` buffers. The servers only read.

    Compute into `buffers[i]`: an `Exchange` whose data lies in one goes up without a copy. A desk
    is where a channel says what it wants and how far it has come (`shm_records`).
    """

    def __init__(self, size_bytes: int, slots: int = SLOTS) -> None:
        stride = -(-size_bytes // PAGE) * PAGE
        self.size_bytes = SLOTS_AT + slots * stride
        self.fd, self._memory = sealed("dsgd-gradients", self.size_bytes)
        self._all = as_bytes(self._memory)
        self._base = address(self._all)
        self._next_desk = 0
        self._known: dict[int, tuple[memoryview, int]] = {}
        starts = [SLOTS_AT + slot * stride for slot in range(slots)]
        self.buffers = [memoryview(self._memory)[at : at + size_bytes] for at in starts]

    def desk(self) -> tuple[int, memoryview]:
        """(index, bytes) of a channel's own."""
        index = self._next_desk
        if index == DESKS:
            raise Unfit(f"a worker has at most {DESKS} shm channels")
        self._next_desk += 1
        return index, desk(self._memory, index)

    def offset(self, data: memoryview) -> int | None:
        """Where these bytes lie in the memory; None: somewhere else."""
        known = self._known.get(id(data))
        if known is not None:
            return known[1]
        offset = address(np.frombuffer(data, np.uint8)) - self._base
        if not SLOTS_AT <= offset <= self.size_bytes - data.nbytes:
            return None
        if len(self._known) < KNOWN:
            self._known[id(data)] = (data, offset)  # kept, so that nothing else gets its id
        return offset


def desk(memory: mmap.mmap, index: int) -> memoryview:
    """The bytes of a desk in a worker's memory."""
    return memoryview(memory)[index * DESK_BYTES : (index + 1) * DESK_BYTES]
