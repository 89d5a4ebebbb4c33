"""The coordinator's calls for rounds and vectors, on a real server: once each, however repeated."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from dsgd_cli.engine import vectors
from dsgd_cli.engine.vectors import PARAMETERS, Combine, Dot, Gradient, Op
from dsgd_cli.wire import dsgd_pb2 as pb
from tests.wire.conftest import BLOCK_ELEMENTS, Shard

SMALL = 40  # elements: three blocks, the last is shorter
LARGE = (1 << 18) + 8  # more than a megabyte: the loop hands it to a thread


def configured(shard: Shard, elements: int, name: str = "synchronous") -> Any:
    """The engine's shard."""
    shard.configure(elements, max(BLOCK_ELEMENTS, elements // 4), name=name)
    run = shard.service._run
    assert run is not None
    return run.shard


def contribute(held: Any, round_: int, part: int, value: float) -> None:
    for block, size in enumerate(held.sizes):
        held.contribute(part, 1, round_, part, block, np.full(size, value, np.float32))


def parameters(held: Any) -> set[float]:
    return {float(v) for block in range(held.blocks) for v in held.values(block)}


def commit(shard: Shard, round_: int, parts: int, scale: float = 1.0, epoch: int = 1) -> None:
    request = pb.CommitRequest(epoch=epoch, round=round_, parts=parts, scale=scale)
    shard.stub().Commit(request, timeout=10)


def measure(shard: Shard, round_: int, parts: int, scale: float = 1.0) -> float:
    request = pb.MeasureRequest(epoch=1, round=round_, parts=parts, scale=scale)
    return float(shard.stub().Measure(request, timeout=10).squares)


def operate(shard: Shard, number: int, *ops: Op) -> list[float]:
    text = json.dumps(vectors.as_json(ops))
    request = pb.OperateRequest(epoch=1, number=number, ops_json=text)
    return list(shard.stub().Operate(request, timeout=10).numbers)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_commit_is_one_update_however_often_it_is_asked_for(shard: Shard, elements: int) -> None:
    held = configured(shard, elements)
    contribute(held, 1, 0, 1.0)
    contribute(held, 1, 1, 3.0)
    for _ in range(3):
        commit(shard, 1, parts=2, scale=0.5)
        assert parameters(held) == {-2.0}
        assert {held.version(block) for block in range(held.blocks)} == {1}


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_round_with_a_part_missing_is_not_committed(shard: Shard, elements: int) -> None:
    held = configured(shard, elements)
    contribute(held, 1, 0, 1.0)
    with pytest.raises(grpc.RpcError, match="1 of 2 parts of round 1"):
        commit(shard, 1, parts=2)
    assert parameters(held) == {0.0}


def test_another_epoch_is_refused(shard: Shard) -> None:
    contribute(configured(shard, SMALL), 1, 0, 1.0)
    with pytest.raises(grpc.RpcError, match="this is epoch 1, not 2"):
        commit(shard, 1, parts=1, epoch=2)


def test_what_is_measured_is_what_would_be_committed(shard: Shard) -> None:
    held = configured(shard, SMALL)
    contribute(held, 1, 0, 1.0)
    contribute(held, 1, 1, 2.0)
    for _ in range(2):
        assert measure(shard, 1, parts=2, scale=0.5) == pytest.approx(SMALL * 1.5**2)
    with pytest.raises(grpc.RpcError, match="2 of 3 parts"):
        measure(shard, 1, parts=3)
    assert parameters(held) == {0.0}


def test_the_rate_is_a_factor_of_what_follows(shard: Shard) -> None:
    held = configured(shard, SMALL)
    for factor in (0.25, 0.25, 2.0):
        shard.stub().SetRate(pb.SetRateRequest(epoch=1, factor=factor), timeout=10)
    contribute(held, 1, 0, 1.0)
    commit(shard, 1, parts=1)
    assert parameters(held) == {-2.0}


def test_operations_are_done_once_and_answered_again(shard: Shard) -> None:
    held = configured(shard, SMALL, name="sandblaster")
    contribute(held, 1, 0, 2.0)
    first = (Gradient("g", 1, 1, 0.5), Combine(PARAMETERS, ((3.0, "g"),)), Dot("g", "g"))
    assert operate(shard, 1, *first) == [SMALL]
    grow = (Combine(PARAMETERS, ((2.0, PARAMETERS),)), Dot(PARAMETERS, PARAMETERS))
    for _ in range(2):
        assert operate(shard, 2, *grow) == [SMALL * 36.0]
    assert parameters(held) == {6.0}
    with pytest.raises(grpc.RpcError, match="operations 4 after 2"):
        operate(shard, 4, *grow)


def test_a_run_without_vectors_says_so(shard: Shard) -> None:
    configured(shard, SMALL)
    with pytest.raises(grpc.RpcError, match="this run has no vectors"):
        operate(shard, 1, Dot(PARAMETERS, PARAMETERS))


def test_a_call_that_is_repeated_waits_for_the_first(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given up by who asked, not by the thread that is still at it."""
    held = configured(shard, SMALL, name="sandblaster")
    original = vectors.Vectors._combine
    calls: list[float] = []

    def slowly(self: vectors.Vectors, out: str, terms: Sequence[tuple[float, str]]) -> None:
        calls.append(time.monotonic())
        time.sleep(0.3)
        original(self, out, terms)

    monkeypatch.setattr(vectors.Vectors, "_combine", slowly)
    for block, size in enumerate(held.sizes):
        held.assign(block, np.ones(size, np.float32))
    answers: list[list[float]] = []
    double = (Combine(PARAMETERS, ((2.0, PARAMETERS),)), Dot(PARAMETERS, PARAMETERS))
    threads = [
        threading.Thread(target=lambda: answers.append(operate(shard, 1, *double)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [[SMALL * 4.0]] * 2
    assert len(calls) == 1
    assert parameters(held) == {2.0}
