"""torch's Gloo: a vector there and back by send and recv, without an update.

torch_gloo.py [--bytes 100000000]
"""

from __future__ import annotations

import argparse
import os
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import free_port, repeat, say


def run(rank: int, options: argparse.Namespace, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    there, back = torch.rand(options.bytes // 4), torch.empty(options.bytes // 4)
    more = torch.ones(1)

    def round_trip() -> None:
        dist.send(more, 1)
        dist.send(there, 1)
        dist.recv(back, 1)

    if rank == 0:
        seconds = repeat(round_trip, options.repeats, options.for_s)
        dist.send(torch.zeros(1), 1)
        say(seconds=median(seconds))
    else:
        while dist.recv(more, 0) is not None and more.item():
            dist.recv(back, 0)
            dist.send(there, 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--for-s", type=float, default=1.0)
    mp.spawn(run, (parser.parse_args(), free_port()), nprocs=2)
