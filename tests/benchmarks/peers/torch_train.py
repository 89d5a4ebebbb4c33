"""A training with torch: DDP over Gloo with some processes, or one process without.

    torch_train.py digits.npz --layers 128 --batch 32 --optimizer adagrad [--processes 2]
    torch_train.py big.npz --layers 800,600,400,350,250 --batch 256 --optimizer sgd

Every process has its own part of the examples, and a batch of its own in each step, as dsgd's
workers have. After each epoch the held-out examples are evaluated.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import free_port, say
from torch.nn.parallel import DistributedDataParallel


def model_of(widths: list[int]) -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def run(rank: int, options: argparse.Namespace, port: int) -> None:
    together = options.processes > 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with np.load(options.data) as arrays:
        x, y, x_test, y_test = (
            torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")
        )
    x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    classes = int(max(y.max(), y_test.max())) + 1
    net = model_of([x.shape[1], *options.layers, classes])
    if together:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=options.processes)
    trained = DistributedDataParallel(net) if together else net
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[options.optimizer]
    optimizer = kind(net.parameters(), lr=options.learning_rate)
    mine = torch.arange(rank, len(y) - len(y) % options.processes, options.processes)
    batches, reached, reached_epoch, accuracy = 0, None, None, 0.0
    cpu, began = time.process_time(), time.perf_counter()
    epoch = 0
    while time.perf_counter() - began < options.for_s or epoch < options.epochs:
        order = torch.randperm(
            len(mine), generator=torch.Generator().manual_seed(1000 * options.seed + epoch)
        )
        for start in range(0, len(mine), options.batch):
            rows = mine[order[start : start + options.batch]]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(trained(x[rows]), y[rows]).backward()
            optimizer.step()
            batches += 1
        epoch += 1
        with torch.no_grad():
            accuracy = (net(x_test).argmax(1) == y_test).float().mean().item()
        if reached is None and accuracy >= options.target:
            reached, reached_epoch = time.perf_counter() - began, epoch
        if together:  # all must agree when to stop
            late = torch.tensor(float(time.perf_counter() - began >= options.for_s))
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item() and epoch >= options.epochs:
                break
    seconds = time.perf_counter() - began
    if rank == 0:
        say(
            batches_per_s=options.processes * batches / seconds,
            reached_s=reached,
            reached_epoch=reached_epoch,
            accuracy=accuracy,
            epochs=epoch,
            cpu_s=options.processes * (time.process_time() - cpu),
            batches=options.processes * batches,
        )
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", choices=["sgd", "adagrad"], default="adagrad")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--for-s", type=float, default=3.0)
    options = parser.parse_args()
    if options.processes > 1:
        mp.spawn(run, (options, free_port()), nprocs=options.processes)
    else:
        run(0, options, 0)
