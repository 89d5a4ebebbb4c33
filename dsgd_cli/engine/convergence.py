"""When a run is over: targets, limits, divergence. Pure functions of what is known.

All targets that are given must hold at once, on the held-out set. A step is one gradient batch,
counted over all workers (also one whose gradient was refused as not finite); an epoch counts when
every one of its examples is in the parameters; time counts from the start of the first worker.
Nothing here remembers anything: `training` asks after each evaluation, report and tick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsgd_cli.engine.events import Until

STREAK = 3  # non-finite gradients in a row, on every worker, that end a run


@dataclass(frozen=True, slots=True)
class Streak:
    """A worker's non-finite gradients in a row: `step` and `tensor` are those of the last one."""

    worker: int
    count: int = 0
    step: int = 0
    tensor: str = ""


def targets(until: Until) -> tuple[str, ...]:
    """The names of the metrics that must reach a value, the most telling first."""
    given = {"accuracy": until.accuracy, "loss": until.loss}
    return tuple(name for name, value in given.items() if value is not None)


def missing(until: Until, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Targets that the model's metrics say nothing about: they could never hold."""
    return tuple(name for name in targets(until) if name not in metrics)


def holds(until: Until, metrics: Mapping[str, float]) -> bool:
    """Whether at least one target is set and all that are set hold."""
    names = targets(until)
    return bool(names) and all(_holds(until, name, metrics) for name in names)


def _holds(until: Until, name: str, metrics: Mapping[str, float]) -> bool:
    value = metrics.get(name, math.nan)
    if name == "loss":
        return until.loss is not None and value <= until.loss
    return until.accuracy is not None and value >= until.accuracy


def describe(until: Until, metrics: Mapping[str, float]) -> str:
    """`accuracy 0.9722 >= 0.97`, `loss 0.4 > 0.1`: each target with where it stands."""
    return ", ".join(_describe(until, name, metrics) for name in targets(until))


def _describe(until: Until, name: str, metrics: Mapping[str, float]) -> str:
    met = _holds(until, name, metrics)
    if name == "loss":
        sign, goal = ("<=" if met else ">"), until.loss
    else:
        sign, goal = (">=" if met else "<"), until.accuracy
    value = f"{metrics[name]:.6g}" if name in metrics else "unknown"
    return f"{name} {value} {sign} {goal:g}"


def limit(until: Until, *, epochs: int, steps: int, elapsed_s: float) -> str | None:
    """The first limit that is reached, in words, or None."""
    if until.max_epochs is not None and epochs >= until.max_epochs:
        return f"max_epochs {until.max_epochs} reached"
    if until.max_steps is not None and steps >= until.max_steps:
        return f"max_steps {until.max_steps} reached"
    if until.max_time_s is not None and elapsed_s >= until.max_time_s:
        return f"max_time {until.max_time_s:g} s reached"
    return None


def limits(until: Until) -> dict[str, float]:
    """The targets and limits that are numbers, by name, for people to see."""
    given = {
        "loss": until.loss,
        "accuracy": until.accuracy,
        "max_epochs": until.max_epochs,
        "max_steps": until.max_steps,
        "max_time_s": until.max_time_s,
    }
    return {name: value for name, value in given.items() if value is not None}


def diverged_gradients(streaks: Sequence[Streak]) -> str | None:
    """`streaks`: of each living worker that has computed something or is about to."""
    if not streaks or any(streak.count < STREAK for streak in streaks):
        return None
    last = max(streaks, key=lambda streak: streak.step)
    return (
        f"the last {min(s.count for s in streaks)} gradients of every worker are not finite: "
        f"step {last.step}, worker/{last.worker}, tensor {last.tensor or 'unknown'}"
    )


def diverged_evaluation(metrics: Mapping[str, float], *, step: int, worker: int) -> str | None:
    """A held-out loss that is not finite can never reach a target."""
    loss = metrics.get("loss", 0.0)
    if math.isfinite(loss):
        return None
    return f"the held-out loss is {loss} at step {step} (computed by worker/{worker})"
