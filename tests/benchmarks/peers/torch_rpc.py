"""torch RPC (TensorPipe): clients push a gradient, the server applies it and answers with w.

torch_rpc.py [--bytes 100000000] [--clients 1] [--optimizer sgd|adagrad]
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from measure import cpu_s, free_port, repeat, say

LEARNING_RATE = 1e-6
_parameters: dict[str, torch.Tensor] = {}


def push_pull(gradient: torch.Tensor, optimizer: str) -> torch.Tensor:
    """On the server. Concurrent calls apply without a lock, as Hogwild does."""
    if not _parameters:
        _parameters["w"] = torch.rand(gradient.numel())
        _parameters["sums"] = torch.full((gradient.numel(),), 0.1)
    w = _parameters["w"]
    if optimizer == "sgd":
        w.add_(gradient, alpha=-LEARNING_RATE)
    else:
        _parameters["sums"].addcmul_(gradient, gradient)
        w.addcdiv_(gradient, _parameters["sums"].sqrt().add_(1e-7), value=-LEARNING_RATE)
    return w


def wait_for_all(clients: int) -> None:
    """On the server: all clients begin together."""
    _arrived.append(1)
    while len(_arrived) < clients:
        time.sleep(0.0005)


_arrived: list[int] = []


def run(rank: int, options: argparse.Namespace, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    rpc.init_rpc(f"rank{rank}", rank=rank, world_size=options.clients + 1)
    if rank:
        gradient = torch.rand(options.bytes // 4)
        rpc.rpc_sync("rank0", wait_for_all, args=(options.clients,))
        before = rpc.rpc_sync("rank0", cpu_s)
        began = time.perf_counter()
        seconds = repeat(
            lambda: rpc.rpc_sync("rank0", push_pull, args=(gradient, options.optimizer)),
            options.repeats,
            options.for_s,
        )
        say(
            seconds=median(seconds),
            calls=len(seconds) + 2,
            elapsed_s=time.perf_counter() - began,
            server_cpu_s=rpc.rpc_sync("rank0", cpu_s) - before,
            worker_cpu_s=cpu_s(),
        )
    rpc.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--optimizer", choices=["sgd", "adagrad"], default="sgd")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--for-s", type=float, default=1.0)
    options = parser.parse_args()
    mp.spawn(run, (options, free_port()), nprocs=options.clients + 1)
