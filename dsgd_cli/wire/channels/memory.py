"""Memory that other processes of this host can be given a read-only view of.

A memfd: no name, nothing to clean up, gone with the last process that holds it, and not counted
against /dev/shm. It is sealed: its size is final, so no reader can be made to fault, and nobody but
this process can map it writable. Where the kernel has no memfd the memory is ordinary, and shared
memory channels are not offered.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

ALIGNMENT = 64
STAMP_BYTES = 8
FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1; not in the `fcntl` module
NOEXEC = 0x8  # MFD_NOEXEC_SEAL, Linux 6.3; some hosts allow no other kind


def stamps_at(size_bytes: int) -> int:
    """Where the stamps begin: behind the values, aligned."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class ShardMemory:
    """The values of a shard and a stamp for each block. Lives as long as views of it do."""

    def __init__(self, size_bytes: int, blocks: int) -> None:
        total = stamps_at(size_bytes) + blocks * STAMP_BYTES
        self.fd, memory = sealed("dsgd-shard", total)
        view = memoryview(memory)
        self.values = view[:size_bytes]
        self.stamps = view[stamps_at(size_bytes) : total].cast("Q")


def sealed(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """(descriptor, which is closed with the mapping; the only writable mapping) of zeros.

    The descriptor is -1 where there is no memfd. Raises OSError when memory is short: the pages
    are there from the beginning, so that nobody dies of SIGBUS at the first touch.
    """
    fd = _memfd(name)
    if fd < 0:
        return fd, mmap.mmap(-1, size_bytes)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
        memory = mmap.mmap(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    weakref.finalize(memory, os.close, fd)
    for seals in (FIXED | FUTURE_WRITE, FIXED):  # an older kernel knows the second alone
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            break
        except OSError:
            continue
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    return fd, memory


def _memfd(name: str) -> int:
    for more in (NOEXEC, 0):
        try:
            return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | more)
        except (AttributeError, OSError):
            continue
    return -1
