"""Server-side update rules: sgd, momentum, adagrad, adam.

An optimizer is a NamedTuple of plain values and one pure function: no hidden state; the arrays that
it is handed (parameters and slots) are updated in place, chunk by chunk so that all of them stay in
cache, with one preallocated scratch of CHUNK elements and no other temporaries. Scalars are Python
floats, so everything stays in the arrays' dtype. The gradient is only read.
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

Vector: TypeAlias = NDArray[Any]
# (data, slots, gradient, scratch, t), all of one length; scratch is overwritten
Rule: TypeAlias = Callable[[Vector, tuple[Vector, ...], Vector, Vector, int], None]


class Optimizer(NamedTuple):
    """`slots` arrays of the parameters' length, filled with `slot_init`, go with the parameters."""

    name: str
    slots: int
    slot_init: tuple[float, ...]
    apply: Rule


def sgd(learning_rate: float = 0.01) -> Optimizer:
    """w -= lr * g. (Robbins and Monro, "A Stochastic Approximation Method", 1951)"""

    def update(data: Vector, _: tuple[Vector, ...], g: Vector, scratch: Vector, t: int) -> None:
        np.multiply(g, learning_rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("sgd", 0, (), _chunked(update))


def momentum(
    learning_rate: float = 0.01, momentum: float = 0.9, nesterov: bool = False
) -> Optimizer:
    """v = m * v + g; w -= lr * v, or with nesterov w -= lr * (g + m * v).

    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; the form of
    Nesterov's method is that of Sutskever et al., "On the importance of initialization and momentum
    in deep learning", 2013, with the parameters at the look-ahead point.
    """

    def update(data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int) -> None:
        (v,) = slots
        np.multiply(v, momentum, out=v)
        np.add(v, g, out=v)
        if nesterov:
            np.multiply(v, momentum, out=scratch)
            np.add(scratch, g, out=scratch)
            np.multiply(scratch, learning_rate, out=scratch)
        else:
            np.multiply(v, learning_rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("momentum", 1, (0.0,), _chunked(update))


def adagrad(learning_rate: float = 0.05, initial: float = 0.1, epsilon: float = 1e-7) -> Optimizer:
    """G += g²; w -= lr * g / (sqrt(G) + epsilon), with G = `initial` at first.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", 2011; on the server as in Dean et al., "Large Scale Distributed Deep Networks",
    2012: each parameter has its own learning rate, which suits stale gradients.
    """

    def update(data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int) -> None:
        (squares,) = slots
        np.multiply(g, g, out=scratch)
        np.add(squares, scratch, out=squares)
        np.sqrt(squares, out=scratch)
        np.add(scratch, epsilon, out=scratch)
        np.divide(g, scratch, out=scratch)
        np.multiply(scratch, learning_rate, out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("adagrad", 1, (initial,), _chunked(update))


def adam(
    learning_rate: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Optimizer:
    """m, v: running means of g, g²; w -= lr * m̂ / (sqrt(v̂) + epsilon), m̂ and v̂ bias-corrected.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Both corrections are folded
    into the step and epsilon (the end of the paper's section 2), which is the same number.
    """

    def update(data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int) -> None:
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
        np.multiply(scratch, learning_rate * root / (1.0 - beta1**t), out=scratch)
        np.subtract(data, scratch, out=data)

    return Optimizer("adam", 2, (0.0, 0.0), _chunked(update))


# A factory's keyword arguments are the optimizer's options in the YAML.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
}


def make(name: str, options: Mapping[str, Any], dtype: str) -> Optimizer:
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
    one, zero, scratch = np.ones(1, dtype), np.zeros(1, dtype), np.empty(1, dtype)
    with np.errstate(all="ignore"):
        made.apply(
            one, tuple(np.full(1, first, dtype) for first in made.slot_init), zero, scratch, 1
        )
    if one[0] != 1:
        given = ", ".join(f"{option} {value}" for option, value in options.items())
        raise SpecError(
            f"{name} divides 0 by 0 in {dtype} with {given}", remedy="use a larger epsilon"
        )
    return made


def _chunked(update: Rule) -> Rule:
    """The rule for arrays of any length, by chunks of the scratch's length."""

    def apply(
        data: Vector, slots: tuple[Vector, ...], gradient: Vector, scratch: Vector, t: int
    ) -> None:
        size, chunk = data.size, scratch.size
        if size <= chunk:
            return update(data, slots, gradient, scratch[:size], t)
        for start in range(0, size, chunk):
            part = slice(start, min(start + chunk, size))
            pieces = tuple([slot[part] for slot in slots])
            update(data[part], pieces, gradient[part], scratch[: part.stop - start], t)
        return None

    return apply
