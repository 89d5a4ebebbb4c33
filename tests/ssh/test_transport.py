"""The ssh transport keeps the transports' contract, on a host that is another machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsgd_cli.transport.ssh import SshTransport
from tests.ssh.hosts import PYTHON, Hosts
from tests.transport.contract import TransportContract

pytestmark = pytest.mark.ssh


@pytest.fixture
def transport(shared_hosts: Hosts, home: Path) -> Iterator[SshTransport]:
    shared_hosts.make_home(home)
    opened = SshTransport("gpu1", shared_hosts[0].address, user="root")
    yield opened
    opened.close()
    for pid in shared_hosts[0].pids():  # behind SSH, a program that reads nothing outlives us
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def python() -> str:
    return PYTHON


class TestSsh(TransportContract):
    pass
