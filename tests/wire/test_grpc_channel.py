"""What is gRPC's alone: the messages on its stream. The rest is in the suites of channels/."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels import grpc as carrier
from dsgd_cli.wire.channels.base import Exchange, Operation, Refused, Route, Shape, run
from dsgd_cli.wire.channels.grpc import GrpcChannel, messages
from tests.wire.conftest import BLOCK_ELEMENTS, Shard, identity

ELEMENTS = 1000  # 63 blocks of 16 floats, the last one of 8
SHAPE = Shape(ELEMENTS * 4, BLOCK_ELEMENTS * 4)


class Worker:
    """One worker's channel to the shard, with numpy at its ends."""

    def __init__(self, at: Shard, worker: int = 0, incarnation: int = 1, **more: Any) -> None:
        self.seq = 0
        options = {"epoch": at.epoch, "cluster": at.authority.cluster_id, "shard": 0}
        options |= {key: more.pop(key) for key in tuple(more) if key in options}
        route = Route(options["cluster"], options["epoch"], options["shard"], worker, incarnation)
        address = more.pop("address", at.address)
        shape = more.pop("shape", SHAPE)
        self.parameters = np.zeros(shape.size_bytes // 4, np.float32)
        self.channel = GrpcChannel(
            identity(at.authority, f"worker/{worker}"), address, route, shape, **more
        )

    def push(self, gradient: np.ndarray[Any, Any], seq: int | None = None) -> Exchange:
        self.seq = self.seq + 1 if seq is None else seq
        return self.do(Operation.PUSH_PULL, self.seq, gradient)

    def do(
        self, operation: Operation, seq: int = 0, up: np.ndarray[Any, Any] | None = None
    ) -> Exchange:
        exchange = Exchange(
            operation,
            seq,
            None if up is None else up.data.cast("B"),
            self.parameters.data.cast("B") if operation.fetches else None,
        )
        run([self.channel], [exchange])
        return exchange


@pytest.fixture
def configured(shard: Shard) -> Shard:
    shard.configure(ELEMENTS)
    return shard


@pytest.fixture
def new_worker(configured: Shard) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**more: Any) -> Worker:
        made.append(Worker(configured, **more))
        return made[-1]

    yield make
    for worker in made:
        worker.channel.close()


def ones(value: float = 1.0) -> np.ndarray[Any, Any]:
    return np.full(ELEMENTS, value, np.float32)


def refusal(worker: Worker, *arguments: Any, **named: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        worker.do(*arguments, **named)
    return caught.value


def raw(configured: Shard, *requests: pb.ExchangeRequest) -> list[pb.ExchangeReply]:
    """Sends what no channel would."""
    return list(configured.stub("worker/0").Exchange(iter(requests), timeout=10))


def header(configured: Shard, operation: int = 2, shard: int = 0) -> pb.Header:
    return pb.Header(
        cluster_id=configured.authority.cluster_id,
        epoch=1,
        shard=shard,
        worker=0,
        incarnation=1,
        seq=1,
        operation=operation,
    )


def test_a_message_out_of_bounds_is_refused_and_the_next_is_served(configured: Shard) -> None:
    block = bytes(BLOCK_ELEMENTS * 4)
    hostile = [
        pb.ExchangeRequest(blocks=[pb.Block(index=0, data=block)], last=True),  # no header
        pb.ExchangeRequest(header=header(configured), last=True),  # no blocks
        request(configured, pb.Block(index=5, data=block)),
        request(configured, pb.Block(index=2**32 - 1, data=block)),
        request(configured, pb.Block(index=0, data=block[:-1])),
        request(configured, pb.Block(index=0, data=block + b"\0")),
        request(configured, pb.Block(index=0)),
        pb.ExchangeRequest(header=header(configured, operation=77), last=True),
        pb.ExchangeRequest(header=header(configured, shard=1), last=True),
        pb.ExchangeRequest(header=header(configured, operation=0), since=[1, 2], last=True),
    ]
    good = pb.ExchangeRequest(header=header(configured, operation=0), last=True)
    replies = raw(configured, *hostile, good)
    assert [reply.HasField("refusal") for reply in replies] == [True] * len(hostile) + [False]
    assert all(block.version == 0 for block in replies[-1].blocks)


def request(configured: Shard, block: pb.Block) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(header=header(configured), blocks=[block], last=True)


def test_the_rest_of_a_refused_exchange_is_skipped(configured: Shard) -> None:
    block = pb.Block(index=9, data=bytes(BLOCK_ELEMENTS * 4))
    replies = raw(
        configured,
        pb.ExchangeRequest(header=header(configured), blocks=[block]),
        pb.ExchangeRequest(blocks=[block]),
        pb.ExchangeRequest(blocks=[block], last=True),
        pb.ExchangeRequest(header=header(configured, operation=0), last=True),
    )
    assert [reply.HasField("refusal") for reply in replies] == [True, False]


def test_an_oversized_message_never_enters(configured: Shard) -> None:
    block = pb.Block(index=0, data=bytes(3 << 20))
    unlimited = [("grpc.max_send_message_length", -1)]
    me = identity(configured.authority, "worker/0")
    options = [*unlimited, *me.channel_options("server/0")[2:]]
    with (
        grpc.secure_channel(configured.address, me.channel_credentials(), options) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        stub: Any = carrier.ServerStub(channel)
        list(stub.Exchange(iter([request(configured, block)]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_pull_since_brings_only_what_is_newer(
    configured: Shard, new_worker: Callable[..., Worker]
) -> None:
    worker = new_worker()
    pushed = worker.push(ones())
    since = list(pushed.versions)
    since[3] = 0
    pull = pb.ExchangeRequest(header=header(configured, operation=0), since=since, last=True)
    (reply,) = raw(configured, pull)
    assert [block.index for block in reply.blocks if block.data] == [3]
    assert [block.version for block in reply.blocks] == pushed.versions


def test_messages_stay_near_a_mebibyte_and_hold_several_small_blocks() -> None:
    route = Route("0" * 16, 1, 0, 0, 1)
    for size, block, expected in (
        (38_000, 19_008, 1),
        (4 << 20, 1 << 20, 4),
        (3 << 20, 4096, 3),
        (3 << 20, 700_000, 5),
    ):
        exchange = Exchange(Operation.PUSH, 1, memoryview(bytes(size)))
        made = list(messages(route, Shape(size, block), exchange))
        assert len(made) == expected
        assert max(message.ByteSize() for message in made) < ids.MAX_MESSAGE_BYTES * 0.6
        assert [message.last for message in made] == [False] * (len(made) - 1) + [True]
        assert b"".join(b.data for m in made for b in m.blocks) == bytes(size)


def test_a_large_shard_goes_both_ways_in_parts(shard: Shard) -> None:
    """16 MiB in blocks of 4 KiB and messages of 1 MiB: no window is large enough for all."""
    elements = 4 << 20
    shard.configure(elements, block_elements=1024)
    worker = Worker(shard, shape=Shape(elements * 4, 4096))
    try:
        worker.push(np.ones(elements, np.float32))
        assert (worker.parameters == -1).all()
    finally:
        worker.channel.close()


def test_a_silent_server_is_given_up_within_the_deadline(configured: Shard) -> None:
    """It accepts the connection and the handshake, and then the process hangs."""
    worker = Worker(configured, stall_s=0.5, give_up_s=1.5)
    try:
        worker.push(ones())
        hung = threading.Event()
        configured.loop.call_soon_threadsafe(hung.wait, 8.0)
        began_s = time.monotonic()
        with pytest.raises(ids.PeerUnreachable, match=r"did not answer for 1\.5 s"):
            worker.push(ones())
        assert time.monotonic() - began_s < 6
    finally:
        hung.set()
        worker.channel.close()
