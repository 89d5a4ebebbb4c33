"""Whether a held-out metric has stopped improving: for the learning rate, and for the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIGHER_IS_BETTER = {"accuracy": True, "loss": False}  # what says how good a model is, best first


def improves(metric: str, value: float, best: float, by: float = 0.0) -> bool:
    """Whether a value is better than the best so far (NaN: there is none yet), by more than `by`.

    A value that is not a number is never better.
    """
    if math.isnan(value):
        return False
    if math.isnan(best):
        return True
    return value > best + by if HIGHER_IS_BETTER[metric] else value < best - by


def metric_of(metrics: Mapping[str, float], wanted: str | None = None) -> str | None:
    """The metric that says how good a model is: the one that is wanted, else accuracy, else loss.

    None where the model reports nothing of the kind.
    """
    names = HIGHER_IS_BETTER if wanted is None else (wanted,)
    return next((name for name in names if name in metrics), None)


@dataclass(slots=True)
class Plateau:
    """Counts evaluations in a row without a new best."""

    patience: int
    min_delta: float = 0.0
    metric: str | None = None
    _best: float = field(default=math.nan)
    _since: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Plateau:
        return cls(options["patience"], options["min_delta"], options["metric"])

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Takes an evaluation; True when it ends the patience, and then counts anew."""
        name = metric_of(metrics, self.metric)
        if name is None:
            return False
        if improves(name, metrics[name], self._best, self.min_delta):
            self._best, self._since = metrics[name], 0
            return False
        self._since += 1
        if self._since < self.patience:
            return False
        self._since = 0
        return True
