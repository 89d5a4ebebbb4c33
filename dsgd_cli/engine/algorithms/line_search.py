"""How far to go along a direction: a search for the Wolfe conditions, as a generator of trials.

    step = yield from wolfe(f, slope, first)       each `yield t` is answered with (f(t), f'(t))

Armijo's condition (enough decrease) and the strong form of Wolfe's second one (the slope is small),
by bracketing and cubic interpolation: Nocedal and Wright, "Numerical Optimization", 2nd edition,
algorithms 3.5 and 3.6 and equation 3.59. Only numbers cross; whoever drives it knows no vectors.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

ARMIJO = 1e-4
CURVATURE = 0.9
TRIALS = 20
GROWTH = 4.0  # how much further an extrapolation may go
MARGIN = 0.1  # of a bracket: no trial is nearer to one of its ends


@dataclass(frozen=True, slots=True)
class Trial:
    """The function and its slope after a step."""

    step: float
    value: float
    slope: float


Search: TypeAlias = Generator[float, tuple[float, float], "Trial | None"]


def wolfe(
    value: float, slope: float, first: float, curvature: float = CURVATURE, slack: float = 0.0
) -> Search:
    """The accepted trial, which was the last one that was asked for; None: there is none.

    `value` and `slope` are those of the starting point, `first` the step that is tried first,
    `slack` what rounding may do to a value.
    """
    start = Trial(0.0, value, slope)
    before, step = start, first
    for number in range(TRIALS):
        trial = Trial(step, *(yield step))
        if not _decreases(start, trial, slack) or (number and trial.value >= before.value + slack):
            return (yield from _zoom(start, before, trial, slack, curvature, TRIALS - number))
        if abs(trial.slope) <= -curvature * slope:
            return trial
        if trial.slope >= 0.0:
            return (yield from _zoom(start, trial, before, slack, curvature, TRIALS - number))
        step = _beyond(before, trial)
        before = trial
    return before  # still downhill: as far as it goes


def _zoom(
    start: Trial, low: Trial, high: Trial, slack: float, curvature: float, trials: int
) -> Search:
    """Within a bracket: `low` is the best trial that decreases enough, `high` the other end."""
    for _ in range(trials):
        step = _between(low, high)
        trial = Trial(step, *(yield step))
        if not _decreases(start, trial, slack) or trial.value >= low.value + slack:
            high = trial
        else:
            if abs(trial.slope) <= -curvature * start.slope:
                return trial
            if trial.slope * (high.step - low.step) >= 0.0:
                high = low
            low = trial
        if abs(high.step - low.step) <= 1e-12 * max(high.step, low.step):
            break
    if low.value >= start.value:  # the start itself, or no more than noise
        return None
    if low is trial:
        return low
    return Trial(low.step, *(yield low.step))  # enough of a decrease, if not the slope


def _decreases(start: Trial, trial: Trial, slack: float) -> bool:
    if not (math.isfinite(trial.value) and math.isfinite(trial.slope)):
        return False
    return trial.value <= start.value + ARMIJO * trial.step * start.slope + slack


def _beyond(before: Trial, trial: Trial) -> float:
    """Further along: where a cubic through both has its minimum, within bounds.

    A minimum that is behind is one of a curve that falls ever faster from here on.
    """
    least = trial.step + (trial.step - before.step) * MARGIN
    most = trial.step * GROWTH
    guess = _cubic(before, trial)
    return most if guess is None or guess <= trial.step else min(max(guess, least), most)


def _between(low: Trial, high: Trial) -> float:
    left, right = sorted((low.step, high.step))
    margin = MARGIN * (right - left)
    guess = _cubic(low, high)
    if guess is None:
        return (left + right) / 2.0
    return min(max(guess, left + margin), right - margin)


def _cubic(a: Trial, b: Trial) -> float | None:
    """The minimum of the cubic with both values and slopes; None where it has none."""
    if not all(map(math.isfinite, (a.value, a.slope, b.value, b.slope))) or a.step == b.step:
        return None
    d1 = a.slope + b.slope - 3.0 * (a.value - b.value) / (a.step - b.step)
    inside = d1 * d1 - a.slope * b.slope
    if inside < 0.0:
        return None
    d2 = math.copysign(math.sqrt(inside), b.step - a.step)
    bottom = b.slope - a.slope + 2.0 * d2
    if bottom == 0.0:
        return None
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / bottom
