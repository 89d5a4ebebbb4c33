"""The ssh transport keeps the transports' contract, on a host that is another machine."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def python() -> str:
    return PYTHON


class TestSsh(TransportContract):
    pass
