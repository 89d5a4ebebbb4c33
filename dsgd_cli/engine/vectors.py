"""Vectors that are spread over the shards like the parameters, and what can be done with them.

This is the interface on which batch methods are built (`algorithms.search`): the coordinator names
vectors and holds scalars; every shard does the same to its slices and answers with its part of each
sum, which the coordinator adds up. No vector ever leaves its shard. The operations, in the order in
which they are given:

    combine   out = Σ cᵢ · vᵢ          `out` may be one of the vᵢ, and PARAMETERS
    dot       Σ aᵢ · bᵢ                 a number, in float64 whatever the dtype
    largest   max |aᵢ|                  a number
    gradient  out = scale · sum of the round's parts + l2 · PARAMETERS

PARAMETERS are what workers pull. A vector exists from the first time that it is an `out`. A list of
operations has a number: a shard does it once, and answers again what it answered, if it is asked
again, even while it is at it; it refuses to leave one out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

PARAMETERS = "x"

Vector: TypeAlias = NDArray[Any]


class Combine(NamedTuple):
    """out = Σ coefficient · vector."""

    out: str
    terms: tuple[tuple[float, str], ...]


class Dot(NamedTuple):
    """A number: the inner product."""

    a: str
    b: str


class Largest(NamedTuple):
    """A number: the largest absolute value."""

    a: str


class Gradient(NamedTuple):
    """out = scale · (the sum of the round's parts) + l2 · PARAMETERS."""

    out: str
    round: int
    parts: int
    scale: float
    l2: float = 0.0


Op: TypeAlias = Combine | Dot | Largest | Gradient
KINDS: dict[str, type[Op]] = {
    "combine": Combine,
    "dot": Dot,
    "largest": Largest,
    "gradient": Gradient,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def as_json(ops: Sequence[Op]) -> list[list[Any]]:
    """For the wire: floats survive it exactly."""
    return [[_NAMES[type(op)], *op] for op in ops]


def from_json(items: Sequence[Sequence[Any]]) -> tuple[Op, ...]:
    """The inverse of `as_json`."""
    made: list[Op] = []
    for name, *fields in items:
        if name == "combine":
            out, terms = fields
            made.append(Combine(out, tuple((float(c), str(v)) for c, v in terms)))
        else:
            made.append(KINDS[name](*fields))
    return tuple(made)


def together(ops: Sequence[Op], answers: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """What all shards' numbers come to, in the order of the operations that give one."""
    asked = [op for op in ops if isinstance(op, Dot | Largest)]
    found = []
    for op, *parts in zip(asked, *answers, strict=True):
        found.append(_largest(parts) if isinstance(op, Largest) else float(sum(parts)))
    return tuple(found)


def _largest(values: Sequence[float]) -> float:
    """NaN if one of them is: `max` would depend on their order."""
    return float(np.max(values))


class OutOfTurn(Exception):
    """A list of operations was left out."""


class Slices(Protocol):
    """The shard under the vectors, block by block."""

    @property
    def sizes(self) -> Sequence[int]:
        """Elements of each block."""

    def values(self, block: int) -> Vector:
        """The parameters of a block, to be read."""

    def assign(self, block: int, values: Vector) -> None:
        """Sets them, as an update that readers of the block notice."""

    def summed(self, block: int, round_: int, parts: int) -> Vector:
        """The round's sum of a block, to be read. Raises Incomplete."""


class Vectors:
    """One shard's slices of all vectors but the parameters, which are the shard's."""

    def __init__(self, shard: Slices, dtype: Any) -> None:
        self._shard = shard
        self._dtype = np.dtype(dtype)
        self._sizes = list(shard.sizes)
        self._vectors: dict[str, list[Vector]] = {}
        self._scratch = np.empty(max(self._sizes), self._dtype)
        self._result = np.empty(max(self._sizes), self._dtype)
        self._number = 0
        self._answer: tuple[float, ...] = ()
        self._lock = threading.Lock()

    def do(self, number: int, ops: Sequence[Op]) -> tuple[float, ...]:
        """Carries them out, in order. Raises OutOfTurn, Incomplete, KeyError (no such vector)."""
        with self._lock:  # a repetition may come while the first is under way
            if number == self._number:
                return self._answer
            if number != self._number + 1:
                raise OutOfTurn(f"operations {number} after {self._number}")
            with np.errstate(all="ignore"):
                found = [value for op in ops if (value := self._one(op)) is not None]
            self._number, self._answer = number, tuple(found)
            return self._answer

    def _one(self, op: Op) -> float | None:
        match op:
            case Combine(out, terms):
                self._combine(out, terms)
            case Dot(a, b):
                return float(sum(self._dot(a, b, block) for block in range(len(self._sizes))))
            case Largest(a):
                blocks = range(len(self._sizes))
                return _largest([float(np.abs(self._read(a, block)).max()) for block in blocks])
            case Gradient():
                self._gradient(op)
        return None

    def _combine(self, out: str, terms: Sequence[tuple[float, str]]) -> None:
        for block, size in enumerate(self._sizes):
            result, scratch = self._result[:size], self._scratch[:size]
            result.fill(0.0)
            for coefficient, name in terms:
                np.multiply(self._read(name, block), coefficient, out=scratch)
                np.add(result, scratch, out=result)
            self._write(out, block, result)

    def _dot(self, a: str, b: str, block: int) -> float:
        left, right = self._read(a, block), self._read(b, block)
        wide = [vector.astype(np.float64, copy=False) for vector in (left, right)]
        return float(np.dot(*wide))

    def _gradient(self, op: Gradient) -> None:
        for block, size in enumerate(self._sizes):
            result, scratch = self._result[:size], self._scratch[:size]
            np.multiply(self._shard.summed(block, op.round, op.parts), op.scale, out=result)
            if op.l2:
                np.multiply(self._shard.values(block), op.l2, out=scratch)
                np.add(result, scratch, out=result)
            self._write(op.out, block, result)

    def _read(self, name: str, block: int) -> Vector:
        return self._shard.values(block) if name == PARAMETERS else self._vectors[name][block]

    def _write(self, name: str, block: int, values: Vector) -> None:
        if name == PARAMETERS:
            self._shard.assign(block, values)
            return
        if name not in self._vectors:
            self._vectors[name] = [np.zeros(size, self._dtype) for size in self._sizes]
        np.copyto(self._vectors[name][block], values)
