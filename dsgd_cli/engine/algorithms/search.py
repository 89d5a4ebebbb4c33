"""Sandblaster, the coordinator's half of each step: scalars here, vectors on the shards.

Source: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, section 4.2 and
algorithm 1.2. The direction of L-BFGS comes from inner products alone, in the vector-free form of
W. Chen, Z. Wang and J. Zhou, "Large-scale L-BFGS using MapReduce", NIPS 2014: two rounds of calls
to the shards for each direction, and the same result as the two loops of the textbook.

A method is a generator: it asks for a `Pass` (loss and gradient of all examples at the parameters)
or for operations on the shards' vectors (`engine.vectors`), is sent the answer, and gives a `Step`
after each accepted step, when the parameters are those of that step. So it is a state machine that
reads like the algorithm. It ends when no further decrease is found or the gradient is small.

Vectors: x the parameters, x0 those of the last step, g their gradient, gt that of a trial, d the
direction; s0, s1, … and y0, y1, … the steps and what they changed of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from dsgd_cli.engine.algorithms.line_search import CURVATURE, wolfe
from dsgd_cli.engine.vectors import PARAMETERS as X
from dsgd_cli.engine.vectors import Combine, Dot, Gradient, Largest, Op

CURVED = 1e-10  # a pair with less curvature, relative to its length, is not remembered
CG_CURVATURE = 0.1  # conjugate directions want a more exact search
STILL = 3  # steps in a row that gain nothing but noise, and the search is over


@dataclass(frozen=True, slots=True)
class Pass:
    """Loss and gradient over all examples, at the parameters. Answer: `Passed`."""


@dataclass(frozen=True, slots=True)
class Passed:
    """`loss` is summed over the examples; the gradient is what the shards have summed."""

    loss: float
    examples: int
    round: int
    parts: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Operations on the shards' vectors. Answer: their numbers."""

    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The parameters are those of step `number` (0: the first ones). Answer: None, to go on."""

    number: int
    loss: float
    largest: float  # component of the gradient
    passes: int  # since the last step


Request: TypeAlias = Pass | Compute | Step
Answer: TypeAlias = "Passed | tuple[float, ...] | None"
Method: TypeAlias = Generator[Request, Answer, str]  # returns why it ended


@dataclass(frozen=True, slots=True)
class Point:
    """The loss, and what is known of the gradient and of the way there."""

    loss: float
    largest: float
    squares: float  # of the gradient
    slope: float = 0.0  # along the direction that led here
    step: float = 0.0  # and how far


class Directions(Protocol):
    """Where to go next, from numbers alone."""

    curvature: float  # of the line search
    fresh: bool  # whether the newest direction was just downhill

    def next(self, point: Point) -> tuple[Combine, float, float]:
        """What makes d; the slope along it; the step to try first."""

    def after_step(self) -> tuple[Op, ...]:
        """To do when a step is accepted; ends with g = gt."""

    def learn(self, point: Point, numbers: Sequence[float]) -> None:
        """Takes what `after_step` gave."""

    def forget(self) -> None:
        """The next direction is downhill."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`l2`: the loss has l2 / 2 times the squared parameters. `tolerance`: the end when no
    component of the gradient is larger. `noise`: what rounding does to a loss, relatively."""

    method: str = "lbfgs"
    memory: int = 10
    l2: float = 0.0
    tolerance: float = 1e-5
    noise: float = 1e-14


def search(settings: Settings) -> Method:
    """The generator of a method: `lbfgs`, `conjugate_gradient` or `gradient_descent`."""
    directions = DIRECTIONS[settings.method](settings.memory)
    point = yield from _evaluate("g", settings.l2)
    number, passes, still = 0, 1, 0
    while True:
        yield Step(number, point.loss, point.largest, passes)
        if not math.isfinite(point.loss):  # of the first parameters
            return "the loss is not finite, there is nothing to go by"
        if point.largest <= settings.tolerance or point.squares == 0.0:
            return f"no gradient is larger than {settings.tolerance:g}"
        if still == STILL:
            return "the loss does not decrease any further"
        found, passes = yield from _line(directions, point, settings)
        while found is None:
            yield Compute((Combine(X, ((1.0, "x0"),)),))
            if directions.fresh:
                return "no step along the gradient decreases the loss any further"
            directions.forget()
            found, more = yield from _line(directions, point, settings)
            passes += more
        still = still + 1 if found.loss >= point.loss - settings.noise * abs(point.loss) else 0
        point = found
        numbers = yield Compute(directions.after_step())
        assert isinstance(numbers, tuple)
        directions.learn(point, numbers)
        number += 1


def _line(
    directions: Directions, point: Point, settings: Settings
) -> Generator[Request, Answer, tuple[Point | None, int]]:
    """(the accepted point, which is where the parameters are; passes)."""
    direction, slope, first = directions.next(point)
    slack = settings.noise * abs(point.loss)
    trials = wolfe(point.loss, slope, first, directions.curvature, slack)
    step = next(trials)
    ops: tuple[Op, ...] = (Combine("x0", ((1.0, X),)), direction)
    passes = 0
    while True:
        yield Compute((*ops, Combine(X, ((1.0, "x0"), (step, "d")))))
        ops = ()
        here = yield from _evaluate("gt", settings.l2, step)
        passes += 1
        try:
            step = trials.send((here.loss, here.slope))
        except StopIteration as end:
            return (here if end.value is not None else None), passes


def _evaluate(out: str, l2: float, step: float = 0.0) -> Generator[Request, Answer, Point]:
    """A pass at the parameters; its gradient is in `out`, and its slope along d if there is one."""
    passed = yield Pass()
    assert isinstance(passed, Passed)
    gradient = Gradient(out, passed.round, passed.parts, 1.0 / passed.examples, l2)
    ops: list[Op] = [gradient, Largest(out), Dot(out, out), Dot(X, X)]
    if step:
        ops.append(Dot(out, "d"))
    numbers = yield Compute(tuple(ops))
    assert isinstance(numbers, tuple)
    largest, squares, size = numbers[:3]
    loss = passed.loss / passed.examples + (0.5 * l2 * size if l2 else 0.0)
    return Point(loss, largest, squares, numbers[3] if step else 0.0, step)


# ── directions ─────────────────────────────────────────────────────────────────────────────────

DOWNHILL = Combine("d", ((-1.0, "g"),))
TAKE_GRADIENT = Combine("g", ((1.0, "gt"),))


def _first_step(point: Point) -> float:
    """Of a method that knows nothing yet: at most as far as 1."""
    return min(1.0, 1.0 / math.sqrt(point.squares)) if point.squares > 0.0 else 1.0


class GradientDescent:
    """Downhill; the first step is expected to gain what the last one gained to first order.

    Nocedal and Wright, "Numerical Optimization", section 3.5.
    """

    curvature = CURVATURE
    fresh = True

    def __init__(self, memory: int) -> None:
        self._last: float | None = None  # step times squared gradient of the last step
        self._squares = 0.0

    def next(self, point: Point) -> tuple[Combine, float, float]:
        self._squares = point.squares
        first = _first_step(point) if self._last is None else self._last / point.squares
        return DOWNHILL, -point.squares, first

    def after_step(self) -> tuple[Op, ...]:
        return (TAKE_GRADIENT,)

    def learn(self, point: Point, numbers: Sequence[float]) -> None:
        self._last = point.step * self._squares

    def forget(self) -> None:
        self._last = None


class ConjugateGradient:
    """Polak and Ribière's directions, begun anew where they would not lead downhill.

    Nocedal and Wright, "Numerical Optimization", section 5.2, equation 5.45 (PR+).
    """

    curvature = CG_CURVATURE

    def __init__(self, memory: int) -> None:
        self.fresh = True
        self._beta = 0.0
        self._along = 0.0  # gradient times d, after the last step
        self._gain: float | None = None  # step times slope of the last step
        self._slope = 0.0
        self._squares = 0.0

    def next(self, point: Point) -> tuple[Combine, float, float]:
        slope = -point.squares + self._beta * self._along
        self.fresh = self._beta == 0.0 or slope >= 0.0
        if self.fresh:
            slope = -point.squares
        first = _first_step(point) if self._gain is None else self._gain / slope
        self._slope, self._squares = slope, point.squares
        if self.fresh:
            return DOWNHILL, slope, first
        return Combine("d", ((-1.0, "g"), (self._beta, "d"))), slope, first

    def after_step(self) -> tuple[Op, ...]:
        return (Dot("gt", "g"), TAKE_GRADIENT)

    def learn(self, point: Point, numbers: Sequence[float]) -> None:
        self._beta = max(0.0, (point.squares - numbers[0]) / self._squares)
        self._along = point.slope
        self._gain = point.step * self._slope

    def forget(self) -> None:
        self._beta, self._gain = 0.0, None


class Lbfgs:
    """L-BFGS from inner products: the coefficients of d in the basis s…, y…, g.

    Chen, Wang and Zhou, algorithm 2; the scaling of the first matrix is that of Nocedal and Wright,
    equation 7.20.
    """

    curvature = CURVATURE

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._pairs: list[int] = []  # slots, the oldest first
        self._products: dict[tuple[str, str], float] = {}
        self.fresh = True

    def next(self, point: Point) -> tuple[Combine, float, float]:
        self._products["g", "g"] = point.squares
        coefficients = self._coefficients()
        slope = sum(c * self._product(name, "g") for name, c in coefficients.items())
        if not slope < 0.0:  # rounding has the better of it
            self.forget()
            coefficients, slope = {"g": -1.0}, -point.squares
        self.fresh = not self._pairs
        terms = tuple((c, name) for name, c in coefficients.items() if c)
        return Combine("d", terms), slope, _first_step(point) if self.fresh else 1.0

    def _coefficients(self) -> dict[str, float]:
        delta = {"g": -1.0}
        alphas: dict[int, float] = {}
        for i in reversed(self._pairs):
            alphas[i] = self._along(delta, f"s{i}") / self._product(f"s{i}", f"y{i}")
            delta[f"y{i}"] = -alphas[i]
        if self._pairs:
            s, y = f"s{self._pairs[-1]}", f"y{self._pairs[-1]}"
            gamma = self._product(s, y) / self._product(y, y)
            delta = {name: gamma * c for name, c in delta.items()}
        for i in self._pairs:
            beta = self._along(delta, f"y{i}") / self._product(f"s{i}", f"y{i}")
            delta[f"s{i}"] = delta.get(f"s{i}", 0.0) + alphas[i] - beta
        return delta

    def after_step(self) -> tuple[Op, ...]:
        slot = self._new_slot()
        s, y = f"s{slot}", f"y{slot}"
        ops: list[Op] = [
            Combine(s, ((1.0, X), (-1.0, "x0"))),
            Combine(y, ((1.0, "gt"), (-1.0, "g"))),
            TAKE_GRADIENT,
        ]
        return (*ops, *(Dot(a, b) for a, b in self._changed(s, y)))

    def learn(self, point: Point, numbers: Sequence[float]) -> None:
        slot = self._new_slot()
        s, y = f"s{slot}", f"y{slot}"
        self._products |= dict(zip(self._changed(s, y), numbers, strict=True))
        if slot in self._pairs:
            self._pairs.remove(slot)
        lengths = math.sqrt(self._product(s, s) * self._product(y, y))
        if self._product(s, y) > CURVED * lengths:
            self._pairs.append(slot)

    def forget(self) -> None:
        self._pairs.clear()

    def _new_slot(self) -> int:
        """A free one, else the oldest pair's."""
        free = [slot for slot in range(self._memory) if slot not in self._pairs]
        return free[0] if free else self._pairs[0]

    def _changed(self, s: str, y: str) -> list[tuple[str, str]]:
        """The products that a new pair and a new gradient change."""
        old = [f"{kind}{i}" for i in self._pairs for kind in "sy" if f"{kind}{i}" not in (s, y)]
        new = [s, y, "g"]
        pairs = [(a, b) for place, a in enumerate(new) for b in new[place:]]
        return [_key(a, b) for a, b in [*pairs, *((a, b) for a in new for b in old)]]

    def _product(self, a: str, b: str) -> float:
        return self._products[_key(a, b)]

    def _along(self, delta: dict[str, float], other: str) -> float:
        return sum(c * self._product(name, other) for name, c in delta.items())


def _key(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a <= b else (b, a)


DIRECTIONS: dict[str, Callable[[int], Directions]] = {
    "lbfgs": Lbfgs,
    "conjugate_gradient": ConjugateGradient,
    "gradient_descent": GradientDescent,
}
