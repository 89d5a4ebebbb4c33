"""The user's gradients as both kinds of worker loop compute them: checked, timed and counted.

Invariant: a gradient is checked for finiteness before anything is sent; the last bits of trouble
(how many in a row were not finite, and where) are remembered for the next report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from dsgd_cli.daemons.material import Material
from dsgd_cli.daemons.parameters import Buffer
from dsgd_cli.engine.shard import all_finite
from dsgd_cli.engine.tasks import Task, order
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Operation

Vector = np.ndarray[Any, Any]


@dataclass(slots=True)
class Counts:
    """What was done since the last report: fields of the wire's `Report`, by its names."""

    steps: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    staleness: dict[int, int] = field(default_factory=dict)
    dropped: int = 0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0

    def spent(self, operation: Operation, seconds: float) -> None:
        """What an exchange costs: the time in which the worker could not compute."""
        if operation.sends:
            self.push_s += seconds
        else:
            self.pull_s += seconds

    def stale(self, by: int) -> None:
        self.staleness[by] = self.staleness.get(by, 0) + 1


def quiet() -> AbstractContextManager[Any]:
    """Numbers may overflow: a gradient that is not finite is dealt with, not warned of."""
    return np.errstate(all="ignore")


class Computing:
    """Of one run."""

    def __init__(self, material: Material, seed: int) -> None:
        self._material = material
        self._seed = seed
        self._orders: dict[int, Vector] = {}
        self.streak = 0  # gradients in a row that were not finite
        self.where = ""  # the tensor of the last of them

    def gradient(
        self, params: Mapping[str, Vector], x: Vector, y: Vector, out: Buffer, counts: Counts
    ) -> tuple[float, bool]:
        """Computes the mean gradient of a batch into `out`: (loss, whether it is finite)."""
        began_s = perf_counter()
        loss = self._material.model.gradients(params, x, y, out.views)
        finite = all_finite(out.flat)
        counts.compute_s += perf_counter() - began_s
        counts.examples += len(x)
        if finite:
            self.streak = 0
        else:
            self.streak += 1
            element = int(np.argmin(np.isfinite(out.flat)))
            self.where = out.layout.tensor_at(element).name
        return loss, finite

    def order(self, epoch: int) -> Vector:
        """The examples of an epoch in their order."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order(self._seed, epoch, self._material.data.examples)
        return self._orders[epoch]


def task_of(wire: pb.Task) -> Task:
    return Task(wire.id, getattr(wire, "pass"), wire.start, wire.stop)


def batches(data: Dataset, rows: Vector, batch_size: int) -> Iterator[tuple[Vector, Vector]]:
    """The examples of these rows, a batch at a time."""
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        yield data.x.take(some, 0), data.y.take(some, 0)


def add_loss(counts: Counts, loss: float, times: int = 1) -> None:
    """A loss that is not finite says nothing about the mean."""
    if math.isfinite(loss):
        counts.loss_sum += loss * times
        counts.loss_count += times
