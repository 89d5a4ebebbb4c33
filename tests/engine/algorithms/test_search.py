"""Batch methods on real shards: the textbook's iterates, the optimum of others, how they end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from dsgd_cli.engine import optimizers
from dsgd_cli.engine.algorithms.line_search import TRIALS, Trial, wolfe
from dsgd_cli.engine.algorithms.search import STILL, Compute, Pass, Passed, Settings, Step, search
from dsgd_cli.engine.layout import cut, flatten, unflatten
from dsgd_cli.engine.shard import Shard
from dsgd_cli.engine.vectors import PARAMETERS, Combine, Op, Vectors, together
from dsgd_cli.learning.datasets import digits
from dsgd_cli.learning.models import softmax

Vector = np.ndarray[Any, Any]
Loss = Callable[[Vector, slice], tuple[float, Vector]]  # parameters, examples -> both summed

L2 = 1e-3


@dataclass(frozen=True)
class Problem:
    """A sum over examples."""

    loss: Loss
    first: Vector
    examples: int

    def with_l2(self, x: Vector, l2: float = L2) -> tuple[float, Vector]:
        """What the search minimises: the mean, and the squared parameters."""
        value, gradient = self.loss(x, slice(0, self.examples))
        n = self.examples
        return value / n + 0.5 * l2 * float(x @ x), gradient / n + l2 * x


def softmax_of_digits(dtype: str = "float64") -> Problem:
    data, model = digits().as_dtype(dtype), softmax()
    first = model.init(np.random.default_rng(0), data.example(32))
    layout = cut([(name, array.shape) for name, array in first.items()], dtype, 1)
    x = np.zeros(layout.size, dtype)
    flatten(layout, first, x)

    def loss(x: Vector, rows: slice) -> tuple[float, Vector]:
        out = np.zeros(layout.size, dtype)
        n = len(data.x[rows])
        value, _ = model.gradients(
            unflatten(layout, x), data.x[rows], data.y[rows], unflatten(layout, out)
        )
        return value * n, out * n

    return Problem(loss, x, data.examples)


def least_squares(size: int = 12, examples: int = 40, condition: float = 30.0) -> Problem:
    """A quadratic."""
    rng = np.random.default_rng(3)
    u, _, v = np.linalg.svd(rng.standard_normal((examples, size)), full_matrices=False)
    a = np.sqrt(examples) * (u * np.geomspace(1.0, np.sqrt(condition), size)) @ v
    b = rng.standard_normal(examples)

    def loss(x: Vector, rows: slice) -> tuple[float, Vector]:
        rest = a[rows] @ x - b[rows]
        return 0.5 * float(rest @ rest), a[rows].T @ rest

    return Problem(loss, rng.standard_normal(size), examples)


@dataclass
class Run:
    """A search, carried out on so many shards; portions arrive in an order of their own."""

    problem: Problem
    settings: Settings
    shard_count: int = 1
    parts: int = 5
    ended: str | None = None
    passes: int = 0
    asked: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        x = self.problem.first
        ends = [x.size * i // self.shard_count for i in range(self.shard_count + 1)]
        self.bounds = [slice(*pair) for pair in pairwise(ends)]
        optimizer = optimizers.make("sgd", {"learning_rate": 1.0}, str(x.dtype))
        self.shards = [Shard(x[cut].copy(), 64, optimizer, rounds=True) for cut in self.bounds]
        self.vectors = [Vectors(shard, x.dtype) for shard in self.shards]

    @property
    def x(self) -> Vector:
        blocks = [shard.values(block) for shard in self.shards for block in range(shard.blocks)]
        return np.concatenate(blocks)

    def steps(self) -> Iterator[tuple[Step, Vector]]:
        """Each step, with the parameters as they are then."""
        method, number, answer = search(self.settings), 0, None
        request = next(method)
        while True:
            if isinstance(request, Pass):
                answer = self._pass()
            elif isinstance(request, Compute):
                number += 1
                self.asked += request.ops
                answer = together(request.ops, [v.do(number, request.ops) for v in self.vectors])
            else:
                yield request, self.x
                answer = None
            try:
                request = method.send(answer)
            except StopIteration as end:
                self.ended = end.value
                return

    def _pass(self) -> Passed:
        self.passes += 1
        x, n, total = self.x, self.problem.examples, 0.0
        for part in np.random.default_rng(self.passes).permutation(self.parts):
            rows = slice(n * part // self.parts, n * (part + 1) // self.parts)
            loss, gradient = self.problem.loss(x, rows)
            total += loss
            for shard, bounds in zip(self.shards, self.bounds, strict=True):
                slice_ = gradient[bounds]
                for block, size in enumerate(shard.sizes):
                    values = slice_[block * 64 : block * 64 + size]
                    shard.contribute(0, 1, self.passes, int(part), block, values)
        return Passed(total, n, self.passes, self.parts)


class TwoLoops:
    """Nocedal and Wright, "Numerical Optimization", algorithm 7.4."""

    curvature = 0.9

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Vector, Vector]] = []  # the oldest first

    def next(self, g: Vector) -> tuple[Vector, float]:
        """The direction, and the first step along it."""
        q, alphas, pairs = g.copy(), [], self.pairs[-self.memory :]
        for s, y in reversed(pairs):
            alphas.append((s @ q) / (s @ y))
            q -= alphas[-1] * y
        if pairs:
            s, y = pairs[-1]
            q *= (s @ y) / (y @ y)
        for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
            q += (alpha - (y @ q) / (s @ y)) * s
        return -q, 1.0 if pairs else min(1.0, 1.0 / float(np.linalg.norm(g)))

    def learn(self, step: float, d: Vector, g: Vector, gt: Vector) -> None:
        self.pairs.append((step * d, gt - g))


class Conjugate:
    """The same, algorithm 5.4 with equation 5.45. `steepest`: along the gradient."""

    def __init__(self, steepest: bool = False) -> None:
        self.steepest = steepest
        self.curvature = 0.9 if steepest else 0.1
        self.d: Vector | None = None
        self.beta = 0.0
        self.gain: float | None = None  # of the last step, to first order

    def next(self, g: Vector) -> tuple[Vector, float]:
        d = -g if self.d is None or self.beta == 0.0 else self.beta * self.d - g
        if d @ g >= 0.0:
            d = -g
        if self.gain is None:
            return d, min(1.0, 1.0 / float(np.linalg.norm(g)))
        return d, self.gain / float(g @ d)

    def learn(self, step: float, d: Vector, g: Vector, gt: Vector) -> None:
        self.d, self.gain = d, step * float(g @ d)
        self.beta = 0.0 if self.steepest else max(0.0, float(gt @ (gt - g) / (g @ g)))


def textbook(problem: Problem, rule: TwoLoops | Conjugate) -> Iterator[tuple[float, Vector]]:
    """With whole vectors, and the same line search."""
    x = problem.first
    loss, g = problem.with_l2(x)
    while True:
        yield loss, x
        d, first = rule.next(g)
        trials = wolfe(loss, float(g @ d), first, rule.curvature)
        step = next(trials)
        found: Trial | None = None
        while found is None:
            there, gt = problem.with_l2(x + step * d)
            try:
                step = trials.send((there, float(gt @ d)))
            except StopIteration as end:
                found = end.value
                assert found is not None
        rule.learn(step, d, g, gt)
        x, loss, g = x + step * d, there, gt


def compare(ours: Run, expected: Iterator[tuple[float, Vector]], count: int) -> None:
    """The first steps are the same."""
    pairs = islice(zip(ours.steps(), expected, strict=False), count)
    for number, ((step, x), (loss, right)) in enumerate(pairs):
        assert step.number == number
        assert step.loss == pytest.approx(loss, rel=1e-11)
        assert np.linalg.norm(x - right) <= 1e-8 * np.linalg.norm(right), f"step {number}"
    assert number == count - 1


@pytest.fixture(scope="module")
def problem() -> Problem:
    return softmax_of_digits()


@pytest.fixture(scope="module")
def optimum(problem: Problem) -> float:
    """As scipy finds it."""
    options = {"maxiter": 20_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(problem.with_l2, problem.first, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun)


# ── L-BFGS ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("memory", [1, 4, 10])
def test_iterates_are_the_textbooks(problem: Problem, shards: int, memory: int) -> None:
    settings = Settings(memory=memory, l2=L2, tolerance=0.0, noise=0.0)
    compare(Run(problem, settings, shards), textbook(problem, TwoLoops(memory)), 36)


def test_the_optimum_is_scipys(problem: Problem, optimum: float) -> None:
    run = Run(problem, Settings(l2=L2, tolerance=1e-6), 2)
    losses = [step.loss for step, _ in run.steps()]
    assert losses[-1] == pytest.approx(optimum, rel=1e-6)
    assert losses[-1] >= optimum * (1 - 1e-9)
    assert run.ended == "no gradient is larger than 1e-06"
    assert run.passes < 1.3 * len(losses)


def test_the_optimum_is_reached_in_float32(optimum: float) -> None:
    """As far as its rounding allows; then it ends, whatever the tolerance."""
    noise = 50.0 * float(np.finfo("float32").eps)
    run = Run(softmax_of_digits("float32"), Settings(l2=L2, tolerance=0.0, noise=noise), 2)
    *_, (last, x) = run.steps()
    assert last.loss == pytest.approx(optimum, rel=1e-4)
    assert run.ended is not None
    assert x.dtype == np.float32


def test_vectors_are_as_many_as_the_memory_allows(problem: Problem) -> None:
    run = Run(problem, Settings(memory=3, l2=L2, tolerance=0.0, noise=0.0))
    for _ in islice(run.steps(), 12):
        pass
    made = {op.out for op in run.asked if isinstance(op, Combine)} - {PARAMETERS}
    assert made == {"x0", "d", "g", *(f"{kind}{slot}" for kind in "sy" for slot in range(3))}


def test_a_pair_without_curvature_is_not_remembered() -> None:
    """A plane: the gradient does not change, and 1 / s·y would be infinite."""
    c = np.array([3.0, -4.0])
    plane = Problem(lambda x, rows: (float(c @ x), c), np.zeros(2), 1)
    run = Run(plane, Settings(tolerance=0.0), parts=1)
    steps = list(islice(run.steps(), 4))
    assert all(after.loss < before.loss for (before, _), (after, _) in pairwise(steps))
    directions = [op for op in run.asked if isinstance(op, Combine) and op.out == "d"]
    assert directions == [Combine("d", ((-1.0, "g"),))] * 3


def test_a_quadratic_of_two_dimensions_is_done_in_a_few_steps() -> None:
    run = Run(least_squares(size=2), Settings(tolerance=1e-10))
    assert len(list(run.steps())) < 12


# ── the others ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["conjugate_gradient", "gradient_descent"])
def test_their_iterates_are_the_textbooks(problem: Problem, method: str) -> None:
    settings = Settings(method, l2=L2, tolerance=0.0, noise=0.0)
    rule = Conjugate(steepest=method == "gradient_descent")
    compare(Run(problem, settings, 2), textbook(problem, rule), 30)


def test_conjugate_gradients_reach_the_same_optimum(problem: Problem, optimum: float) -> None:
    run = Run(problem, Settings("conjugate_gradient", l2=L2, tolerance=1e-5), 2)
    losses = [step.loss for step, _ in run.steps()]
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(optimum, rel=1e-6)
    assert run.ended == "no gradient is larger than 1e-05"


def test_conjugate_gradients_end_on_a_quadratic_after_its_dimensions() -> None:
    """With searches that are nearly exact: twelve, and some for those that were not."""
    run = Run(least_squares(), Settings("conjugate_gradient", tolerance=1e-8))
    assert len(list(run.steps())) < 40


@pytest.mark.parametrize("shards", [1, 3])
def test_gradient_descent_decreases_down_to_the_optimum(shards: int) -> None:
    problem = least_squares()
    run = Run(problem, Settings("gradient_descent", tolerance=1e-6), shards)
    losses = [step.loss for step, _ in run.steps()]
    assert all(after <= before for before, after in pairwise(losses))
    n, size = problem.examples, problem.first.size
    _, minus_b = problem.loss(np.zeros(size), slice(0, n))
    rows = [problem.loss(unit, slice(0, n))[1] - minus_b for unit in np.eye(size)]
    best = np.linalg.solve(np.array(rows).T, -minus_b)
    np.testing.assert_allclose(run.x, best, atol=1e-5)
    assert run.ended == "no gradient is larger than 1e-06"


# ── the end ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["lbfgs", "conjugate_gradient", "gradient_descent"])
def test_it_ends_where_there_is_nothing_left_to_gain(method: str) -> None:
    problem = least_squares(condition=3.0)
    run = Run(problem, Settings(method, tolerance=0.0, noise=1e-14))
    losses = [step.loss for step, _ in islice(run.steps(), 400)]
    assert run.ended in (
        "the loss does not decrease any further",
        "no step along the gradient decreases the loss any further",
        "no gradient is larger than 0",
    )
    assert losses[-1] == pytest.approx(min(losses), rel=1e-13)
    *_, (_, last) = Run(problem, Settings(tolerance=1e-9)).steps()
    np.testing.assert_allclose(run.x, last, atol=1e-6)


def test_steps_that_gain_only_noise_are_not_taken_for_ever() -> None:
    """The loss is rounded so coarsely that no step shows."""
    exact = least_squares()
    coarse = Problem(
        lambda x, rows: (round(exact.loss(x, rows)[0], 3), exact.loss(x, rows)[1]),
        exact.first,
        exact.examples,
    )
    run = Run(coarse, Settings(tolerance=0.0, noise=1e-2))
    losses = [step.loss for step, _ in islice(run.steps(), 200)]
    assert run.ended == "the loss does not decrease any further"
    assert max(losses[-STILL - 1 :]) <= min(losses) * 1.02


@pytest.mark.parametrize("method", ["lbfgs", "conjugate_gradient", "gradient_descent"])
def test_a_gradient_that_leads_nowhere_ends_it_where_it_was(method: str) -> None:
    """The user's gradient has the wrong sign."""
    right = least_squares()

    def wrong(x: Vector, rows: slice) -> tuple[float, Vector]:
        loss, gradient = right.loss(x, rows)
        return loss, -gradient

    run = Run(Problem(wrong, right.first, right.examples), Settings(method), 2)
    (step, x) = list(run.steps())[-1]
    assert step.number == 0
    assert run.ended == "no step along the gradient decreases the loss any further"
    np.testing.assert_array_equal(run.x, right.first)
    np.testing.assert_array_equal(x, right.first)


@pytest.mark.parametrize("method", ["lbfgs", "conjugate_gradient"])
def test_after_a_direction_that_leads_nowhere_comes_the_gradient(method: str) -> None:
    """For as long as a search may take there is no loss, wherever it looks."""
    right, passes = least_squares(), itertools.count(1)

    def loss(x: Vector, rows: slice) -> tuple[float, Vector]:
        if next(passes) in range(9, 9 + TRIALS + 1):
            return math.inf, np.zeros_like(x)
        return right.loss(x, rows)

    run = Run(Problem(loss, right.first, right.examples), Settings(method, tolerance=1e-6), parts=1)
    losses = [step.loss for step, _ in run.steps()]
    directions = [op for op in run.asked if isinstance(op, Combine) and op.out == "d"]
    assert directions.count(Combine("d", ((-1.0, "g"),))) >= 2
    assert all(after < before for before, after in pairwise(losses))
    assert run.ended == "no gradient is larger than 1e-06"


def test_a_loss_that_is_not_finite_ends_it() -> None:
    """Workers contribute zeros then: that must not pass for a small gradient."""
    lost = Problem(lambda x, rows: (math.inf, np.zeros(3)), np.ones(3), 9)
    run = Run(lost, Settings())
    assert [step.number for step, _ in run.steps()] == [0]
    assert run.ended == "the loss is not finite, there is nothing to go by"


def test_a_trial_beyond_what_numbers_can_hold_is_turned_back() -> None:
    """log barriers: beyond 0.01 from the start there is no loss, and the first step is 1."""

    def loss(x: Vector, rows: slice) -> tuple[float, Vector]:
        gap = 0.01 - x
        if gap.min() <= 0.0:
            return math.inf, np.zeros(2)
        return float(-np.log(gap).sum() - 200.0 * x.sum()), 1.0 / gap - 200.0

    run = Run(Problem(loss, np.zeros(2), 1), Settings(tolerance=1e-6), parts=1)
    *_, (_, x) = run.steps()
    np.testing.assert_allclose(x, 0.01 - 1.0 / 200.0, atol=1e-8)
    assert run.ended == "no gradient is larger than 1e-06"
