"""Processes for the tests that kill: a server, or a worker that pushes without end.

    python shm_roles.py server ELEMENTS          reads worker numbers, answers with their tickets
    python shm_roles.py worker ELEMENTS NUMBER   reads one ticket; says `push N` after each push

No mTLS here: tickets go over stdin and stdout, in hex.
"""

from __future__ import annotations

import sys
from typing import Any

from dsgd_cli.daemons.server import Service, _run_shard
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Exchange, Operation, Route, Shape, run
from dsgd_cli.wire.channels.shm import ShmChannel, share
from dsgd_cli.wire.channels.shm_server import ShmCarrier

CLUSTER = "0123456789abcdef"
BLOCK_BYTES = 1 << 20


def make_service(elements: int, block_elements: int = BLOCK_BYTES // 4) -> Any:
    """A service with a run whose updates are `w -= g`."""
    service = Service(CLUSTER, 0, "", None)  # type: ignore[arg-type]
    service._run = _run_shard(
        pb.ConfigureRequest(
            epoch=1,
            stop=elements,
            block_elements=block_elements,
            dtype="float32",
            optimizer="sgd",
            options_json='{"learning_rate": 1.0}',
        )
    )
    service._epoch = 1
    return service


def ticket(carrier: ShmCarrier, service: Any, worker: int, incarnation: int = 1) -> pb.ShmTicket:
    route = Route(CLUSTER, 1, 0, worker, incarnation)
    return carrier.open(pb.OpenChannelRequest(), route, service._run)


def server(elements: int) -> None:
    service = make_service(elements)
    carrier = ShmCarrier(service)
    print("ready", flush=True)
    for line in sys.stdin:
        print(ticket(carrier, service, int(line)).SerializeToString().hex(), flush=True)


def worker(elements: int, number: int) -> None:
    import numpy as np

    given = pb.ShmTicket.FromString(bytes.fromhex(sys.stdin.readline()))
    shape = Shape(elements * 4, BLOCK_BYTES)
    route = Route(CLUSTER, 1, 0, number, 1)
    channel = ShmChannel(None, "here", route, shape, ask=lambda: given)
    buffers = share([channel], shape.size_bytes)
    assert buffers is not None
    for buffer in buffers:
        np.frombuffer(buffer, np.float32)[:] = -1
    into = memoryview(bytearray(shape.size_bytes))
    seq = 0
    while True:
        seq += 1
        run([channel], [Exchange(Operation.PUSH_PULL, seq, buffers[seq & 1], into)])
        print(f"push {seq}", flush=True)


if __name__ == "__main__":
    {"server": server, "worker": worker}[sys.argv[1]](*map(int, sys.argv[2:]))
