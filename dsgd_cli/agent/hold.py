"""One launcher at a time: an flock on the run directory's `launcher.lock`, kept by this process.

The lock is a kernel's: it ends with the process, so a launcher that was killed holds nothing once
its connection is gone. The file's content says who holds it, for the message to the other one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from dsgd_cli.agent import paths, runs
from dsgd_cli.agent.framing import Message, Refused

LOCK = "launcher.lock"
OWNER_MAX_BYTES = 4096


def lock_file(path: Path) -> int | None:
    """An exclusive flock on `path`, created when missing; None when another process has it.

    A file that was removed meanwhile is no lock: whoever comes next would lock a new one.
    """
    while True:
        paths.make_private(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if is_still(descriptor, path):
            return descriptor
        os.close(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Hold:
    """The clusters that this process holds for its launcher."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, Path, Message]] = {}

    def hold(self, cluster: str, owner: Message) -> None:
        """Refused("held", owner=…) when another launcher holds it. Again by us is fine."""
        path = runs.current(cluster) / LOCK
        mine = self._held.pop(cluster, None)
        if mine is not None and is_still(mine[0], path):
            descriptor: int | None = mine[0]
        else:
            if mine is not None:
                os.close(mine[0])
            descriptor = lock_file(path)
        if descriptor is None:
            raise Refused("held", f"{cluster} is held by another dsgd", owner=read_owner(path))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode()[:OWNER_MAX_BYTES], 0)
        self._held[cluster] = descriptor, path, owner

    def renew(self, cluster: str) -> None:
        """Take the lock again if its file went away together with an old run directory."""
        if cluster in self._held:
            self.hold(cluster, self._held[cluster][2])

    def release_all(self) -> None:
        """Give them back. A run directory in which nothing but the lock ever was goes with it."""
        for descriptor, path, _ in self._held.values():
            with contextlib.suppress(OSError):
                if is_still(descriptor, path):
                    if os.listdir(path.parent) == [LOCK]:  # noqa: PTH208
                        path.unlink()
                        path.parent.rmdir()
                    else:
                        os.ftruncate(descriptor, 0)
            os.close(descriptor)
        self._held.clear()
        paths.prune()


def read_owner(path: Path) -> Message | None:
    try:
        owner = json.loads(path.read_bytes()[:OWNER_MAX_BYTES])
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None
