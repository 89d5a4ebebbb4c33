"""What is the tcp channel's own and no matter of security."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsgd_cli.wire.channels.tcp import TcpChannel
from tests.wire.channels.kinds import KINDS, Kind, Worker


@pytest.fixture(params=[kind for kind in KINDS if kind.name.startswith("tcp")], ids=repr)
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.mark.parametrize("shape", ["tiny"], indirect=True)
def test_workers_of_one_host_know_how_many_they_are(
    new_worker: Callable[..., Worker],
) -> None:
    """So that nobody polls where they outnumber the cores."""
    workers = [new_worker(worker=number) for number in range(3)]
    for count in range(1, 4):
        for worker in workers[:count]:
            worker.push(worker.ones())
        newest = workers[count - 1].channel
        assert isinstance(newest, TcpChannel)
        assert newest.spin.processes == 1 + count
    workers[0].push(workers[0].ones())
    first = workers[0].channel
    assert isinstance(first, TcpChannel)
    assert first.spin.processes == 4
