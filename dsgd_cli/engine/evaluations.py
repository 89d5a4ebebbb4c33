"""The evaluations of a run: when the next is due, the one under way, and what they have shown.

At most one is under way. The best of all by the metric that counts is remembered with where its
worker has kept the parameters; the learning rate and the end may depend on a plateau of a metric.
Decides nothing about the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsgd_cli.engine import convergence
from dsgd_cli.engine.events import Best, Evaluate, Evaluated, Settings
from dsgd_cli.engine.plateau import Plateau, improves, metric_of
from dsgd_cli.engine.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The one under way."""

    id: int
    worker: int
    frozen: bool
    since_s: float


@dataclass(slots=True)
class Evaluations:
    """`now`: the evaluation under way; `metrics`: of the last one; `judged`: it was frozen."""

    settings: Settings
    now: Evaluation | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    judged: bool = False
    longest_s: float | None = None
    best: Best | None = None
    rate: float = 1.0  # what plateaus have made of the learning rate
    ended_by: str | None = None  # the plateau that ends the run, in words
    _schedule: Schedule = field(init=False)
    _count: int = 0
    _decay: Plateau | None = None
    _factor: float = 1.0
    _end: Plateau | None = None

    def __post_init__(self) -> None:
        self._schedule = Schedule(self.settings.every)
        decay = self.settings.optimizer.get("decay") or {"name": "constant"}
        if decay["name"] == "plateau":
            self._decay, self._factor = Plateau.of(decay["options"]), decay["options"]["factor"]
        if self.settings.until.plateau is not None:
            self._end = Plateau.of(self.settings.until.plateau)

    def due(self, reached: Mapping[str, Any]) -> bool:
        return self.now is None and self._schedule.due(**reached)

    def begin(
        self, worker: int, frozen: bool, now_s: float, reached: Mapping[str, Any]
    ) -> Evaluate:
        """This worker is to do it."""
        self._schedule.taken(**reached)
        self._count += 1
        self.now = Evaluation(self._count, worker, frozen, now_s)
        best = math.nan if self.best is None else self.best.value
        return Evaluate(worker, self._count, frozen, best)

    def is_with(self, worker: int) -> bool:
        return self.now is not None and self.now.worker == worker

    def drop(self, again: bool = False) -> None:
        """It will not be answered. `again`: it is due once more."""
        if self.now is not None and again:
            self._schedule.again()
        self.now = None

    def answer(self, event: Evaluated, now_s: float, step: int) -> Evaluation | None:
        """The evaluation that this answers; None if it is not under way any more."""
        evaluation = self.now
        if evaluation is None or (evaluation.id, evaluation.worker) != (
            event.evaluation_id,
            event.worker,
        ):
            return None
        self.now = None
        self.longest_s = max(now_s - evaluation.since_s, self.longest_s or 0.0)
        self.metrics = dict(event.metrics)
        self.judged = evaluation.frozen
        self._keep(event, step)
        if not evaluation.frozen:
            self._watch_plateaus()
        return evaluation

    def missing(self, metrics: Mapping[str, float]) -> list[str]:
        """Targets and plateaus that wait for a metric that the model does not have."""
        found = [f"until.{name}" for name in convergence.missing(self.settings.until, metrics)]
        plateaus = {"optimizer.decay.plateau": self._decay, "until.plateau": self._end}
        return found + [
            name
            for name, plateau in plateaus.items()
            if plateau is not None and metric_of(metrics, plateau.metric) is None
        ]

    def _keep(self, event: Evaluated, step: int) -> None:
        target = next(iter(convergence.targets(self.settings.until)), None)
        name = metric_of(event.metrics, target)
        best = math.nan if self.best is None else self.best.value
        if name is None or event.kept is None or not improves(name, event.metrics[name], best):
            return
        value = event.metrics[name]
        self.best = Best(name, value, step, event.worker, event.kept, dict(event.metrics))

    def _watch_plateaus(self) -> None:
        if self._decay is not None and self._decay.reached(self.metrics):
            self.rate *= self._factor
        if self._end is not None and self._end.reached(self.metrics):
            name = metric_of(self.metrics, self._end.metric)
            self.ended_by = f"plateau: no better {name} in {self._end.patience} evaluations"
