"""What a worker may cost the server."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

from dsgd_cli.wire.channels import frames
from dsgd_cli.wire.channels.base import Operation, Shape
from dsgd_cli.wire.channels.frames import OPENING, Kind
from tests.wire.channels.intruder import Client, ask
from tests.wire.conftest import Shard

MEBI = 1 << 20


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def push(client: Client, shape: Shape) -> None:
    """A whole push_pull, a frame at a time."""
    client.end.sendall(client.sealed(Kind.EXCHANGE, OPENING.pack(Operation.PUSH_PULL, 0, 1, 0)))
    for run in frames.runs(shape, range(shape.blocks)):
        start, stop = frames.bounds(shape, run)
        client.end.sendall(client.sealed(Kind.DATA, bytes(stop - start)))
        assert len(client.read_frame()) == stop - start + frames.HEAD.size + frames.TAG_BYTES
    client.read_frame()


def test_a_worker_costs_the_server_four_mebibytes_at_most(shard: Shard) -> None:
    shape = Shape(3 * MEBI, MEBI)
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    workers = 16
    with contextlib.ExitStack() as stack:

        def arrive(worker: int) -> None:
            client = Client(ask(shard, shape, worker=worker).tcp).greet()
            stack.callback(client.close)
            assert client.is_let_in()
            push(client, shape)

        arrive(0)  # with what comes only once
        arrive(1)
        gc.collect()
        before = resident()
        for worker in range(2, workers):
            arrive(worker)
        gc.collect()
        assert (resident() - before) / (workers - 2) < 4 * MEBI


def test_an_idle_connection_to_a_small_shard_costs_next_to_nothing(shard: Shard) -> None:
    shape = Shape(32_000, 32_000)
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    body = frames.max_body_bytes(shape)
    assert body < 128 << 10
