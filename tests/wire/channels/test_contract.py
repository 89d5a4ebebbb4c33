"""What every channel does, whatever carries it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Operation, Reason, Refused, Shape
from tests.wire.channels.kinds import Kind, Worker
from tests.wire.conftest import Shard

NewWorker = Callable[..., Worker]
tiny = pytest.mark.parametrize("shape", ["tiny"], indirect=True)


def refusal(worker: Worker, *arguments: Any, **named: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        worker.do(*arguments, **named)
    return caught.value


def test_what_is_written_is_pulled_and_what_is_pushed_is_applied(
    new_worker: NewWorker, shape: Shape
) -> None:
    worker = new_worker()
    first = np.arange(worker.size, dtype=np.float32)
    written = worker.do(Operation.WRITE, up=first)
    assert written.versions == [0] * shape.blocks
    worker.do(Operation.PULL)
    np.testing.assert_array_equal(worker.parameters, first)
    pushed = worker.push(worker.ones())
    np.testing.assert_array_equal(worker.parameters, first - 1)
    assert pushed.versions == [1] * shape.blocks
    assert pushed.applied == [(1, 1)] * shape.blocks
    alone = worker.do(Operation.PUSH, 2, worker.ones())
    assert alone.versions == [2] * shape.blocks
    assert alone.applied == [(1, 2)] * shape.blocks
    np.testing.assert_array_equal(worker.parameters, first - 1)  # a push brings nothing down
    worker.do(Operation.PULL)
    np.testing.assert_array_equal(worker.parameters, first - 2)


def test_a_push_sent_again_is_applied_once(new_worker: NewWorker, shape: Shape) -> None:
    worker = new_worker()
    for seq in (1, 1, 2, 1, 2):
        exchange = worker.push(worker.ones(), seq)
    np.testing.assert_array_equal(worker.parameters, worker.ones(-2))
    assert exchange.applied == [(1, 2)] * shape.blocks


def test_a_gap_is_refused_and_changes_nothing(new_worker: NewWorker) -> None:
    worker = new_worker()
    assert refusal(worker, Operation.PUSH_PULL, 2, worker.ones()).reason is Reason.OUT_OF_ORDER
    worker.push(worker.ones(), 1)  # the channel lives on, and no seq was consumed
    np.testing.assert_array_equal(worker.parameters, worker.ones(-1))


def test_a_fenced_incarnation_can_neither_push_nor_write_nor_pull(
    configured: Shard, new_worker: NewWorker
) -> None:
    old, new = new_worker(incarnation=1), new_worker(incarnation=2)
    old.push(old.ones())
    fence = pb.FenceRequest(epoch=configured.epoch, worker=0, incarnation=2)
    configured.stub().Fence(fence, timeout=5)
    assert refusal(old, Operation.PUSH_PULL, 2, old.ones()).reason is Reason.FENCED
    assert refusal(old, Operation.WRITE, 0, old.ones()).reason is Reason.FENCED
    assert refusal(old, Operation.PULL).reason is Reason.FENCED
    new.push(new.ones(), 1)
    np.testing.assert_array_equal(new.parameters, new.ones(-2))


def test_what_is_not_finite_never_reaches_its_block(new_worker: NewWorker, shape: Shape) -> None:
    for index, value in enumerate((np.nan, np.inf, -np.inf)):
        worker = new_worker(worker=index)
        for place, block in ((0, 0), (-1, shape.blocks - 1)):
            gradient = worker.ones()
            gradient[place] = value
            refused = refusal(worker, Operation.PUSH_PULL, 1, gradient)
            assert (refused.reason, refused.block) == (Reason.NOT_FINITE, block)
        worker.do(Operation.PULL)
        assert np.isfinite(worker.parameters).all()
        assert worker.parameters[-1] == 0


@tiny
def test_a_write_after_the_first_update_is_refused(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.push(worker.ones())
    assert refusal(worker, Operation.WRITE, 0, worker.ones(5)).reason is Reason.OUT_OF_ORDER


def test_a_frozen_shard_makes_pushes_wait_and_pulls_not(
    configured: Shard, new_worker: NewWorker
) -> None:
    worker, reader = new_worker(worker=0), new_worker(worker=1)
    stub = configured.stub()
    stub.Freeze(pb.FreezeRequest(epoch=configured.epoch), timeout=5)
    thread = threading.Thread(target=worker.push, args=(worker.ones(),))
    thread.start()
    for _ in range(5):
        reader.do(Operation.PULL)
        np.testing.assert_array_equal(reader.parameters, reader.ones(0))
    assert thread.is_alive()
    stub.Thaw(pb.ThawRequest(epoch=configured.epoch), timeout=5)
    thread.join(10)
    assert not thread.is_alive()
    np.testing.assert_array_equal(worker.parameters, worker.ones(-1))


@tiny
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"cluster": "0" * 16}, Reason.WRONG_CLUSTER),
        ({"epoch": 2}, Reason.WRONG_EPOCH),
        ({"shard": 1}, None),  # the certificate of server/0 is not that of server/1
        ({"shape": Shape(4000 + 64, 64)}, Reason.WRONG_SIZE),
        ({"shape": Shape(4000 - 64, 64)}, Reason.WRONG_SIZE),
        ({"shape": Shape(4000, 128)}, Reason.WRONG_SIZE),
    ],
)
def test_what_does_not_belong_here_is_refused(
    new_worker: NewWorker, wrong: dict[str, Any], reason: Reason | None
) -> None:
    worker = new_worker(**wrong, give_up_s=0.5)
    if reason is None:
        with pytest.raises(ids.PeerUnreachable, match="another process"):
            worker.push(worker.ones())
    else:
        assert refusal(worker, Operation.PUSH_PULL, 1, worker.ones()).reason is reason


def test_no_run_is_no_shard(shard: Shard, kind: Kind) -> None:
    worker = Worker(kind, shard, Shape(4000, 64))
    try:
        assert refusal(worker, Operation.PULL).reason is Reason.NOT_CONFIGURED
    finally:
        worker.channel.close()


@tiny
def test_the_next_run_refuses_the_channels_of_the_last(
    configured: Shard, new_worker: NewWorker
) -> None:
    worker = new_worker()
    worker.push(worker.ones())
    configured.epoch = 2
    configured.configure(1000)
    assert refusal(worker, Operation.PUSH_PULL, 2, worker.ones()).reason is Reason.WRONG_EPOCH
    newer = new_worker()
    newer.do(Operation.PULL)
    np.testing.assert_array_equal(newer.parameters, newer.ones(0))


def test_a_pull_since_brings_only_what_is_newer(new_worker: NewWorker, shape: Shape) -> None:
    worker = new_worker()
    pushed = worker.push(worker.ones())
    since = list(pushed.versions)
    old = {0, shape.blocks // 2, shape.blocks - 1}
    for block in old:
        since[block] = 0
    worker.parameters[:] = 7
    pulled = worker.do(Operation.PULL, since=tuple(since))
    for block in range(shape.blocks):
        start, stop = (end // 4 for end in shape.bounds(block))
        assert (worker.parameters[start:stop] == (-1 if block in old else 7)).all()
    assert pulled.versions == pushed.versions
    assert pulled.applied == pushed.applied
    worker.parameters[:] = 7
    worker.do(Operation.PULL, since=tuple(pushed.versions))
    assert (worker.parameters == 7).all()


def test_many_workers_at_once_lose_nothing_and_read_nothing_torn(
    new_worker: NewWorker, shape: Shape
) -> None:
    """Each push adds 1 everywhere: within a block all parameters are equal, always."""
    pushes, workers = 10, [new_worker(worker=index) for index in range(4)]
    failures: list[BaseException] = []

    def train(worker: Worker) -> None:
        try:
            for _ in range(pushes):
                exchange = worker.push(worker.ones(-1))
                for block in range(shape.blocks):
                    start, stop = (end // 4 for end in shape.bounds(block))
                    assert (worker.parameters[start:stop] == exchange.versions[block]).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    pulled = workers[0].do(Operation.PULL)
    np.testing.assert_array_equal(workers[0].parameters, workers[0].ones(len(workers) * pushes))
    assert pulled.applied == [(1, pushes)] * shape.blocks


def test_one_thread_drives_many_channels(new_worker: NewWorker, shape: Shape) -> None:
    """As a trainer does with its shards: none may wait for another to be read first."""
    from dsgd_cli.wire.channels.base import Exchange, run

    workers = [new_worker(worker=index) for index in range(3)]
    exchanges = [
        Exchange(Operation.PUSH_PULL, 1, w.ones(-1).data.cast("B"), w.parameters.data.cast("B"))
        for w in workers
    ]
    run([worker.channel for worker in workers], exchanges)
    assert max(max(exchange.versions) for exchange in exchanges) == 3
