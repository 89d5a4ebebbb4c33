"""The test hosts themselves: they are other machines, and they go away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ssh.hosts import (
    CHECKOUT,
    PYTHON,
    Hosts,
    assert_nothing_left,
    require,
    sweep_stale,
    unavailable,
)

pytestmark = pytest.mark.ssh


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def links() -> str:
    return subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout


def test_a_host_has_nothing_of_ours(shared_hosts: Hosts) -> None:
    host = shared_hosts[0]
    script = f"import os; print(os.path.exists({str(CHECKOUT)!r}), os.path.exists({sys.prefix!r}))"
    assert host.exec(PYTHON, "-c", script).stdout == "False False\n"
    for package in ("numpy", "grpc", "paramiko", "pydantic"):
        assert (
            "ModuleNotFoundError"
            in host.exec(PYTHON, "-c", f"import {package}", check=False).stderr
        )
    assert host.exec("ls", "/home", "/tmp", "/dev/shm", "/var/tmp").stdout.split() == [
        "/dev/shm:",
        "/home:",
        "/tmp:",
        "/var/tmp:",
    ]


def test_hosts_differ(shared_hosts: Hosts) -> None:
    first, second = shared_hosts
    assert first.exec("hostname").stdout != second.exec("hostname").stdout != socket.gethostname()
    first.exec("touch", "/tmp/here")
    assert not Path("/tmp/here").exists()
    assert "here" not in second.exec("ls", "/tmp").stdout
    first.exec("rm", "/tmp/here")
    assert first.host_key_fingerprint != second.host_key_fingerprint


def test_hosts_reach_each_other(shared_hosts: Hosts) -> None:
    first, second = shared_hosts
    script = f"import socket; print(socket.create_connection(({second.name!r}, 22), 5).recv(4))"
    assert first.exec(PYTHON, "-c", script).stdout == "b'SSH-'\n"


def test_what_is_left_is_seen_from_outside(shared_hosts: Hosts) -> None:
    host = shared_hosts[0]
    before = host.snapshot()
    assert_nothing_left([before], [host.snapshot()])
    script = (
        "import os, socket, time; open('/dev/shm/block', 'w').close(); os.makedirs('/tmp/dsgd-0')\n"
        "s = socket.create_server(('0.0.0.0', 4183)); u = socket.socket(socket.AF_UNIX)\n"
        "u.bind('/tmp/dsgd-0/x.sock'); u.listen(); open('/tmp/ready', 'w').close()\n"
        "time.sleep(60)"
    )
    start = f'setsid {PYTHON} -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
    pid = int(host.exec("sh", "-c", start, "sh", script).stdout)
    try:
        until(lambda: "/tmp/ready" in host.files("/tmp"))
        with pytest.raises(AssertionError) as failure:
            assert_nothing_left([before], [host.snapshot()])
        report = str(failure.value)
        for part in (
            f"process {pid} {PYTHON}",
            "socket tcp 0.0.0.0:4183",
            "socket unix /tmp/dsgd-0/x.sock",
            "file /dev/shm/block",
            "file /tmp/dsgd-0/x.sock",
        ):
            assert part in report
    finally:
        for outer in host.pids():
            os.kill(outer, signal.SIGKILL)
    until(lambda: host.processes() == [])  # reaped by process 1
    host.exec("rm", "-r", "/dev/shm/block", "/tmp/dsgd-0", "/tmp/ready")
    assert_nothing_left([before], [host.snapshot()])


def test_the_cache_does_not_count(shared_hosts: Hosts) -> None:
    before = shared_hosts[0].snapshot()
    shared_hosts[0].exec("mkdir", "-p", "/root/.cache/dsgd/code/x")
    assert_nothing_left([before], [shared_hosts[0].snapshot()])
    shared_hosts[0].exec("rm", "-r", "/root/.cache")


def test_the_cable_and_the_one_way_loss() -> None:
    require()

    def answers(address: str, wait_s: float = 0.5) -> bool:
        try:
            with socket.create_connection((address, 22), wait_s) as connection:
                connection.settimeout(wait_s)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    with Hosts(1) as hosts:
        host = hosts[0]
        assert answers(host.address)
        host.unplug()
        assert not answers(host.address)
        host.plug()
        until(lambda: answers(host.address))
        host.blackhole(hosts.launcher)
        assert not answers(host.address)
        host.heal(hosts.launcher)
        until(lambda: answers(host.address))
        host.freeze()
        assert not answers(host.address)
        host.thaw()
        until(lambda: answers(host.address))


def test_closing_removes_all() -> None:
    require()
    with Hosts(2) as hosts:
        start = f"setsid {PYTHON} -c 'import time; time.sleep(60)' </dev/null >/dev/null 2>&1 &"
        hosts[0].exec("sh", "-c", start)
        until(lambda: len(hosts[0].pids()) == 1)
        outside, link = hosts[0].pids(), hosts[0].link
        assert link in links()
    assert link not in links()
    assert not any(Path(f"/proc/{pid}").exists() for pid in outside)
    hosts.close()


KILLED = """
import sys, time
from tests.ssh.hosts import Hosts
hosts = Hosts(1).__enter__()
print(hosts[0].link, hosts[0].pid1, flush=True)
time.sleep(60)
"""


def test_the_guard_cleans_up_after_killed_tests() -> None:
    require()
    tests = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    with tests:
        assert tests.stdout is not None
        link, pid1 = tests.stdout.readline().split()
        assert link in links()
        tests.kill()
    until(lambda: link not in links() and not Path(f"/proc/{pid1}").exists())


def test_stale_links_are_swept() -> None:
    require()
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f"dt{dead.pid:x}-9b"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    assert name in sweep_stale()
    assert name not in links()


def test_a_skip_becomes_a_failure_where_ssh_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    unavailable.cache_clear()
    try:
        monkeypatch.delenv("DSGD_REQUIRE_SSH", raising=False)
        with pytest.raises(pytest.skip.Exception, match="SSH TESTS NOT RUN: test hosts need root"):
            require()
        monkeypatch.setenv("DSGD_REQUIRE_SSH", "1")
        with pytest.raises(pytest.fail.Exception, match="need root"):
            require()
    finally:
        unavailable.cache_clear()
