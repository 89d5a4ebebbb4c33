"""Who computes which examples: the epoch's permutation, cut into leased tasks.

A task is a range of positions in the epoch's permutation; coordinator and workers compute that
permutation from (seed, epoch) alone, so no index ever travels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Task:
    """Positions [start, stop) of the permutation of `epoch` (the first epoch is 1)."""

    id: int
    epoch: int
    start: int
    stop: int


def order(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    """The examples of an epoch in the order in which its positions stand for them."""
    return np.random.default_rng([seed, epoch]).permutation(examples)
