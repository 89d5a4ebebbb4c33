"""The optimizers against the textbook, written naively."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.engine.optimizers import CHUNK, OPTIMIZERS, SCRATCH_ROWS, Optimizer, make

Vector = np.ndarray[Any, Any]
STEPS = 7


def naive_sgd(w: Vector, gradients: list[Vector], learning_rate: float = 0.01) -> Vector:
    for g in gradients:
        w = w - learning_rate * g
    return w


def naive_momentum(
    w: Vector,
    gradients: list[Vector],
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Vector:
    v = np.zeros_like(w)
    for g in gradients:
        v = momentum * v + g
        w = w - learning_rate * (g + momentum * v if nesterov else v)
    return w


def naive_adagrad(
    w: Vector,
    gradients: list[Vector],
    learning_rate: float = 0.05,
    initial: float = 0.1,
    epsilon: float = 1e-7,
) -> Vector:
    total = np.full_like(w, initial)
    for g in gradients:
        total = total + g**2
        w = w - learning_rate * g / (np.sqrt(total) + epsilon)
    return w


def naive_adam(
    w: Vector,
    gradients: list[Vector],
    learning_rate: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Vector:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - learning_rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
    return w


NAIVE: dict[str, Callable[..., Vector]] = {
    "sgd": naive_sgd,
    "momentum": naive_momentum,
    "adagrad": naive_adagrad,
    "adam": naive_adam,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"learning_rate": 1}),
    ("momentum", {}),
    ("momentum", {"learning_rate": 0.2, "momentum": 0.5}),
    ("momentum", {"nesterov": True}),
    ("momentum", {"momentum": 0, "nesterov": True}),
    ("adagrad", {}),
    ("adagrad", {"learning_rate": 0.5, "initial": 0, "epsilon": 0.01}),
    ("adam", {}),
    ("adam", {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.6, "epsilon": 0.1}),
    ("adam", {"beta1": 0, "beta2": 0}),
]


def gradients(size: int, dtype: str) -> list[Vector]:
    """Of very different sizes, some zero."""
    rng = np.random.default_rng(1)
    scale = 10.0 ** rng.integers(-4, 3, size)
    made = [(rng.standard_normal(size) * scale).astype(dtype) for _ in range(STEPS)]
    for g in made:
        g[: size // 10] = 0
        g.flags.writeable = False
    return made


def run(
    optimizer: Optimizer,
    w: Vector,
    steps: list[Vector],
    chunk: int,
    rates: list[float] | None = None,
) -> Vector:
    w = w.copy()
    slots = tuple(np.full_like(w, first) for first in optimizer.slot_init)
    assert len(slots) == optimizer.slots
    scratch = np.full((SCRATCH_ROWS, chunk), np.nan, w.dtype)
    for t, g in enumerate(steps, start=1):
        optimizer.apply(w, slots, g, scratch, t, *(() if rates is None else (rates[t - 1],)))
    assert all(slot.dtype == w.dtype for slot in slots)
    return w


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_the_textbook(name: str, options: dict[str, Any]) -> None:
    size = 1000
    for dtype, tolerance in [("float64", 1e-12), ("float32", 3e-5)]:
        w = np.random.default_rng(0).standard_normal(size).astype(dtype)
        steps = gradients(size, dtype)
        got = run(make(name, options, dtype), w, steps, CHUNK)
        expected = NAIVE[name](w.astype("float64"), [g.astype("float64") for g in steps], **options)
        assert got.dtype == dtype
        scale = np.maximum(1, np.abs(expected - w))
        assert np.max(np.abs(got - expected) / scale) < tolerance


RATES = [1.0, 0.5, 0.0, 0.25, 1.0, 0.125, 0.75]


def naive(
    name: str,
    w: Vector,
    steps: list[Vector],
    options: dict[str, Any],
    l2: float,
    rates: list[float],
) -> Vector:
    """The textbook's rule again and again from the start, one step further each time.

    Neither rates nor l2 are in it: the last step is scaled by its rate, and l2 is in the gradient.
    """
    seen: list[Vector] = []
    for g, rate in zip(steps, rates, strict=True):
        seen.append(g + l2 * w)
        zero = np.zeros_like(w)
        last = NAIVE[name](zero, seen, **options) - NAIVE[name](zero, seen[:-1], **options)
        w = w + rate * last
    return w


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_rate_and_l2_equal_the_textbook(name: str, options: dict[str, Any], l2: float) -> None:
    size = 1000
    for dtype, tolerance in [("float64", 1e-11), ("float32", 3e-4)]:
        w = np.random.default_rng(0).standard_normal(size).astype(dtype)
        steps = gradients(size, dtype)
        got = run(make(name, options, dtype, l2), w, steps, 300, RATES)
        wide = [g.astype("float64") for g in steps]
        expected = naive(name, w.astype("float64"), wide, options, l2, RATES)
        scale = np.maximum(1, np.abs(expected - w))
        assert np.max(np.abs(got - expected) / scale) < tolerance


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_l2_moves_a_parameter_without_gradient(name: str) -> None:
    w, zero = np.array([1.5, -1.5, 0.0]), np.zeros(3)
    moved = run(make(name, {}, "float64", l2=0.1), w, [zero] * 5, 2)
    assert moved[0] < 1.5 and moved[1] > -1.5 and moved[2] == 0


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chunks_change_nothing(name: str, options: dict[str, Any], dtype: str) -> None:
    size = 1000
    w = np.random.default_rng(0).standard_normal(size).astype(dtype)
    steps = gradients(size, dtype)
    for l2 in (0.0, 0.1):
        made = make(name, options, dtype, l2)
        whole = run(made, w, steps, size, RATES)
        for chunk in (1, 7, 250, 999, 1001):
            np.testing.assert_array_equal(run(made, w, steps, chunk, RATES), whole)


def test_a_float32_update_never_passes_through_float64() -> None:
    """Scalars are weak, also when they come as numpy floats or are large."""
    one = np.ones(1, np.float32)
    w = run(make("sgd", {"learning_rate": 1e-8}, "float32"), one, [one] * 3, 1)
    assert w[0] == 1  # 1 - 1e-8 rounds to 1 in float32, three times
    sgd = make("sgd", {"learning_rate": float(np.float64(0.1))}, "float32")
    assert run(sgd, one, [one], 1).dtype == np.float32


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_parameter_without_gradient_stays(name: str) -> None:
    w = np.full(3, 1.5, np.float32)
    zero = np.zeros(3, np.float32)
    np.testing.assert_array_equal(run(make(name, {}, "float32"), w, [zero] * 3, 2), w)


def test_every_default_is_the_documented_one() -> None:
    assert make("adagrad", {}, "float32").slot_init == (0.1,)
    assert {name: make(name, {}, "float32").name for name in OPTIMIZERS} == {
        name: name for name in OPTIMIZERS
    }


@pytest.mark.parametrize(
    ("name", "options", "message", "remedy"),
    [
        ("adamm", {}, "no optimizer 'adamm'", "use one of sgd, momentum, adagrad, adam"),
        ("sgd", {"lr": 1}, "sgd has no option 'lr'", "known: learning_rate"),
        ("adam", {"epsilon": 0}, "adam divides 0 by 0 in float32 with epsilon 0", "larger epsilon"),
        ("adam", {"epsilon": 1e-50}, "in float32 with epsilon 1e-50", "larger epsilon"),
        ("adagrad", {"epsilon": 0, "initial": 0}, "with epsilon 0, initial 0", "larger epsilon"),
        ("adagrad", {"epsilon": 0, "initial": 1e-50}, "adagrad divides 0 by 0", "larger epsilon"),
    ],
)
def test_bad_options_are_refused(
    name: str, options: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(SpecError) as caught:
        make(name, options, "float32")
    assert message in str(caught.value)
    assert remedy in caught.value.remedy


def test_what_is_tiny_in_float32_is_fine_in_float64() -> None:
    make("adam", {"epsilon": 1e-50}, "float64")
    make("adagrad", {"epsilon": 0, "initial": 1e-30}, "float32")
