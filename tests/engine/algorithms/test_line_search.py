"""The line search against curves of all kinds: what it accepts, what it costs, how it gives up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsgd_cli.engine.algorithms.line_search import ARMIJO, CURVATURE, TRIALS, Trial, wolfe

AT_MOST = TRIALS + 2  # the bracket's first end, and once more where it is best

Curve = Callable[[float], tuple[float, float]]  # step -> value, slope


@dataclass
class Search:
    """One search, carried out on a curve, and what it asked for."""

    curve: Curve
    first: float
    curvature: float = CURVATURE
    slack: float = 0.0
    asked: list[float] = field(default_factory=list)
    found: Trial | None = None

    def __post_init__(self) -> None:
        self.value, self.slope = self.curve(0.0)
        trials = wolfe(self.value, self.slope, self.first, self.curvature, self.slack)
        step = next(trials)
        while True:
            assert self.asked[-1:] != [step], "it knows that already"
            self.asked.append(step)
            assert len(self.asked) <= AT_MOST, "it does not come to an end"
            try:
                step = trials.send(self.curve(step))
            except StopIteration as end:
                self.found = end.value
                return

    @property
    def accepted(self) -> Trial:
        """What was found: it is where the parameters are now, so it was asked for last."""
        assert self.found is not None
        assert self.found.step == self.asked[-1] > 0.0
        assert (self.found.value, self.found.slope) == self.curve(self.found.step)
        seen = [self.curve(step) for step in self.asked]
        best = min(value for value, slope in seen if math.isfinite(value + slope))
        assert self.found.value <= best + 2.0 * self.slack, "it has seen better"
        return self.found

    def decreases(self) -> bool:
        found = self.accepted
        return found.value <= self.value + ARMIJO * found.step * self.slope + self.slack

    def is_flat(self) -> bool:
        return abs(self.accepted.slope) <= -self.curvature * self.slope


def polynomial(*coefficients: float) -> Curve:
    """The coefficients of 1, t, t², …"""
    made = np.polynomial.Polynomial(coefficients)
    slope = made.deriv()
    return lambda t: (float(made(t)), float(slope(t)))


def quadratic(scale: float, best: float) -> Curve:
    return lambda t: (0.5 * scale * (t - best) ** 2, scale * (t - best))


def quartic(scale: float, best: float, square: float) -> Curve:
    return lambda t: (
        scale * ((t - best) ** 4 + square * (t - best) ** 2),
        scale * (4.0 * (t - best) ** 3 + 2.0 * square * (t - best)),
    )


def waves(bowl: float, best: float, height: float, often: float, phase: float) -> Curve:
    """A bowl with many minima."""
    return lambda t: (
        bowl * (t - best) ** 2 + height * math.sin(often * t + phase),
        2.0 * bowl * (t - best) + height * often * math.cos(often * t + phase),
    )


def cliff(curve: Curve, at: float, value: float, slope: float) -> Curve:
    """Beyond `at` numbers overflow."""
    return lambda t: curve(t) if t < at else (value, slope)


def magnitude(least: float, most: float) -> st.SearchStrategy[float]:
    """A number whose logarithm is uniform."""
    return st.floats(math.log10(least), math.log10(most)).map(lambda log: 10.0**log)


curvatures = st.sampled_from([0.9, 0.1])
firsts = magnitude(1e-4, 1e4)
not_numbers = st.sampled_from([math.inf, -math.inf, math.nan])


@settings(deadline=None)
@given(magnitude(1e-6, 1e6), magnitude(1e-3, 1e3), firsts, curvatures)
def test_quadratics(scale: float, best: float, first: float, curvature: float) -> None:
    search = Search(quadratic(scale, best), first, curvature)
    assert search.decreases()
    assert search.is_flat()


@settings(deadline=None)
@given(magnitude(1e-3, 1e3), magnitude(1e-2, 1e2), magnitude(1e-3, 1e3), firsts, curvatures)
def test_quartics(scale: float, best: float, square: float, first: float, curvature: float) -> None:
    search = Search(quartic(scale, best, square), first, curvature)
    assert search.decreases()
    assert search.is_flat()


@settings(deadline=None)
@given(
    st.floats(0.01, 10.0),
    st.floats(-5.0, 5.0),
    st.floats(0.0, 3.0),
    st.floats(0.1, 10.0),
    st.floats(0.0, 6.3),
    magnitude(1e-2, 1e2),
    curvatures,
)
def test_several_minima(
    bowl: float,
    best: float,
    height: float,
    often: float,
    phase: float,
    first: float,
    curvature: float,
) -> None:
    curve = waves(bowl, best, height, often, phase)
    assume(curve(0.0)[1] < -0.01)
    search = Search(curve, first, curvature)
    assert search.decreases()
    assert search.is_flat()


@settings(deadline=None)
@given(magnitude(0.1, 10.0), magnitude(1e-2, 1e2), firsts, not_numbers, not_numbers)
def test_what_is_no_number_is_too_far(
    best: float, at: float, first: float, value: float, slope: float
) -> None:
    """Where the minimum is before the cliff it is found, else a decrease up to the cliff is."""
    search = Search(cliff(quadratic(1.0, best), at, value, slope), first)
    assert search.decreases()
    assert search.accepted.step < at
    if best < 0.9 * at:
        assert search.is_flat()


@settings(deadline=None)
@given(magnitude(0.1, 10.0), magnitude(1e-2, 1e2), firsts)
def test_a_slope_that_is_no_number_is_too_far(best: float, at: float, first: float) -> None:
    """A gradient may overflow where the loss does not; it would be of no use for the next step."""
    curve = quadratic(1.0, best)
    search = Search(lambda t: (curve(t)[0], curve(t)[1] if t < at else math.nan), first)
    assert search.decreases()
    assert search.accepted.step < at


def test_a_good_first_step_is_the_only_one() -> None:
    assert Search(quadratic(1.0, 1.0), 1.0).asked == [1.0]


def test_a_quadratics_minimum_is_found_by_the_first_interpolation() -> None:
    assert Search(quadratic(1.0, 2.0), 6.0, curvature=1e-6).asked == [6.0, pytest.approx(2.0)]
    assert Search(quadratic(1.0, 2.0), 1.0, curvature=1e-6).asked == [1.0, pytest.approx(2.0)]


def test_where_a_curve_falls_ever_faster_it_goes_on() -> None:
    """The cubic through two such points has its minimum behind them: that is no place to go."""
    falls = polynomial(0.0, -1.0, -1.0, -1.0, 1e-4)
    search = Search(falls, 1.0)
    assert search.decreases()
    assert search.is_flat()


def test_behind_a_rise_it_turns_back() -> None:
    """At 4 it is lower than at the start, and goes down again; but at 1 it was lower."""

    def valley(t: float) -> tuple[float, float]:
        if t <= 1.0:
            return -t, -1.0
        return ((t - 2.0) ** 2 - 2.0, 2.0 * (t - 2.0)) if t < 3.0 else (3.1 - t, -1.0)

    search = Search(valley, 1.0)
    assert search.asked[:2] == [1.0, 4.0]
    assert 1.0 < search.accepted.step < 3.0


def test_a_curve_without_an_end_is_followed_for_a_while() -> None:
    search = Search(lambda t: (-t, -1.0), 1.0)
    assert len(search.asked) == TRIALS
    assert search.decreases()


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_nothing_is_found_where_nothing_decreases(first: float, value: float) -> None:
    """The slope says downhill, but it is not: rounding, or a mistake in the gradient."""
    search = Search(lambda t: (0.0 if t == 0.0 else value, -1.0), first)
    assert search.found is None


@settings(deadline=None)
@given(st.integers(0, 2**32), magnitude(1e-12, 1e-9), magnitude(0.1, 10.0))
def test_noise_within_the_slack_does_not_end_it(seed: int, away: float, first: float) -> None:
    """So near to the minimum all values are the same but for rounding; the slope still tells."""
    noise, rng = 1e-14, np.random.default_rng(seed)
    values: dict[float, float] = {}

    def noisy(t: float) -> tuple[float, float]:
        value = 1.0 + 0.5 * away**2 * (t - 1.0) ** 2
        return values.setdefault(t, value + noise * rng.uniform(-1.0, 1.0)), away**2 * (t - 1.0)

    search = Search(noisy, first, slack=4.0 * noise)
    assert search.decreases()
    assert search.is_flat()


def test_without_slack_noise_ends_it() -> None:
    """So the slack is what does it."""
    search = Search(lambda t: (1.0 if t == 0.0 else 1.0 + 1e-15, 1e-20 * (t - 1.0)), 1.0)
    assert search.found is None
    assert Search(search.curve, 1.0, slack=1e-14).is_flat()
