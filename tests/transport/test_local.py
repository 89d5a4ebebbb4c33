"""The local transport: the contract, and that nothing it started outlives it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsgd_cli.transport.local import LocalTransport
from tests.transport.contract import TransportContract


@pytest.fixture
def transport() -> Iterator[LocalTransport]:
    opened = LocalTransport()
    yield opened
    opened.close()


@pytest.fixture
def python() -> str:
    return sys.executable


class TestLocal(TransportContract):
    pass


def gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


PARENT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(os.getpid(), child, flush=True)
time.sleep(60)
"""


def test_closing_kills_the_whole_group(transport: LocalTransport, python: str) -> None:
    stream = transport.open([python, "-I", "-c", PARENT])
    pids = [int(word) for word in stream.read(100, 10).split()]
    assert not gone(pids[0]) and not gone(pids[1])
    stream.close()
    wait_until_gone(*pids)


def test_closing_lets_a_program_give_back_what_it_holds(
    transport: LocalTransport, python: str, tmp_path: Path
) -> None:
    lock = tmp_path / "lock"
    script = (
        f"import os, sys, time; open({str(lock)!r}, 'w'); print('held', flush=True)\n"
        f"sys.stdin.read(); time.sleep(0.1); os.unlink({str(lock)!r})"
    )
    stream = transport.open([python, "-I", "-c", script])
    assert stream.read(100, 10) == b"held\n"
    stream.close()
    assert not lock.exists()


def test_closing_kills_a_group_whose_leader_ended(transport: LocalTransport, python: str) -> None:
    script = PARENT.replace("print(os.getpid(), child, flush=True)\ntime.sleep(60)", "print(child)")
    stream = transport.open([python, "-I", "-c", script])
    child = int(stream.read(100, 10))
    assert stream.wait(10) == 0
    assert not gone(child)
    stream.close()
    wait_until_gone(child)


def test_a_signal_is_a_negative_status(transport: LocalTransport, python: str) -> None:
    stream = transport.open([python, "-I", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert stream.wait(10) == -9


def test_it_does_not_share_our_session(transport: LocalTransport, python: str) -> None:
    stream = transport.open([python, "-I", "-c", "import os; print(os.getsid(0), os.getpid())"])
    session, pid = map(int, stream.read(100, 10).split())
    assert session == pid != os.getsid(0)


def test_no_descriptor_stays_open(transport: LocalTransport, python: str) -> None:
    transport.open([python, "-I", "-c", "pass"]).close()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        transport.open([python, "-I", "-c", "pass"]).close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
