"""The evaluations of a run: when the next is due, the one under way, and what they have shown.

At most one is under way. Where each host has held-out examples of its own, a worker of each takes
part, and a metric is the mean of theirs, weighted by the examples: exactly that of all examples, if
it is a mean itself and the parameters are frozen; while they move, each sees another moment. The
best of all by the metric that counts is remembered with where a worker has kept the parameters;
the learning rate and the end may depend on a plateau of a metric. Decides nothing about the run.
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


@dataclass(slots=True)
class Evaluation:
    """`weights`: how many examples each worker has that takes part; the first one keeps."""

    id: int
    weights: Mapping[int, int]
    frozen: bool
    since_s: float
    answers: dict[int, Evaluated] = field(default_factory=dict)

    @property
    def missing(self) -> set[int]:
        """Those who have not answered yet."""
        return self.weights.keys() - self.answers.keys()

    def metrics(self) -> dict[str, float]:
        """Of all that takes part, when all have answered."""
        first, *others = (self.answers[worker].metrics for worker in self.weights)
        if not others:
            return dict(first)
        common = [name for name in first if all(name in other for other in others)]
        examples = sum(self.weights.values())
        return {
            name: sum(  # divided once: where all say 1, so does the mean
                self.answers[worker].metrics[name] * weight
                for worker, weight in self.weights.items()
            )
            / examples
            for name in common
        }

    def worst(self) -> int:
        """Who is to be named if the metrics are bad: the loss not finite, or the fewest of them."""

        def how_good(worker: int) -> tuple[bool, int]:
            metrics = self.answers[worker].metrics
            return math.isfinite(metrics.get("loss", 0.0)), len(metrics)

        return min(self.weights, key=how_good)


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
    _asked: dict[int, int] = field(default_factory=dict)  # worker -> what it has not answered yet
    _count: int = 0
    _best_id: int = 0
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
        self, weights: Mapping[int, int], frozen: bool, now_s: float, reached: Mapping[str, Any]
    ) -> list[Evaluate]:
        """These workers are to do it, who have so many held-out examples."""
        self._schedule.taken(**reached)
        self._count += 1
        self.now = Evaluation(self._count, weights, frozen, now_s)
        self._asked.update(dict.fromkeys(weights, self._count))
        best = math.nan
        if self.best is not None and len(weights) == 1:  # else who keeps cannot compare
            best = self.best.value
        first = next(iter(weights))
        return [
            Evaluate(worker, self._count, frozen, best, worker == first, self._best_id)
            for worker in weights
        ]

    def is_with(self, worker: int) -> bool:
        """Whether it has been asked for one, and has not answered."""
        return worker in self._asked

    def frees(self, event: Evaluated) -> bool:
        """Whether the worker has nothing more to evaluate once it has answered this."""
        return self._asked.get(event.worker) == event.evaluation_id

    def drop(self, again: bool = False) -> None:
        """It will not be answered by all. `again`: it is due once more."""
        if self.now is not None and again:
            self._schedule.again()
        self.now = None

    def leave(self, worker: int, again: bool = False) -> None:
        """The worker will not answer; `again`: what it took part in is due once more."""
        self._asked.pop(worker, None)
        if self.now is not None and worker in self.now.missing:
            self.drop(again)

    def answer(self, event: Evaluated, now_s: float, step: int) -> Evaluation | None:
        """The evaluation that this completes; None if others are still at it, or it was dropped."""
        if self.frees(event):
            del self._asked[event.worker]
        evaluation = self.now
        if evaluation is None or evaluation.id != event.evaluation_id:
            return None
        if event.worker not in evaluation.missing:
            return None
        evaluation.answers[event.worker] = event
        self.longest_s = max(now_s - evaluation.since_s, self.longest_s or 0.0)
        if evaluation.missing:
            return None
        self.now = None
        self.metrics = evaluation.metrics()
        self.judged = evaluation.frozen
        self._keep(evaluation, step)
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

    def _keep(self, evaluation: Evaluation, step: int) -> None:
        worker = next(iter(evaluation.weights))
        kept, metrics = evaluation.answers[worker].kept, self.metrics
        target = next(iter(convergence.targets(self.settings.until)), None)
        name = metric_of(metrics, target)
        best = math.nan if self.best is None else self.best.value
        if name is None or kept is None or not improves(name, metrics[name], best):
            return
        self.best = Best(name, metrics[name], step, worker, kept, dict(metrics))
        self._best_id = evaluation.id

    def _watch_plateaus(self) -> None:
        if self._decay is not None and self._decay.reached(self.metrics):
            self.rate *= self._factor
        if self._end is not None and self._end.reached(self.metrics):
            name = metric_of(self.metrics, self._end.metric)
            self.ended_by = f"plateau: no better {name} in {self._end.patience} evaluations"
