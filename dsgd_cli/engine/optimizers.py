"""Server-side update rules: sgd, momentum, adagrad, adam.

An optimizer is a NamedTuple of plain values and one pure function: no hidden state; the arrays that
it is handed (parameters and slots) are updated in place, chunk by chunk so that all of them stay in
cache, with preallocated scratch and no other temporaries. Scalars are Python floats, so everything
stays in the arrays' dtype. The gradient is only read.
The caller checks gradients for finiteness and counts the updates `t` (1, 2, ... per block).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import SpecError

CHUNK = 1 << 16  # elements: parameters, gradient, two slots and scratch fit a core's L2 cache
SCRATCH_ROWS = 2  # of at most CHUNK elements
COMMON = ("decay", "warm_up", "l2", "clip_norm")  # options of all, which no factory takes

Vector: TypeAlias = NDArray[Any]
# (data, slots, gradient, scratch, t, rate), all of one length; scratch is overwritten; `rate` is
# what the learning rate is multiplied by
Rule: TypeAlias = Callable[[Vector, tuple[Vector, ...], Vector, Vector, int, float], None]


class Optimizer(NamedTuple):
    """`slots` arrays of the parameters' length, filled with `slot_init`, go with the parameters.

    `l2` times the parameters is added to each gradient: the derivative of l2 / 2 times their
    squares.
    """

    name: str
    slots: int
    slot_init: tuple[float, ...]
    update: Rule
    l2: float = 0.0

    def apply(
        self,
        data: Vector,
        slots: tuple[Vector, ...],
        gradient: Vector,
        scratch: NDArray[Any],
        t: int,
        rate: float = 1.0,
    ) -> None:
        """One update of arrays of any length, by chunks. `scratch`: (SCRATCH_ROWS, chunk)."""
        size, chunk = data.size, scratch.shape[1]
        if size <= chunk:
            self._chunk(data, slots, gradient, scratch[:, :size], t, rate)
            return
        for start in range(0, size, chunk):
            part = slice(start, min(start + chunk, size))
            pieces = tuple([slot[part] for slot in slots])
            own = scratch[:, : part.stop - start]
            self._chunk(data[part], pieces, gradient[part], own, t, rate)

    def _chunk(
        self,
        data: Vector,
        slots: tuple[Vector, ...],
        gradient: Vector,
        scratch: NDArray[Any],
        t: int,
        rate: float,
    ) -> None:
        if self.l2:
            np.multiply(data, self.l2, out=scratch[1])
            np.add(scratch[1], gradient, out=scratch[1])
            gradient = scratch[1]
        self.update(data, slots, gradient, scratch[0], t, rate)


def sgd(learning_rate: float = 0.01) -> Optimizer:
    """w -= lr * g. (Robbins and Monro, "A Stochastic Approximation Method", 1951)"""

    def update(
        data: Vector, _: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
    ) -> None:
        np.multiply(g, learning_rate * rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("sgd", 0, (), update)


def momentum(
    learning_rate: float = 0.01, momentum: float = 0.9, nesterov: bool = False
) -> Optimizer:
    """v = m * v + g; w -= lr * v, or with nesterov w -= lr * (g + m * v).

    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; the form of
    Nesterov's method is that of Sutskever et al., "On the importance of initialization and momentum
    in deep learning", 2013, with the parameters at the look-ahead point.
    """

    def update(
        data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
    ) -> None:
        (v,) = slots
        np.multiply(v, momentum, out=v)
        np.add(v, g, out=v)
        if nesterov:
            np.multiply(v, momentum, out=scratch)
            np.add(scratch, g, out=scratch)
            np.multiply(scratch, learning_rate * rate, out=scratch)
        else:
            np.multiply(v, learning_rate * rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("momentum", 1, (0.0,), update)


def adagrad(learning_rate: float = 0.05, initial: float = 0.1, epsilon: float = 1e-7) -> Optimizer:
    """G += g²; w -= lr * g / (sqrt(G) + epsilon), with G = `initial` at first.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", 2011; on the server as in Dean et al., "Large Scale Distributed Deep Networks",
    2012: each parameter has its own learning rate, which suits stale gradients.
    """

    def update(
        data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
    ) -> None:
        (squares,) = slots
        np.multiply(g, g, out=scratch)
        np.add(squares, scratch, out=squares)
        np.sqrt(squares, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, learning_rate * rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("adagrad", 1, (initial,), update)


def adam(
    learning_rate: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Optimizer:
    """m, v: running means of g, g²; w -= lr * m̂ / (sqrt(v̂) + epsilon), m̂ and v̂ bias-corrected.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Both corrections are folded
    into the step and epsilon (the end of the paper's section 2), which is the same number.
    """

    def update(
        data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
    ) -> None:
        m, v = slots
        root = math.sqrt(1.0 - beta2**t)
        np.multiply(m, beta1, out=m)
        np.multiply(g, 1.0 - beta1, out=scratch)
        np.add(m, scratch, out=m)
        np.multiply(v, beta2, out=v)
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, 1.0 - beta2, out=scratch)
        np.add(v, scratch, out=v)
        np.sqrt(v, out=scratch)
        np.add(scratch, epsilon * root, out=scratch)
        np.divide(m, scratch, out=scratch)
        step = learning_rate * rate * root / (1.0 - beta1**t)
        np.multiply(scratch, step, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("adam", 2, (0.0, 0.0), update)


# A factory's keyword arguments are the optimizer's options in the YAML.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
}


def make(name: str, options: Mapping[str, Any], dtype: str, l2: float = 0.0) -> Optimizer:
    """The optimizer with its options, for parameters of `dtype`. Raises SpecError.

    The bounds of the options are in `contract.options`; here only what depends on all of them and
    on the dtype is checked: that a parameter without gradient stays what it is.
    """
    if name not in OPTIMIZERS:
        raise SpecError(f"no optimizer {name!r}", remedy=f"use one of {', '.join(OPTIMIZERS)}")
    known = list(inspect.signature(OPTIMIZERS[name]).parameters)
    for option in options:
        if option not in known:
            raise SpecError(f"{name} has no option {option!r}", remedy=f"known: {', '.join(known)}")
    made = OPTIMIZERS[name](**options)
    one, zero, scratch = np.ones(1, dtype), np.zeros(1, dtype), np.empty((SCRATCH_ROWS, 1), dtype)
    with np.errstate(all="ignore"):
        slots = tuple(np.full(1, first, dtype) for first in made.slot_init)
        made.apply(one, slots, zero, scratch, 1)
    if one[0] != 1:
        given = ", ".join(f"{option} {value}" for option, value in options.items())
        raise SpecError(
            f"{name} divides 0 by 0 in {dtype} with {given}", remedy="use a larger epsilon"
        )
    return made._replace(l2=l2)
