"""What every channel does with contributions to a round, with late pushes, and with `since`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import DROPPED, Exchange, Operation, Reason, Refused, Shape
from dsgd_cli.wire.channels.shm_link import Link
from tests.wire.channels.kinds import Kind, Worker
from tests.wire.conftest import Shard

NewWorker = Callable[..., Worker]
large = pytest.mark.parametrize("shape", ["large"], indirect=True)


@pytest.fixture
def configured(shard: Shard, shape: Shape, request: pytest.FixtureRequest) -> Shard:
    algorithm = getattr(request, "param", {"name": "synchronous"})
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4, **algorithm)
    return shard


def contribute(worker: Worker, value: float, round_: int, part: int) -> Exchange:
    return worker.do(Operation.CONTRIBUTE, round_, worker.ones(value), tag=part)


def refusal(worker: Worker, value: float, round_: int, part: int) -> Refused:
    with pytest.raises(Refused) as caught:
        contribute(worker, value, round_, part)
    return caught.value


def commit(shard: Shard, round_: int, parts: int, scale: float = 1.0) -> None:
    request = pb.CommitRequest(epoch=shard.epoch, round=round_, parts=parts, scale=scale)
    shard.stub().Commit(request, timeout=10)


def pulled(worker: Worker) -> tuple[float, set[int]]:
    """The value of all parameters, and the versions of all blocks."""
    versions = worker.do(Operation.PULL).versions
    (value,) = set(worker.parameters)
    return float(value), set(versions)


# ── contributions ──────────────────────────────────────────────────────────────────────────────


def test_a_part_is_added_once_however_often_it_is_sent(
    configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    one, other = new_worker(worker=0), new_worker(worker=1)
    for _ in range(3):
        said = contribute(one, 2.0, round_=1, part=0)
    contribute(other, 4.0, round_=1, part=1)
    contribute(one, 2.0, round_=1, part=0)
    assert said.versions == [0] * shape.blocks
    assert said.applied == [(0, 0)] * shape.blocks
    assert pulled(one) == (0.0, {0})  # nothing before it is committed
    for _ in range(2):
        commit(configured, round_=1, parts=2, scale=0.5)
        assert pulled(other) == (-3.0, {1})


def test_the_same_worker_may_have_several_parts(configured: Shard, new_worker: NewWorker) -> None:
    worker = new_worker()
    for part in (0, 2, 1, 2):
        contribute(worker, 1.0, round_=1, part=part)
    commit(configured, round_=1, parts=3)
    assert pulled(worker) == (-3.0, {1})


def test_a_round_that_is_over_says_so_and_changes_nothing(
    configured: Shard, new_worker: NewWorker
) -> None:
    late, other = new_worker(worker=0), new_worker(worker=1)
    contribute(late, 8.0, round_=1, part=0)
    contribute(other, 1.0, round_=3, part=0)
    refused = refusal(late, 8.0, round_=2, part=1)
    assert (refused.reason, refused.block) == (Reason.ROUND_OVER, 0)
    contribute(late, 2.0, round_=3, part=1)  # the channel lives on
    commit(configured, round_=3, parts=2)
    assert pulled(late) == (-3.0, {1})
    assert refusal(late, 8.0, round_=3, part=2).reason is Reason.ROUND_OVER  # it is made
    assert pulled(late) == (-3.0, {1})


def test_a_round_that_ends_in_the_middle_of_a_contribution_leaves_nothing_of_it(
    configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    """The last block is in the next round already, the others are not."""
    worker, last = new_worker(), shape.blocks - 1
    run = configured.service._run
    assert run is not None
    size = run.shard.sizes[last]
    run.shard.contribute(1, 1, 2, 0, last, np.ones(size, np.float32))
    refused = refusal(worker, 8.0, round_=1, part=0)
    assert (refused.reason, refused.block) == (Reason.ROUND_OVER, last)
    for block in range(last):
        run.shard.contribute(1, 1, 2, 0, block, np.ones(run.shard.sizes[block], np.float32))
    contribute(worker, 2.0, round_=2, part=1)
    commit(configured, round_=2, parts=2)
    assert pulled(worker) == (-3.0, {1})


def test_a_fenced_incarnation_contributes_nothing(configured: Shard, new_worker: NewWorker) -> None:
    old, new = new_worker(incarnation=1), new_worker(incarnation=2)
    contribute(old, 1.0, round_=1, part=0)
    fence = pb.FenceRequest(epoch=configured.epoch, worker=0, incarnation=2)
    configured.stub().Fence(fence, timeout=5)
    assert refusal(old, 8.0, round_=1, part=1).reason is Reason.FENCED
    contribute(new, 2.0, round_=1, part=1)
    commit(configured, round_=1, parts=2)
    assert pulled(new) == (-3.0, {1})


def test_what_is_not_finite_is_not_added(
    configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    worker = new_worker()
    gradient = worker.ones()
    gradient[-1] = np.nan
    with pytest.raises(Refused) as caught:
        worker.do(Operation.CONTRIBUTE, 1, gradient, tag=0)
    assert (caught.value.reason, caught.value.block) == (Reason.NOT_FINITE, shape.blocks - 1)
    contribute(worker, 1.0, round_=2, part=0)
    commit(configured, round_=2, parts=1)
    assert pulled(worker) == (-1.0, {1})


@pytest.mark.parametrize("configured", [{"name": "downpour"}], indirect=True)
def test_a_run_without_rounds_takes_no_contributions(new_worker: NewWorker) -> None:
    worker = new_worker()
    refused = refusal(worker, 1.0, round_=1, part=0)
    assert refused.reason is Reason.WRONG_SIZE
    assert "this run has no rounds" in str(refused)


def test_a_frozen_shard_takes_contributions(configured: Shard, new_worker: NewWorker) -> None:
    """They are not in the parameters, and whoever contributes must not wait for a thaw."""
    worker = new_worker()
    stub = configured.stub()
    stub.Freeze(pb.FreezeRequest(epoch=configured.epoch), timeout=5)
    contribute(worker, 1.0, round_=1, part=0)
    assert pulled(worker) == (0.0, {0})
    stub.Thaw(pb.ThawRequest(epoch=configured.epoch), timeout=5)
    commit(configured, round_=1, parts=1)
    assert pulled(worker) == (-1.0, {1})


def test_parts_are_added_once_while_connections_die(
    kind: Kind, configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    rounds = 20 if shape.size_bytes < 100_000 else 5
    with kind.cruel(configured, 8_000, max(40_000, 3 * shape.size_bytes)) as way:
        workers = [new_worker(worker=index, address=way.address) for index in range(2)]
        for round_ in range(1, rounds + 1):
            for part, worker in enumerate(workers):
                contribute(worker, part + 1.0, round_, part)
            commit(configured, round_, parts=2)
        assert way.cuts >= 1, "nothing was cut"
        for worker in workers:
            worker.channel.close()
    assert pulled(new_worker()) == (-3.0 * rounds, {rounds})


@large
def test_a_contribution_that_died_halfway_is_resumed(
    configured: Shard, new_worker: NewWorker, shape: Shape
) -> None:
    """The first blocks are in the sum, the last are not: sent again, each counts once."""
    worker = new_worker(stall_s=0.5)
    run = configured.service._run
    assert run is not None
    sums: Any = run.shard._sums
    with run.shard._locks[-1]:
        thread = threading.Thread(target=contribute, args=(worker, 1.0, 1, 0))
        thread.start()
        deadline = time.monotonic() + 10
        while not sums._parts[-2] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.0)  # the worker stalls and sends again
        parts = [len(parts) for parts in sums._parts]
        assert thread.is_alive()
    thread.join(20)
    assert parts == [1] * (shape.blocks - 1) + [0]
    assert not thread.is_alive()
    commit(configured, round_=1, parts=1)
    assert pulled(worker) == (-1.0, {1})


# ── late pushes ────────────────────────────────────────────────────────────────────────────────

bounded = pytest.mark.parametrize("configured", [{"max_staleness": 1}], indirect=True)


@bounded
@pytest.mark.parametrize("operation", [Operation.PUSH, Operation.PUSH_PULL])
def test_a_push_that_comes_too_late_says_so_and_takes_its_seq(
    new_worker: NewWorker, shape: Shape, operation: Operation
) -> None:
    late, other = new_worker(worker=0), new_worker(worker=1)
    for seq in (1, 2):
        other.do(Operation.PUSH, seq, other.ones(), tag=seq - 1)
    for _ in range(2):  # sent again, it has come too late again
        said = late.do(operation, 1, late.ones(8.0), tag=0)
        assert said.versions == [2 | DROPPED] * shape.blocks
        assert said.applied == [(1, 1)] * shape.blocks
        assert set(late.parameters) == {-2.0 if operation.fetches else 0.0}
    said = late.do(operation, 2, late.ones(), tag=1)  # one by others since then: good enough
    assert said.versions == [3] * shape.blocks
    assert said.applied == [(1, 2)] * shape.blocks
    assert pulled(late) == (-3.0, {3})
    assert pulled(other) == (-3.0, {3})


@bounded
def test_a_late_push_brings_fresh_values_while_others_push(
    new_worker: NewWorker, shape: Shape
) -> None:
    """The version is that of the values, beside the word that the push was dropped."""
    late, other = new_worker(worker=0), new_worker(worker=1)
    pushes = 20
    for seq in (1, 2, 3):
        other.do(Operation.PUSH, seq, other.ones(-1), tag=seq - 1)
    thread = threading.Thread(
        target=lambda: [
            other.do(Operation.PUSH, seq, other.ones(-1), tag=seq - 1)
            for seq in range(4, pushes + 1)
        ]
    )
    thread.start()
    for seq in range(1, pushes + 1):
        said = late.do(Operation.PUSH_PULL, seq, late.ones(8.0), tag=0)
        for block, version in enumerate(said.versions):
            start, stop = (end // 4 for end in shape.bounds(block))
            assert version & DROPPED
            assert (late.parameters[start:stop] == version & ~DROPPED).all()
    thread.join(20)
    assert pulled(late) == (pushes, {pushes})


# ── since ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def moved(configured: Shard, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each block whose values are fetched: read by the server, or copied from it."""
    sizes: list[int] = []
    run = configured.service._run
    assert run is not None
    observe, copy_block = run.shard.observe, Link.copy_block

    def observed(worker: int, block: int, take: Any = None) -> Any:
        if take is not None:
            sizes.append(len(run.shard.read(block)))
        return observe(worker, block, take)

    def copied(link: Link, block: int, start: int, target: Any) -> int | None:
        sizes.append(target.size)
        return copy_block(link, block, start, target)

    if kind.name == "shm":
        monkeypatch.setattr(Link, "copy_block", copied)
    else:
        monkeypatch.setattr(run.shard, "observe", observed)
    return sizes


def test_only_the_blocks_of_a_newer_version_are_moved(
    configured: Shard, new_worker: NewWorker, shape: Shape, moved: list[int]
) -> None:
    worker, last = new_worker(), shape.blocks - 1
    contribute(worker, 1.0, round_=1, part=0)
    commit(configured, round_=1, parts=1)
    known = worker.do(Operation.PULL).versions
    assert sum(moved) == shape.size_bytes
    run = configured.service._run
    assert run is not None
    run.shard.assign(last, np.full(run.shard.sizes[last], 7.0, np.float32))
    moved.clear()
    newer = worker.do(Operation.PULL, since=tuple(known))
    start, stop = shape.bounds(last)
    assert moved == [stop - start]
    assert newer.versions == [1] * last + [2]
    assert (worker.parameters[start // 4 :] == 7.0).all()
    assert (worker.parameters[: start // 4] == -1.0).all()
    moved.clear()
    assert worker.do(Operation.PULL, since=tuple(newer.versions)).versions == newer.versions
    assert moved == []
