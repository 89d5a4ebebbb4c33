"""Memory that two processes share and that has no name: sealed memfds.

Whoever creates it maps it writable, then seals it: nobody can resize it (so no reader can be made to
fault) and nobody can map or write it anew, in whatever process (F_SEAL_FUTURE_WRITE). So the one
writer is the creator, by the kernel's word. It does not count against /dev/shm; the kernel frees it
with its last mapping and descriptor, which die with their processes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
FIXED = SEAL_SEAL | SEAL_SHRINK | SEAL_GROW
NOEXEC_SEAL = 0x8  # MFD_NOEXEC_SEAL, Linux 6.3; some hosts allow no other kind

PAGE = mmap.PAGESIZE
SLOTS = 2  # of gradients: one is computed while the other one is on its way
WORDS = PAGE // 8

Bytes = NDArray[np.uint8]
_pause = threading.Lock()


class Unfit(Exception):
    """The other side's memory is not what it must be."""


def fence() -> None:
    """No load or store moves across. x86 needs none between these; others get it from a lock."""
    with _pause:
        pass
    with _pause:
        pass


def create(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """(descriptor, the only writable mapping) of zeros. Raises OSError when memory is short."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)  # now, not as a SIGBUS at the first touch
        memory = mmap.mmap(fd, size_bytes)
        try:
            fcntl.fcntl(fd, F_ADD_SEALS, FIXED | SEAL_FUTURE_WRITE)
        except OSError:  # Linux < 5.1 knows no FUTURE_WRITE; the size is what a reader's life needs
            fcntl.fcntl(fd, F_ADD_SEALS, FIXED)
    except BaseException:
        os.close(fd)
        raise
    return fd, memory


def attach(fd: int, size_bytes: int) -> mmap.mmap:
    """A read-only mapping of what another process created. Raises Unfit. Leaves `fd` open."""
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        raise Unfit("not a memfd") from error
    if seals & FIXED != FIXED:
        raise Unfit("its size is not sealed")
    if os.fstat(fd).st_size != size_bytes:
        raise Unfit(f"it has {os.fstat(fd).st_size} bytes, not {size_bytes}")
    return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)


def as_bytes(memory: mmap.mmap | memoryview) -> Bytes:
    return np.frombuffer(memory, np.uint8)


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


@dataclass(frozen=True, slots=True)
class Place:
    """Where something lies in a `GradientMemory`."""

    memory: GradientMemory
    offset: int


class GradientMemory:
    """A worker's gradients: a page of words, then `slots` buffers. The servers only read it.

    Compute into `buffers[i]`; an `Exchange` whose data lies in one goes up without a copy. A word is
    where a channel says how far it has copied (see `shm_server`).
    """

    def __init__(self, size_bytes: int, slots: int = SLOTS) -> None:
        stride = -(-size_bytes // PAGE) * PAGE
        self.size_bytes = PAGE + slots * stride
        self.fd, self._memory = create("dsgd-gradients", self.size_bytes)
        self._all = as_bytes(self._memory)
        self._base = address(self._all)
        self._words = memoryview(self._memory)[:PAGE].cast("Q")
        self._next_word = 0
        starts = [PAGE + slot * stride for slot in range(slots)]
        self.buffers = [memoryview(self._memory)[at : at + size_bytes] for at in starts]

    def word(self) -> tuple[int, memoryview]:
        """(index, one word) of a channel's own."""
        index = self._next_word
        if index == WORDS:
            raise Unfit(f"a worker has at most {WORDS} shm channels")
        self._next_word += 1
        return index, self._words[index : index + 1]

    def offset(self, data: memoryview) -> int | None:
        """Where these bytes lie in the memory; None: somewhere else."""
        offset = address(np.frombuffer(data, np.uint8)) - self._base
        return offset if PAGE <= offset <= self.size_bytes - data.nbytes else None

    def close(self) -> None:
        """The buffers live on as long as somebody holds them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
