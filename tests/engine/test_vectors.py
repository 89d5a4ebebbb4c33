"""Vectors over shards: each operation against numpy, and each list of them once."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsgd_cli.engine import optimizers
from dsgd_cli.engine.shard import Frozen, Shard
from dsgd_cli.engine.sums import Incomplete
from dsgd_cli.engine.vectors import (
    PARAMETERS,
    Combine,
    Dot,
    Gradient,
    Largest,
    Op,
    OutOfTurn,
    Vectors,
    as_json,
    from_json,
    together,
)

Vector = np.ndarray[Any, Any]

SIZE, BLOCK = 11, 4  # blocks of 4, 4 and 3
SET_A = Combine("a", ((1.0, PARAMETERS),))


def shard_of(values: Vector, block: int = BLOCK) -> Shard:
    optimizer = optimizers.make("sgd", {"learning_rate": 1.0}, str(values.dtype))
    return Shard(values.copy(), block, optimizer, rounds=True)


def parameters(shard: Shard) -> Vector:
    return np.concatenate([shard.values(block).copy() for block in range(shard.blocks)])


def vector(seed: int, dtype: str = "float64", size: int = SIZE) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def contribute(shard: Shard, round_: int, part: int, gradient: Vector) -> None:
    for block, start in enumerate(range(0, gradient.size, BLOCK)):
        shard.contribute(0, 1, round_, part, block, gradient[start : start + BLOCK])


class Cluster:
    """A vector over shards: what the coordinator does with them."""

    def __init__(self, values: Vector, shards: int) -> None:
        blocks = math.ceil(values.size / BLOCK)
        ends = [min(values.size, blocks * i // shards * BLOCK) for i in range(shards + 1)]
        ends[-1] = values.size
        self.bounds = [slice(*pair) for pair in pairwise(ends)]
        self.shards = [shard_of(values[part]) for part in self.bounds]
        self.vectors = [Vectors(shard, values.dtype) for shard in self.shards]
        self.number = 0

    def do(self, *ops: Op) -> tuple[float, ...]:
        self.number += 1
        return together(ops, [vectors.do(self.number, ops) for vectors in self.vectors])

    def set(self, name: str, values: Vector) -> None:
        """By way of a round's sum, as the only road for a vector into a shard."""
        for shard, part in zip(self.shards, self.bounds, strict=True):
            contribute(shard, self.number + 1, 0, values[part])
        self.do(Gradient(name, self.number + 1, 1, 1.0))

    @property
    def x(self) -> Vector:
        return np.concatenate([parameters(shard) for shard in self.shards])

    def read(self, name: str) -> Vector:
        """Changes the parameters."""
        self.do(Combine(PARAMETERS, ((1.0, name),)))
        return self.x


@pytest.fixture(params=[1, 2, 3])
def shards(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ── the operations ─────────────────────────────────────────────────────────────────────────────


def test_combine(shards: int) -> None:
    x, a = vector(1), vector(2)
    cluster = Cluster(x, shards)
    cluster.set("a", a)
    assert cluster.do(Combine("b", ((2.0, PARAMETERS), (-0.5, "a"), (1.0, "a")))) == ()
    np.testing.assert_array_equal(cluster.x, x)
    np.testing.assert_allclose(cluster.read("b"), 2.0 * x + 0.5 * a, rtol=1e-15)


def test_what_is_combined_may_be_its_own_term(shards: int) -> None:
    x, a = vector(1), vector(2)
    cluster = Cluster(x, shards)
    cluster.set("a", a)
    cluster.do(
        Combine("a", ((3.0, "a"), (1.0, PARAMETERS))),
        Combine(PARAMETERS, ((1.0, "a"), (2.0, PARAMETERS), (1.0, "a"))),
    )
    np.testing.assert_allclose(cluster.x, 2.0 * (3.0 * a + x) + 2.0 * x, rtol=1e-14)


def test_a_copy_is_exact(shards: int) -> None:
    x = vector(1)
    cluster = Cluster(x, shards)
    cluster.do(SET_A, Combine(PARAMETERS, ((2.0, PARAMETERS),)))
    np.testing.assert_array_equal(cluster.read("a"), x)


def test_dot(shards: int) -> None:
    x, a = vector(1), vector(2)
    cluster = Cluster(x, shards)
    cluster.set("a", a)
    both = cluster.do(Dot(PARAMETERS, "a"), Dot("a", "a"))
    assert both == pytest.approx((x @ a, a @ a), rel=1e-14)


def test_a_dot_is_in_float64() -> None:
    """In float32 the ones would be lost beside 1e8."""
    x = np.array([1e4, 1.0, 1.0, 1.0], np.float32)
    assert Cluster(x, 1).do(Dot(PARAMETERS, PARAMETERS)) == (1e8 + 3.0,)
    assert Cluster(np.full(4, 1e30, np.float32), 1).do(Dot("x", "x"))[0] == pytest.approx(4e60)


def test_largest(shards: int) -> None:
    for place in range(SIZE):
        x = np.linspace(-0.5, 0.5, SIZE)
        x[place] = -2.0
        assert Cluster(x, shards).do(Largest(PARAMETERS)) == (2.0,)


@pytest.mark.parametrize("place", range(SIZE))
def test_largest_hides_no_nan(shards: int, place: int) -> None:
    """Else a gradient that is no number might pass for a small one."""
    x = np.zeros(SIZE)
    x[place] = math.nan
    assert math.isnan(*Cluster(x, shards).do(Largest(PARAMETERS)))


def test_gradient(shards: int) -> None:
    x, parts = vector(1), [vector(seed) for seed in (2, 3, 4)]
    cluster = Cluster(x, shards)
    for part, gradient in enumerate(parts):
        for shard, bounds in zip(cluster.shards, cluster.bounds, strict=True):
            contribute(shard, 7, part, gradient[bounds])
            contribute(shard, 7, part, gradient[bounds])  # a copy does not count
    cluster.do(Gradient("g", 7, 3, 0.25), Gradient("h", 7, 3, 0.25, 0.1))
    cluster.do(Combine("d", ((1.0, "h"), (-1.0, "g"))))
    np.testing.assert_allclose(cluster.read("g"), 0.25 * sum(parts), rtol=1e-14)
    np.testing.assert_allclose(cluster.read("d"), 0.1 * x, rtol=1e-13)


def test_float32_stays_float32() -> None:
    x, a = vector(1, "float32"), vector(2, "float32")
    cluster = Cluster(x, 2)
    cluster.set("a", a)
    cluster.do(Combine(PARAMETERS, ((1.0, PARAMETERS), (0.1, "a"))))
    assert cluster.x.dtype == np.float32
    np.testing.assert_array_equal(cluster.x, x + np.float32(0.1) * a)


def test_numbers_may_overflow() -> None:
    """A step that is too far is no error; the search turns back. Warnings are errors here."""
    for dtype in ("float32", "float64"):
        cluster = Cluster(np.full(3, 1e38, dtype), 1)
        cluster.do(Combine("a", ((1e300, PARAMETERS),)))
        (size, largest) = cluster.do(Dot("a", "a"), Largest("a"))
        assert size == largest == math.inf


# ── the parameters ─────────────────────────────────────────────────────────────────────────────


def test_only_what_changes_the_parameters_is_an_update() -> None:
    shard = shard_of(vector(1))
    vectors = Vectors(shard, "float64")
    versions = lambda: [shard.version(block) for block in range(shard.blocks)]  # noqa: E731
    vectors.do(1, [SET_A, Dot("a", "a")])
    assert versions() == [0, 0, 0]
    vectors.do(2, [Combine(PARAMETERS, ((2.0, "a"),))])
    assert versions() == [1, 1, 1]
    vectors.do(2, [Combine(PARAMETERS, ((2.0, "a"),))])
    assert versions() == [1, 1, 1]


def test_who_only_sees_the_memory_sees_the_update() -> None:
    stamps = [0, 0, 0]
    optimizer = optimizers.make("sgd", {"learning_rate": 1.0}, "float64")
    shard = Shard(vector(1), BLOCK, optimizer, stamps, rounds=True)
    Vectors(shard, "float64").do(1, [Combine(PARAMETERS, ((2.0, PARAMETERS),))])
    assert stamps == [2, 2, 2]  # even: nothing is under way


def test_a_frozen_shards_parameters_stay() -> None:
    x = vector(1)
    shard = shard_of(x)
    vectors = Vectors(shard, "float64")
    double = Combine(PARAMETERS, ((2.0, PARAMETERS),))
    shard.freeze()
    assert vectors.do(1, [SET_A, Dot("a", "a")]) == (pytest.approx(x @ x),)
    with pytest.raises(Frozen):
        vectors.do(2, [double])
    np.testing.assert_array_equal(parameters(shard), x)
    shard.thaw()
    vectors.do(2, [double])
    np.testing.assert_array_equal(parameters(shard), 2.0 * x)


# ── lists of operations ────────────────────────────────────────────────────────────────────────


def test_a_list_is_done_once_and_answered_again() -> None:
    x = vector(1)
    shard = shard_of(x)
    vectors = Vectors(shard, "float64")
    ops = [Combine(PARAMETERS, ((2.0, PARAMETERS),)), Dot(PARAMETERS, PARAMETERS)]
    first = vectors.do(1, ops)
    assert vectors.do(1, ops) == first
    np.testing.assert_array_equal(parameters(shard), 2.0 * x)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_list_that_is_out_of_turn_changes_nothing(number: int) -> None:
    x = vector(1)
    shard = shard_of(x)
    vectors = Vectors(shard, "float64")
    vectors.do(1, [SET_A])
    vectors.do(2, [SET_A])
    with pytest.raises(OutOfTurn):
        vectors.do(number, [Combine(PARAMETERS, ((2.0, "a"),))])
    np.testing.assert_array_equal(parameters(shard), x)


def test_a_list_that_comes_twice_at_once_is_done_once() -> None:
    """A call is repeated when its answer is late, while the first may still be under way."""
    x = np.ones(1 << 16)
    optimizer = optimizers.make("sgd", {"learning_rate": 1.0}, "float64")
    shard = Shard(x, 1 << 8, optimizer, rounds=True)
    vectors = Vectors(shard, "float64")
    ops = [Combine(PARAMETERS, ((2.0, PARAMETERS),)), Dot(PARAMETERS, PARAMETERS)]
    with ThreadPoolExecutor(4) as pool:
        for number in range(1, 6):
            answers = list(pool.map(lambda _: vectors.do(number, ops), range(4)))  # noqa: B023
            assert answers == [(4.0**number * x.size,)] * 4


def test_parts_that_are_missing() -> None:
    shard = shard_of(vector(1))
    vectors = Vectors(shard, "float64")
    with pytest.raises(Incomplete):
        vectors.do(1, [Gradient("g", 1, 1, 1.0)])
    contribute(shard, 1, 0, vector(2))
    with pytest.raises(Incomplete):
        vectors.do(1, [Gradient("g", 1, 2, 1.0)])
    assert vectors.do(1, [Gradient("g", 1, 1, 1.0), Dot("g", "g")])[0] > 0.0


def test_a_vector_that_does_not_exist() -> None:
    with pytest.raises(KeyError):
        Vectors(shard_of(vector(1)), "float64").do(1, [Dot("a", "a")])


# ── on the wire ────────────────────────────────────────────────────────────────────────────────

floats = st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(["x", "x0", "g", "gt", "d", "s0", "y12"])
lists = st.lists(
    st.one_of(
        st.builds(Combine, names, st.lists(st.tuples(floats, names), max_size=4).map(tuple)),
        st.builds(Dot, names, names),
        st.builds(Largest, names),
        st.builds(Gradient, names, st.integers(1), st.integers(1, 10**6), floats, floats),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(lists)
def test_operations_survive_the_wire_exactly(ops: list[Op]) -> None:
    there = from_json(json.loads(json.dumps(as_json(ops))))
    assert there == tuple(ops)
    assert [type(op) for op in there] == [type(op) for op in ops]
    assert repr(there) == repr(tuple(ops))  # -0.0 is not 0.0


def test_together_adds_and_compares() -> None:
    ops = [Dot("a", "b"), SET_A, Largest("a"), Dot("a", "a")]
    assert together(ops, [(1.0, 2.0, 3.0), (10.0, 5.0, 30.0), (0.5, 1.0, 0.25)]) == (
        11.5,
        5.0,
        33.25,
    )
    assert together([SET_A], [(), ()]) == ()
    with pytest.raises(ValueError, match="zip"):
        together(ops, [(1.0, 2.0)])
