"""How the learning rate changes in the course of a run: a factor for each update of a block.

Schedules are pure functions of how many steps have been taken, so that all shards agree without a
word, a resumed run goes on where it was, and a synchronous run is exact. A step is one gradient
batch of any worker, as in `until.max_steps`; one update of a block stands for several where pushes
are sums, or where workers compute a step together. What depends on held-out metrics (`plateau`) is
the coordinator's, who tells the servers a further factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

ROUNDING = 1e-6  # steps
LEAST = math.ulp(0.0)  # steps: the smallest number there is

Schedule: TypeAlias = Callable[[float], float]  # steps so far -> factor
Rate: TypeAlias = Callable[[float], float]  # which update of a block, from 1 -> factor


@dataclass(frozen=True, slots=True)
class Scale:
    """How updates, steps and epochs count in each other."""

    steps_per_update: float = 1.0
    steps_per_epoch: float = 1.0

    def steps(self, work: Mapping[str, Any]) -> float:
        """`{"count": 5, "unit": "epoch"}` in steps; never 0, by which one could not divide."""
        per_unit = self.steps_per_epoch if work["unit"] == "epoch" else 1.0
        return max(float(work["count"]) * per_unit, LEAST)


def constant() -> Schedule:
    return lambda steps: 1.0


def step(every: float, factor: float) -> Schedule:
    """factor^(steps // every); what rounding takes from a whole number of steps does not count."""
    return lambda steps: float(factor ** ((steps + ROUNDING) // every))


def cosine(over: float, floor: float) -> Schedule:
    """From 1 to `floor` along half a cosine, then `floor`.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, equation 5,
    without restarts.
    """
    return lambda steps: (
        floor + (1.0 - floor) * (1.0 + math.cos(math.pi * min(1.0, steps / over))) / 2.0
    )


def make(options: Mapping[str, Any], scale: Scale) -> Rate | None:
    """The factor of each update, from an optimizer's `decay` and `warm_up`; None: always 1."""
    decay, warm_up = options.get("decay") or {"name": "constant"}, options.get("warm_up")
    if decay["name"] in ("constant", "plateau") and warm_up is None:
        return None
    schedule = _schedule(decay, scale)
    rise = 0.0 if warm_up is None else scale.steps(warm_up)

    def rate(update: float) -> float:
        steps = (update - 1) * scale.steps_per_update
        risen = min(1.0, update * scale.steps_per_update / rise) if rise else 1.0
        return risen * schedule(steps)

    return rate


def _schedule(decay: Mapping[str, Any], scale: Scale) -> Schedule:
    options = decay.get("options", {})
    if decay["name"] == "step":
        return step(scale.steps(options["every"]), options["factor"])
    if decay["name"] == "cosine":
        return cosine(scale.steps(options["over"]), options["floor"])
    return constant()  # `plateau` is the coordinator's
