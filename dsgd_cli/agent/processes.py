"""Processes as /proc shows them: who lives, who belongs to a cluster, and ending them for sure.

A pid alone names nobody: it is reused. A process here is (pid, start time) on one boot, and signals
go through a pidfd that was checked against the start time after it was opened. What belongs to a
cluster is read from environments, of our own user only; names of programs play no part.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CLUSTER = "DSGD_CLUSTER"
CLUSTER_ID = "DSGD_CLUSTER_ID"
RUN_DIR = "DSGD_RUN_DIR"  # <state folder>/run/<cluster>@<host id>
PROCESS = "DSGD_PROCESS"
LIFE = "DSGD_LIFE"  # a number that the agent gives out once: tells a restarted process apart
AGENT = "agent"


class Stat(NamedTuple):  # a dataclass would cost 10 ms of imports in every bootstrap
    """One line of /proc/<pid>/stat. Of a session's or group's leader, pid == its number."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_time: int

    @property
    def dead(self) -> bool:
        return self.state in "ZXx"


class Member(NamedTuple):
    """A living process of a cluster; `process` is "" when it does not say which it is."""

    pid: int
    start_time: int
    process: str
    life: str
    cluster_id: str
    run_dir: str
    cmdline: str


def stat(pid: int) -> Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return Stat(pid, fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace(pid: int | str) -> str:
    """Its pid namespace: pids say nothing about processes of another one. "" when unknown."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def start_time(pid: int) -> int:
    found = stat(pid)
    return found.start_time if found else 0


def alive(pid: int, started: int) -> bool:
    """Whether that very process lives: a zombie does not, nor does a later one with its pid."""
    found = stat(pid)
    return found is not None and not found.dead and found.start_time == started


def environment(pid: int) -> dict[str, str]:
    """Empty when it is gone, a zombie, or not ours to read."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in data.split(b"\0") if item.startswith(b"DSGD_"))
    return {
        name.decode("ascii", "replace"): value.decode("utf-8", "replace")
        for name, _, value in pairs
    }


def cmdline(pid: int) -> str:
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    words = data.rstrip(b"\0").decode("utf-8", "replace").split("\0")
    shown = " ".join(word if len(word) <= 80 else word[:60].split("\n")[0] + "…" for word in words)
    return "".join(c if c.isprintable() else "?" for c in shown)[:500]


def _own_pids() -> Iterator[int]:
    uid, skip = os.getuid(), set(ancestors())
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) not in skip:
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == uid:
                    yield int(entry.name)


def ancestors() -> list[int]:
    """This process and those that it descends from: never part of what a sweep finds."""
    chain, pid = [], os.getpid()
    while pid > 1 and (found := stat(pid)):
        chain.append(pid)
        pid = found.parent
    return chain


def sweep(run_dir: Path, cluster_id: str = "") -> list[Member]:
    """The living processes of the cluster that has this run directory, except ourselves.

    With a cluster id only those of that very directory and id. Without, those of any id, and also
    those whose run directory lies beside it under another host id: this machine may have been
    renamed. A name of a cluster alone marks nothing, it may be exported in somebody's shell.
    """
    cluster = run_dir.name.partition("@")[0]
    found = []
    for pid in _own_pids():
        variables = environment(pid)
        if variables.get(CLUSTER) != cluster or RUN_DIR not in variables:
            continue
        if cluster_id and variables.get(CLUSTER_ID) != cluster_id:
            continue
        if variables[RUN_DIR] != str(run_dir) and (
            cluster_id or not _beside(Path(variables[RUN_DIR]), run_dir, pid)
        ):
            continue
        seen = stat(pid)
        if seen is not None and not seen.dead:
            process, life = variables.get(PROCESS, ""), variables.get(LIFE, "")
            marks = process, life, variables.get(CLUSTER_ID, ""), variables[RUN_DIR]
            found.append(Member(pid, seen.start_time, *marks, cmdline(pid)))
    return sorted(found, key=lambda member: member.pid)


def _beside(theirs: Path, ours: Path, pid: int) -> bool:
    """In the same state folder, and in our namespace: a container is another host."""
    if os.path.realpath(theirs.parent) != os.path.realpath(ours.parent):
        return False
    return namespace(pid) == namespace("self") != ""


def session_of(pid: int, started: int) -> list[tuple[int, int]]:
    """(pid, start time) of all in the session or group that this process leads, itself included.

    Empty when the leader is dead: its number could be another's by now.
    """
    if not alive(pid, started):
        return []
    found = [seen for each in _own_pids() if (seen := stat(each)) and not seen.dead]
    return [(s.pid, s.start_time) for s in found if pid in (s.pid, s.group, s.session)]


class Target:
    """One process to end, held by a pidfd where the kernel has them."""

    def __init__(self, pid: int, started: int) -> None:
        self.pid, self.started = pid, started
        self._pidfd = -1
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(pid)
        if self._pidfd >= 0 and not alive(pid, started):
            self.close()

    @property
    def gone(self) -> bool:
        if self._pidfd >= 0 and select.select([self._pidfd], [], [], 0)[0]:
            return True
        return not alive(self.pid, self.started)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)
            elif alive(self.pid, self.started):
                os.kill(self.pid, number)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def wait_gone(targets: Iterable[Target], timeout_s: float) -> bool:
    """Whether all of them were gone within `timeout_s`."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.002
    while not all(target.gone for target in targets):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    return True


def end_all(find: Callable[[], Iterable[tuple[int, int]]], grace_s: float) -> set[int]:
    """TERM, `grace_s`, KILL to everything that `find` names, until it names nobody any more.

    Gives the pids that needed KILL. A stopped process is continued, so that it can end by itself.
    Rounds are bounded: what survives KILL (a hung disk) is left for the verification to report.
    """
    killed: set[int] = set()
    for attempt in range(5):
        targets = [Target(pid, started) for pid, started in find()]
        if not targets:
            break
        try:
            if attempt == 0:
                for number in (signal.SIGTERM, signal.SIGCONT):
                    for target in targets:
                        target.send(number)
                wait_gone(targets, grace_s)
            stubborn = [target for target in targets if not target.gone]
            for target in stubborn:
                target.send(signal.SIGKILL)
                killed.add(target.pid)
            wait_gone(stubborn, 2.0)
        finally:
            for target in targets:
                target.close()
    return killed


def end_members(run_dir: Path, cluster_id: str) -> set[int]:
    """End all that carries these marks, whatever becomes of it."""

    def find() -> list[tuple[int, int]]:
        return [(m.pid, m.start_time) for m in sweep(run_dir, cluster_id)]

    return end_all(find, grace_s=0.0)
