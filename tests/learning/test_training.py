"""The demo's core in one process: mlp on digits, through layout, shards and adagrad."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsgd_cli.engine.layout import cut, flatten, unflatten
from dsgd_cli.engine.optimizers import make
from dsgd_cli.engine.shard import Shard
from dsgd_cli.learning.adapters import load_data, load_model
from dsgd_cli.learning.evaluate import evaluate

BATCH, EPOCHS, TARGET = 32, 30, 0.97


def epochs_to_target(seed: int, workers: int, dtype: str, learning_rate: float) -> int:
    """Workers take turns; each computes on parameters from before the others' last pushes."""
    data = load_data("builtin", "digits").as_dtype(dtype)
    model = load_model("builtin", "mlp")
    initial = model.init(np.random.default_rng(seed), data.example(BATCH))
    layout = cut([(n, a.shape) for n, a in initial.items()], dtype, 2, max_block_bytes=8192)
    vector = np.empty(layout.size, dtype)
    flatten(layout, initial, vector)
    adagrad = make("adagrad", {"learning_rate": learning_rate}, dtype)
    shards = [
        Shard(vector[s.start : s.stop].copy(), layout.block_elements, adagrad)
        for s in layout.shards
    ]
    pulled = [vector.copy() for _ in range(workers)]
    push = np.empty(layout.size, dtype)
    out = unflatten(layout, push)
    steps = 0
    for epoch in range(1, EPOCHS + 1):
        order = np.random.default_rng([seed, epoch]).permutation(data.examples)
        for start in range(0, data.examples, BATCH):
            rows, worker = order[start : start + BATCH], steps % workers
            params = unflatten(layout, pulled[worker])
            model.gradients(params, data.x[rows], data.y[rows], out)
            steps += 1
            seq = (steps - 1) // workers + 1
            push_pull(layout, shards, push, pulled[worker], worker, seq)
        read(layout, shards, vector)
        held_out = evaluate(model, unflatten(layout, vector), data.x_test, data.y_test)
        if held_out["accuracy"] >= TARGET:
            return epoch
    pytest.fail(f"seed {seed}: {held_out} after {EPOCHS} epochs")


def push_pull(layout: Any, shards: Any, push: Any, pulled: Any, worker: int, seq: int) -> None:
    for held, shard in zip(layout.shards, shards, strict=True):
        for block in range(shard.blocks):
            start, stop = layout.bounds(held.first_block + block)
            assert shard.apply(worker, 1, seq, block, push[start:stop])
    read(layout, shards, pulled)


def read(layout: Any, shards: Any, vector: Any) -> None:
    for held, shard in zip(layout.shards, shards, strict=True):
        for block in range(shard.blocks):
            start, stop = layout.bounds(held.first_block + block)
            vector[start:stop] = np.frombuffer(shard.read(block), vector.dtype)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits_reach_the_target_with_the_defaults(workers: int, dtype: str) -> None:
    for seed in range(3):
        assert epochs_to_target(seed, workers, dtype, 0.05) <= 22


def test_a_larger_step_is_faster_on_digits() -> None:
    """What cluster_templates/localhost.yaml relies on."""
    assert max(epochs_to_target(seed, 2, "float32", 0.1) for seed in range(4)) <= 12
