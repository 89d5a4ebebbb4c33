"""Memory for a shard that another process of this host can be given a read-only view of.

A memfd: no name, nothing to clean up, gone with the last process that holds it. It is sealed: its
size is final, and nobody but this process can map it writable. Where the kernel has no memfd the
memory is ordinary, and shared memory channels are not offered.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

ALIGNMENT = 64
STAMP_BYTES = 8
_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in the `fcntl` module


def stamps_at(size_bytes: int) -> int:
    """Where the stamps begin: behind the values, aligned."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class ShardMemory:
    """The values of a shard and a stamp for each block. Lives as long as views of it do."""

    def __init__(self, size_bytes: int, blocks: int) -> None:
        total = stamps_at(size_bytes) + blocks * STAMP_BYTES
        self.fd, self._map = _sealed(total)
        view = memoryview(self._map)
        self.values = view[:size_bytes]
        self.stamps = view[stamps_at(size_bytes) : total].cast("Q")


def _sealed(total: int) -> tuple[int, mmap.mmap]:
    try:
        fd = os.memfd_create("shard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):
        return -1, mmap.mmap(-1, total)
    os.ftruncate(fd, total)
    mapped = mmap.mmap(fd, total)
    size = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    for seals in (size | _SEAL_FUTURE_WRITE, size):  # an older kernel knows the second alone
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            break
        except OSError:
            continue
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    weakref.finalize(mapped, os.close, fd)
    return fd, mapped
