"""Exactly once, whatever happens to the connection; and never for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Operation, Shape
from tests.wire.channels.kinds import Kind, Worker
from tests.wire.conftest import Shard

NewWorker = Callable[..., Worker]
tiny = pytest.mark.parametrize("shape", ["tiny"], indirect=True)
large = pytest.mark.parametrize("shape", ["large"], indirect=True)


def test_exactly_once_while_connections_die(
    kind: Kind, configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    """Each push adds 1 everywhere: the parameters count the pushes that were applied."""
    pushes = 20 if shape.size_bytes < 100_000 else 5
    longest = max(40_000, 5 * shape.size_bytes)
    failures: list[BaseException] = []

    def train(worker: Worker) -> None:
        try:
            for _ in range(pushes):
                worker.push(worker.ones(-1.0))
        except BaseException as error:
            failures.append(error)

    with kind.cruel(configured, 8_000, longest) as way:
        workers = [new_worker(worker=index, address=way.address) for index in range(2)]
        threads = [threading.Thread(target=train, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        assert way.cuts >= 2, "nothing was cut"
        for worker in workers:
            worker.channel.close()
    direct = new_worker(worker=0)
    pulled = direct.do(Operation.PULL)
    np.testing.assert_array_equal(direct.parameters, direct.ones(2 * pushes))
    assert pulled.versions == [2 * pushes] * shape.blocks
    assert pulled.applied == [(1, pushes)] * shape.blocks


def test_a_stuck_server_is_given_up_within_the_deadline(
    configured: Shard, new_worker: NewWorker
) -> None:
    """Its process lives and its sockets accept, but a block never comes free."""
    worker = new_worker(stall_s=0.5, give_up_s=1.5)
    worker.push(worker.ones())
    run = configured.service._run
    assert run is not None
    with run.shard._locks[-1]:
        began_s = time.monotonic()
        with pytest.raises(ids.PeerUnreachable, match=r"did not answer for 1\.5 s"):
            worker.push(worker.ones())
        assert time.monotonic() - began_s < 6


@tiny
def test_a_dead_server_is_given_up_with_the_reason(
    configured: Shard, new_worker: NewWorker
) -> None:
    worker = new_worker(give_up_s=1.0)
    worker.push(worker.ones())
    for carrier in configured.service.carriers.values():
        carrier.close()
    configured.do(configured._server.stop(0))
    with pytest.raises(ids.PeerUnreachable, match="nobody listens"):
        worker.push(worker.ones())


def test_closing_breaks_off_what_is_in_flight(configured: Shard, new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.push(worker.ones())
    caught: list[BaseException] = []

    def push() -> None:
        try:
            worker.push(worker.ones())
        except BaseException as error:
            caught.append(error)

    run = configured.service._run
    assert run is not None
    with run.shard._locks[-1]:
        thread = threading.Thread(target=push)
        thread.start()
        time.sleep(0.2)  # in flight, or not yet: both must end
        worker.channel.close()
        thread.join(5)
        assert not thread.is_alive()
    assert isinstance(caught[0], ids.PeerUnreachable)


@large
def test_a_push_that_died_halfway_is_resumed(
    kind: Kind, configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    """The first blocks are in, the last are not: sent again, each counts once."""
    worker = new_worker(stall_s=0.5)
    worker.push(worker.ones())
    run = configured.service._run
    assert run is not None
    lock = run.shard._locks[-1]
    lock.acquire()
    thread = threading.Thread(target=worker.push, args=(worker.ones(),))
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while run.shard.version(shape.blocks - 2) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.0)  # the worker stalls and sends again
        versions = [run.shard.version(block) for block in range(shape.blocks)]
    finally:
        lock.release()
    thread.join(20)
    assert versions == [2] * (shape.blocks - 1) + [1]
    np.testing.assert_array_equal(worker.parameters, worker.ones(-2))
    assert worker.do(Operation.PULL).versions == [2] * shape.blocks
