"""The shard: its rules one by one, and exactly-once under every order of events.

The exactness workload: push j adds 1 to coordinate j of each block and to the block's witnesses, so
the parameters *are* the multiset of applied updates. `World` is a network that loses, repeats and
reorders, with workers that die and come back; `World.check` is the checker, and the mutants at the
end are shards with planted bugs that it must catch.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsgd_cli.engine.optimizers import Optimizer, make
from dsgd_cli.engine.shard import (
    Fenced,
    Frozen,
    Mismatched,
    NotFinite,
    OutOfOrder,
    PushRefused,
    RoundOver,
    Shard,
    Trained,
    all_finite,
)
from dsgd_cli.engine.staleness import Staleness
from dsgd_cli.engine.sums import Incomplete

Vector = np.ndarray[Any, Any]


def add(
    data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
) -> None:
    np.add(data, g, out=data)


SUM = Optimizer("sum", 0, (), add)


def shard_of(size: int, block: int, optimizer: Optimizer = SUM, dtype: str = "float32") -> Shard:
    return Shard(np.zeros(size, dtype), block, optimizer)


def values(shard: Shard, block: int, dtype: str = "float32") -> list[float]:
    return np.frombuffer(shard.read(block), dtype).tolist()


ONES = np.ones(4, np.float32)


# ---- the rules, one by one


def test_a_push_is_applied_once_and_repeats_are_skipped() -> None:
    shard = shard_of(10, 4)
    assert shard.blocks == 3
    assert shard.apply(3, 1, 1, 0, ONES) is True
    assert shard.apply(3, 1, 1, 0, ONES) is False
    assert shard.apply(3, 1, 2, 0, ONES) is True
    assert shard.apply(3, 1, 1, 0, ONES) is False  # late, too
    assert values(shard, 0) == [2, 2, 2, 2]
    assert (shard.version(0), shard.applied(3, 0)) == (2, (1, 2))


def test_blocks_and_workers_count_on_their_own() -> None:
    shard = shard_of(10, 4)
    shard.apply(0, 1, 1, 0, ONES)
    assert (shard.version(1), shard.applied(0, 1), shard.applied(1, 0)) == (0, (0, 0), (0, 0))
    shard.apply(1, 1, 1, 0, ONES)
    shard.apply(0, 1, 1, 2, ONES[:2])  # the last block is shorter
    assert [shard.version(b) for b in range(3)] == [2, 0, 1]
    assert values(shard, 2) == [1, 1]


@pytest.mark.parametrize("seq", [-1, 0, 2, 9])
def test_a_gap_is_refused_and_says_what_is_expected(seq: int) -> None:
    shard = shard_of(4, 4)
    with pytest.raises(OutOfOrder, match=r"worker/7: block 0 expects push 1") as caught:
        shard.apply(7, 1, seq, 0, ONES)
    assert caught.value.expected == 1
    assert values(shard, 0) == [0, 0, 0, 0]


def test_a_new_incarnation_starts_at_1_and_ends_the_old_one_everywhere() -> None:
    shard = shard_of(8, 4)
    shard.apply(0, 1, 1, 0, ONES)
    with pytest.raises(OutOfOrder):
        shard.apply(0, 2, 2, 0, ONES)
    assert shard.apply(0, 2, 1, 0, ONES)
    for block in (0, 1):
        with pytest.raises(Fenced, match="worker/0: incarnation 1 is over, now it is 2") as caught:
            shard.apply(0, 1, 1, block, ONES)
        assert caught.value.oldest == 2
    assert shard.apply(0, 2, 1, 1, ONES)
    assert shard.applied(0, 0) == shard.applied(0, 1) == (2, 1)


def test_the_fence_refuses_older_incarnations_and_never_goes_back() -> None:
    shard = shard_of(4, 4)
    shard.fence(0, 3)
    shard.fence(0, 2)
    with pytest.raises(Fenced):
        shard.apply(0, 2, 1, 0, ONES)
    assert shard.apply(1, 1, 1, 0, ONES)  # another worker
    assert shard.apply(0, 3, 1, 0, ONES)  # the fence itself is the new one


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_consumes_nothing(bad: float) -> None:
    for name in ("sgd", "momentum", "adagrad", "adam"):
        shard = shard_of(8, 4, make(name, {}, "float32"))
        twin = shard_of(8, 4, make(name, {}, "float32"))
        poison = ONES.copy()
        poison[2] = bad
        with pytest.raises(NotFinite, match="block 1: element 2 is") as caught:
            shard.apply(0, 1, 1, 1, poison)
        assert (caught.value.block, caught.value.element) == (1, 2)
        assert (shard.version(1), shard.applied(0, 1)) == (0, (0, 0))
        for one in (shard, twin):  # nothing of it is in the slots either
            assert one.apply(0, 1, 1, 1, ONES)
        assert values(shard, 1) == values(twin, 1)


def test_huge_finite_gradients_pass_though_their_squares_overflow() -> None:
    huge = np.full(4, 3e38, np.float32)
    with np.errstate(all="ignore"):
        assert all_finite(huge) and all_finite(huge.astype("float64"))
        assert not all_finite(np.array([1, np.nan]))
        assert not all_finite(np.array([np.inf, -np.inf]))
    for name in ("adagrad", "adam"):
        shard = shard_of(4, 4, make(name, {}, "float32"))
        assert shard.apply(0, 1, 1, 0, huge)
        assert np.isfinite(values(shard, 0)).all()


def test_the_wrong_block_size_or_dtype_is_refused() -> None:
    shard = shard_of(6, 4)
    for block, gradient, message in [
        (2, ONES, "block 2 of a shard with 2"),
        (-1, ONES, "block -1 of a shard with 2"),
        (0, ONES[:3], r"block 0 holds 4 elements of float32, got float32 of shape \(3,\)"),
        (1, ONES, r"block 1 holds 2 elements of float32, got float32 of shape \(4,\)"),
        (0, ONES.astype("float64"), "got float64"),
        (0, ONES.reshape(2, 2), r"of shape \(2, 2\)"),
        (0, ONES[:1], r"of shape \(1,\)"),  # would broadcast
    ]:
        with pytest.raises(Mismatched, match=message):
            shard.apply(0, 1, 1, block, gradient)
        with pytest.raises(Mismatched, match=message):
            shard.write(block, gradient)
    assert shard.apply(0, 1, 1, 0, ONES)


def test_a_frozen_shard_answers_repeats_and_refuses_the_rest() -> None:
    shard = shard_of(4, 4)
    shard.apply(0, 1, 1, 0, ONES)
    shard.freeze()
    assert shard.apply(0, 1, 1, 0, ONES) is False
    with pytest.raises(Frozen):
        shard.apply(0, 1, 2, 0, ONES)
    shard.thaw()
    assert shard.apply(0, 1, 2, 0, ONES)


def test_write_initialises_and_never_undoes_an_update() -> None:
    shard = shard_of(8, 4)
    shard.write(0, 5 * ONES)
    shard.write(0, 6 * ONES)  # another worker starts over
    assert (values(shard, 0), shard.version(0)) == ([6, 6, 6, 6], 0)
    shard.apply(0, 1, 1, 0, ONES)
    with pytest.raises(Trained):
        shard.write(0, 5 * ONES)
    with pytest.raises(NotFinite):
        shard.write(1, np.nan * ONES)
    shard.freeze()
    with pytest.raises(Frozen):
        shard.write(1, ONES)
    assert values(shard, 0) == [7, 7, 7, 7] and values(shard, 1) == [0, 0, 0, 0]


def test_read_gives_the_bytes_and_no_way_to_change_them() -> None:
    shard = shard_of(6, 4, dtype="float64")
    shard.write(1, np.array([1.0, 2.0]))
    view = shard.read(1)
    assert (view.readonly, view.format, len(view)) == (True, "B", 16)
    assert values(shard, 1, "float64") == [1, 2]


def test_each_block_has_its_own_time_and_slots() -> None:
    """Three blocks, trained apart, equal three shards of one block."""
    adam = make("adam", {"learning_rate": 0.1}, "float64")
    rng = np.random.default_rng(0)
    whole = shard_of(10, 4, adam, "float64")
    sizes = (4, 4, 2)
    alone = [shard_of(n, n, adam, "float64") for n in sizes]
    seqs = [0, 0, 0]
    for _ in range(40):
        block = int(rng.integers(3))
        g = rng.standard_normal(sizes[block])
        seqs[block] += 1
        whole.apply(0, 1, seqs[block], block, g)
        alone[block].apply(0, 1, seqs[block], 0, g)
    for block in range(3):
        assert whole.read(block) == alone[block].read(0)


def test_the_values_belong_to_the_shard() -> None:
    own = np.zeros(4, np.float32)
    shard = Shard(own, 4, SUM)
    shard.apply(0, 1, 1, 0, ONES)
    assert own.tolist() == [1, 1, 1, 1]  # not copied: a shard is as large as it is once
    for bad in (np.zeros((2, 2)), np.zeros(8)[::2], np.frombuffer(b"12345678"), np.zeros(0)):
        with pytest.raises(ValueError):
            Shard(bad, 4, SUM)


# ---- the learning rate


NAMES = ["sgd", "momentum", "adagrad", "adam"]


def by_hand(
    name: str, w: Vector, steps: list[Vector], rates: list[float], l2: float = 0.0
) -> Vector:
    """The rules with their defaults, in plain numpy."""
    v = np.full_like(w, 0.1 if name == "adagrad" else 0.0)
    m = np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(steps, rates, strict=True), start=1):
        g = g + l2 * w
        if name == "sgd":
            w = w - 0.01 * rate * g
        elif name == "momentum":
            v = 0.9 * v + g
            w = w - 0.01 * rate * v
        elif name == "adagrad":
            v = v + g**2
            w = w - 0.05 * rate * g / (np.sqrt(v) + 1e-7)
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = w - 0.001 * rate * step
    return w


def pushed(shard: Shard, steps: list[Vector], before: Callable[[int], object]) -> Vector:
    """What the shard holds after these; `before` each push something happens."""
    for seq, g in enumerate(steps, start=1):
        before(seq)
        start = 0
        for block, size in enumerate(shard.sizes):
            assert shard.apply(0, 1, seq, block, g[start : start + size])
            start += size
    held = [np.frombuffer(shard.read(block), "float64") for block in range(shard.blocks)]
    return np.concatenate(held)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("l2", [0.0, 0.2])
def test_schedule_and_set_rate_and_l2_equal_plain_numpy(name: str, l2: float) -> None:
    rng = np.random.default_rng(3)
    first, steps = rng.standard_normal(10), [rng.standard_normal(10) for _ in range(6)]
    schedule = {1: 1.0, 2: 0.5, 3: 0.5, 4: 0.25, 5: 0.0, 6: 1.0}
    shard = Shard(first.copy(), 4, make(name, {}, "float64", l2), rate=schedule.__getitem__)
    outside = {1: 1.0, 2: 1.0, 3: 0.1, 4: 0.1, 5: 0.1, 6: 0.5}
    found = pushed(shard, steps, lambda seq: shard.set_rate(outside[seq]))
    rates = [schedule[t] * outside[t] for t in schedule]
    np.testing.assert_allclose(found, by_hand(name, first, steps, rates, l2), rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_commit_follows_the_schedule_too(name: str) -> None:
    rng = np.random.default_rng(3)
    first, steps = rng.standard_normal(6), [rng.standard_normal(6) for _ in range(4)]
    optimizer = make(name, {}, "float64", 0.1)
    shard = Shard(first.copy(), 6, optimizer, rate=lambda update: 1 / update, rounds=True)
    for round_, g in enumerate(steps, start=1):
        for part in (0, 1):
            shard.contribute(part, 1, round_, part, 0, g)
        shard.commit(round_, 2, 0.5)
    found = np.frombuffer(shard.read(0), "float64")
    rates = [1 / update for update in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, by_hand(name, first, steps, rates, 0.1), rtol=1e-10)


# ---- what comes late


def test_an_update_of_fewer_parts_advances_the_schedule_by_less() -> None:
    """Where a host is at the end of its examples, a step is of what the others have."""
    seen: list[float] = []

    def rate(update: float) -> float:
        seen.append(update)
        return 1.0

    shard = Shard(np.zeros(4), 2, SUM, rate=rate, rounds=True, usual_parts=4)
    for round_, parts in enumerate((4, 2, 2, 1, 4, 4), start=1):
        for part in range(parts):
            for block in range(2):
                shard.contribute(part, 1, round_, part, block, np.ones(2))
        for _ in range(2):  # repeated
            shard.commit(round_, parts, 1.0)
    assert seen[::2] == seen[1::2] == [1, 2, 2.5, 3, 3.25, 4.25]


def late_shard(staleness: Staleness, optimizer: Optimizer = SUM) -> Shard:
    return Shard(np.zeros(10, np.float32), 4, optimizer, staleness=staleness)


PARTS = [ONES, ONES, ONES[:2]]


def push(shard: Shard, worker: int, seq: int, base: int) -> None:
    for block, part in enumerate(PARTS):
        shard.push(worker, 1, seq, block, part, base=base)


@pytest.mark.parametrize("name", ["sum", *NAMES])
def test_a_push_that_is_too_late_takes_its_seq_and_changes_nothing(name: str) -> None:
    optimizer = SUM if name == "sum" else make(name, {}, "float32")
    shard, twin = late_shard(Staleness(most=1), optimizer), late_shard(Staleness(), optimizer)
    for one in (shard, twin):
        push(one, 1, 1, base=0)
        push(one, 1, 2, base=1)
    before = [bytes(shard.read(block)) for block in range(3)]
    push(shard, 0, 1, base=0)  # 2 late
    assert [bytes(shard.read(block)) for block in range(3)] == before
    assert [shard.version(block) for block in range(3)] == [2, 2, 2]
    assert [shard.applied(0, block) for block in range(3)] == [(1, 1)] * 3
    assert shard.dropped(0, 1, 1)
    assert shard.apply(0, 1, 1, 0, ONES, 0) is False  # a repeat is answered alike
    assert shard.dropped(0, 1, 1)
    for one, seq in ((shard, 2), (twin, 1)):
        push(one, 0, seq, base=1)
    assert not shard.dropped(0, 1, 2)
    for block in range(3):  # nothing of it is in the slots either
        assert shard.read(block) == twin.read(block)


def test_all_blocks_of_a_push_are_judged_by_the_first() -> None:
    shard = late_shard(Staleness(most=0))
    shard.apply(0, 1, 1, 0, ONES, 0)  # in time
    push(shard, 1, 1, base=1)  # another one comes in between
    for block in (1, 2):
        shard.apply(0, 1, 1, block, PARTS[block], 0)
    assert [shard.version(block) for block in range(3)] == [2, 2, 2]
    shard.apply(0, 1, 2, 0, ONES, 0)  # late
    for block in (1, 2):
        shard.apply(0, 1, 2, block, PARTS[block], 99)
    assert [shard.version(block) for block in range(3)] == [2, 2, 2]
    assert shard.dropped(0, 1, 2)


def test_a_refused_push_is_not_judged() -> None:
    shard = late_shard(Staleness(most=0))
    push(shard, 1, 1, base=0)
    shard.freeze()
    with pytest.raises(Frozen):
        shard.apply(0, 1, 1, 0, ONES, 0)
    assert not shard.dropped(0, 1, 1)
    shard.thaw()
    shard.apply(0, 1, 1, 0, ONES, 1)
    assert shard.version(0) == 2


@pytest.mark.parametrize("name", NAMES)
def test_damping_multiplies_the_learning_rate(name: str) -> None:
    rng = np.random.default_rng(3)
    first, steps = rng.standard_normal(4), [rng.standard_normal(4) for _ in range(3)]
    optimizer = make(name, {}, "float64")
    shard = Shard(first.copy(), 4, optimizer, staleness=Staleness(damping="inverse"))
    shard.set_rate(0.5)
    for seq, (g, base) in enumerate(zip(steps, (0, -1, -2), strict=True), start=1):
        shard.apply(0, 1, seq, 0, g, base)  # 0, 2 and 4 late
    found = np.frombuffer(shard.read(0), "float64")
    expected = by_hand(name, first, steps, [0.5, 0.25, 0.125])
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_shard_that_judges_nothing_drops_nothing() -> None:
    for staleness in (None, Staleness()):
        shard = Shard(np.zeros(4, np.float32), 4, SUM, staleness=staleness)
        assert not shard.judges
        shard.apply(0, 1, 1, 0, ONES, -1000)
        assert not shard.dropped(0, 1, 1)
        assert shard.version(0) == 1
    assert late_shard(Staleness(most=0)).judges


# ---- exactly once, whatever happens

WORKERS, BLOCKS, WITNESSES, PUSHES = 3, 3, 4, 40
BLOCK = PUSHES + WITNESSES


class Violation(AssertionError):
    """The checker's verdict."""


class Message(NamedTuple):
    worker: int
    incarnation: int
    seq: int
    block: int
    push: int  # the logical push j, or -1: poison (NaN)


class World:
    """Workers, a bad network and one shard; every method is one event."""

    def __init__(self, make_shard: Callable[[Vector, int, Optimizer], Shard], dtype: str) -> None:
        self.dtype = dtype
        # sgd with -lr = 1 is w += g, through the code that trains
        sgd = make("sgd", {"learning_rate": 1}, dtype)
        self.shard = make_shard(np.zeros(BLOCKS * BLOCK, dtype), BLOCK, sgd)
        self.network: list[Message] = []
        self.incarnation = [1] * WORKERS
        self.pushes: list[list[int]] = [[] for _ in range(WORKERS)]  # of the present incarnation
        self.fences = [0] * WORKERS
        self.invoked = 0
        self.acked: set[tuple[int, int]] = set()  # (push, block)
        self.refused_only: dict[tuple[int, int], bool] = {}
        self.log: dict[tuple[int, int, int], list[int]] = {}  # (worker, incarnation, block): seqs
        self.order: dict[tuple[int, int], list[int]] = {}  # (worker, block): incarnations
        self.frozen = False

    def push(self, worker: int) -> None:
        """A new gradient; it may be sent before the last one is acknowledged."""
        if self.invoked == PUSHES:
            return
        self.pushes[worker].append(self.invoked)
        self.invoked += 1
        self.send(worker, len(self.pushes[worker]))

    def send(self, worker: int, seq: int) -> None:
        """Sends (again) the worker's push `seq`, one message per block."""
        if 1 <= seq <= len(self.pushes[worker]):
            push = self.pushes[worker][seq - 1]
            for block in range(BLOCKS):
                self.network.append(Message(worker, self.incarnation[worker], seq, block, push))

    def poison(self, worker: int, block: int) -> None:
        seq = len(self.pushes[worker]) + 1
        self.network.append(Message(worker, self.incarnation[worker], seq, block, -1))

    def restart(self, worker: int, fenced: bool) -> None:
        """A new incarnation; what the old one sent stays in the network."""
        self.incarnation[worker] += 1
        self.pushes[worker] = []
        if fenced:
            self.shard.fence(worker, self.incarnation[worker])
            self.fences[worker] = self.incarnation[worker]

    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        (self.shard.freeze if frozen else self.shard.thaw)()

    def gradient(self, push: int) -> Vector:
        g = np.zeros(BLOCK, self.dtype)
        if push < 0:
            g[3] = np.nan
        else:
            g[[push, *range(PUSHES, BLOCK)]] = -1
        return g

    def deliver(self, index: int, keep: bool) -> None:
        """One message arrives; kept, it will arrive again."""
        if not self.network:
            return
        index %= len(self.network)
        message = self.network[index] if keep else self.network.pop(index)
        self.arrive(message)

    def arrive(self, m: Message) -> None:
        try:
            fresh = self.shard.apply(m.worker, m.incarnation, m.seq, m.block, self.gradient(m.push))
        except PushRefused as error:
            self.refused_only.setdefault((m.push, m.block), True)
            stale = m.incarnation < self.fences[m.worker]
            if stale != isinstance(error, Fenced):
                raise Violation(f"fence: {m}: {error!r}") from error
            return
        if m.push < 0:
            if fresh:  # as a repeat, it is only late: its seq went to a good push
                raise Violation(f"poison applied: {m}")
            return
        self.refused_only[m.push, m.block] = False
        self.acked.add((m.push, m.block))
        if m.incarnation < self.fences[m.worker]:
            raise Violation(f"zombie accepted: {m}")
        self.fences[m.worker] = max(self.fences[m.worker], m.incarnation)
        if fresh:
            if self.frozen:
                raise Violation(f"frozen, but applied: {m}")
            self.log.setdefault((m.worker, m.incarnation, m.block), []).append(m.seq)
            self.order.setdefault((m.worker, m.block), []).append(m.incarnation)

    def check(self) -> None:
        """P1-P4, P6, P8 and P12 of the exactness checker, after each event."""
        for block in range(BLOCKS):
            w = np.frombuffer(self.shard.read(block), self.dtype)
            m, witnesses = w[:PUSHES], w[PUSHES:]
            for push in range(PUSHES):
                if (push, block) in self.acked and not m[push] >= 1:
                    raise Violation(f"P1 lost: push {push}, block {block}")
                if not m[push] <= 1:
                    raise Violation(f"P2 applied {m[push]} times: push {push}, block {block}")
                if m[push] and push >= self.invoked:
                    raise Violation(f"P3 phantom: push {push}, block {block}")
                if m[push] and self.refused_only.get((push, block), True):
                    raise Violation(f"P4 refused, but applied: push {push}, block {block}")
            if not (witnesses == self.shard.version(block)).all() or witnesses[0] != m.sum():
                raise Violation(f"P8 torn: block {block}")
        for key, seqs in self.log.items():
            if seqs != list(range(1, len(seqs) + 1)):
                raise Violation(f"P6 order: {key}: {seqs}")
        for key2, incarnations in self.order.items():
            if incarnations != sorted(incarnations):
                raise Violation(f"P12 writers: {key2}: {incarnations}")

    def heal(self) -> None:
        """Everybody retries to the end: all of the living's pushes are there, exactly once."""
        self.freeze(False)
        for worker in range(WORKERS):
            for seq, push in enumerate(self.pushes[worker], start=1):
                for block in range(BLOCKS):
                    self.arrive(Message(worker, self.incarnation[worker], seq, block, push))
        self.check()
        for worker in range(WORKERS):
            for push in self.pushes[worker]:
                for block in range(BLOCKS):
                    if (push, block) not in self.acked:
                        raise Violation(f"L1 stuck: push {push}, block {block}")
        for block in range(BLOCKS):  # the sum is exact: acknowledged = applied
            total = np.frombuffer(self.shard.read(block), self.dtype)[:PUSHES]
            expected = np.zeros(PUSHES)
            expected[[push for push, b in self.acked if b == block]] = 1
            if (total != expected).any():
                raise Violation(f"the sum of block {block} is wrong")


workers = st.integers(0, WORKERS - 1)


class ExactlyOnce(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(Shard, "float32")

    @rule(worker=workers)
    def push(self, worker: int) -> None:
        self.world.push(worker)

    @rule(worker=workers, back=st.integers(0, 3))
    def retry(self, worker: int, back: int) -> None:
        self.world.send(worker, len(self.world.pushes[worker]) - back)

    @precondition(lambda self: self.world.network)
    @rule(index=st.integers(0, 500), keep=st.booleans())
    def deliver(self, index: int, keep: bool) -> None:
        self.world.deliver(index, keep)

    @precondition(lambda self: self.world.network)
    @rule(count=st.integers(1, 12))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.world.network))):
            self.world.deliver(0, keep=False)

    @precondition(lambda self: self.world.network)
    @rule(index=st.integers(0, 500))
    def lose(self, index: int) -> None:
        self.world.network.pop(index % len(self.world.network))

    @rule(worker=workers, block=st.integers(0, BLOCKS - 1))
    def poison(self, worker: int, block: int) -> None:
        self.world.poison(worker, block)

    @rule(worker=workers, fenced=st.booleans())
    def restart(self, worker: int, fenced: bool) -> None:
        self.world.restart(worker, fenced)

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        self.world.freeze(frozen)

    @invariant()
    def exact(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.heal()


ExactlyOnce.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestExactlyOnce = ExactlyOnce.TestCase


def schedule(
    make_shard: Callable[[Vector, int, Optimizer], Shard], seed: int, dtype: str = "float32"
) -> None:
    """One seeded random schedule of about 150 events."""
    world, rng = World(make_shard, dtype), random.Random(seed)
    for _ in range(150):
        worker = rng.randrange(WORKERS)
        dice = rng.random()
        if dice < 0.12:
            world.push(worker)
        elif dice < 0.20:
            world.send(worker, len(world.pushes[worker]) - rng.randrange(3))
        elif dice < 0.60:
            world.deliver(0, keep=rng.random() < 0.2)
        elif dice < 0.88:
            world.deliver(rng.randrange(1000), keep=rng.random() < 0.3)
        elif dice < 0.92 and world.network:
            world.network.pop(rng.randrange(len(world.network)))
        elif dice < 0.94:
            world.poison(worker, rng.randrange(BLOCKS))
        elif dice < 0.97:
            world.restart(worker, fenced=rng.random() < 0.5)
        else:
            world.freeze(rng.random() < 0.3)
    world.check()
    world.heal()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_random_schedules_are_exact(dtype: str) -> None:
    for seed in range(300):
        schedule(Shard, seed, dtype)


# ---- planted bugs


class AppliesRepeats(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        last = self.applied(worker, block)
        if last[0] == incarnation and 1 <= seq <= last[1]:
            self._applied[block][worker] = (incarnation, seq - 1)
        return super().apply(worker, incarnation, seq, block, gradient)


class ForgetsIncarnations(Shard):
    """The worker comes back with seq 1 and is taken for a repeat."""

    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        last = self.applied(worker, block)
        if incarnation > last[0] and 1 <= seq <= last[1]:
            return False
        return super().apply(worker, incarnation, seq, block, gradient)


class HasNoFence(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        self._fence.clear()
        return super().apply(worker, incarnation, seq, block, gradient)


class IgnoresTheCoordinator(Shard):
    def fence(self, worker: int, incarnation: int) -> None:
        pass


class FencesBlockByBlock(Shard):
    """The old incarnation may still write to blocks that the new one has not reached."""

    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        kept = dict(self._fence)
        fresh = super().apply(worker, incarnation, seq, block, gradient)
        self._fence = kept
        return fresh


class AcceptsGaps(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        last = self.applied(worker, block)
        if last[0] == incarnation and seq > last[1] + 1:
            self._applied[block][worker] = (incarnation, seq - 1)
        return super().apply(worker, incarnation, seq, block, gradient)


class ConsumesRefusedPushes(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        try:
            return super().apply(worker, incarnation, seq, block, gradient)
        except NotFinite:
            self._applied[block][worker] = (incarnation, seq)
            raise


class CountsPerShard(Shard):
    """One (incarnation, seq) for all blocks: a torn push is never completed."""

    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        fresh = super().apply(worker, incarnation, seq, block, gradient)
        for other in range(self.blocks):
            self._applied[other][worker] = (incarnation, seq)
        return fresh


class ChecksTooLate(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        try:
            return super().apply(worker, incarnation, seq, block, gradient)
        except NotFinite:
            self._data[block] -= gradient
            raise


class CountsRepeatsAsUpdates(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        fresh = super().apply(worker, incarnation, seq, block, gradient)
        self._version[block] += not fresh
        return fresh


class AcknowledgesWhileFrozen(Shard):
    def apply(self, worker: int, incarnation: int, seq: int, block: int, gradient: Vector) -> bool:
        try:
            return super().apply(worker, incarnation, seq, block, gradient)
        except Frozen:
            return False


class IgnoresFreeze(Shard):
    def freeze(self) -> None:
        pass


MUTANTS = [
    AppliesRepeats,
    ForgetsIncarnations,
    HasNoFence,
    IgnoresTheCoordinator,
    FencesBlockByBlock,
    AcceptsGaps,
    ConsumesRefusedPushes,
    CountsPerShard,
    ChecksTooLate,
    CountsRepeatsAsUpdates,
    AcknowledgesWhileFrozen,
    IgnoresFreeze,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checker_catches_a_planted_bug(mutant: type[Shard]) -> None:
    for seed in range(300):
        try:
            schedule(mutant, seed)
        except Violation:
            return
    pytest.fail(f"{mutant.__name__} survived")


# ---- threads


def test_threads_lose_no_update_and_read_no_torn_block() -> None:
    """numpy lets other threads run in the middle of an update; the block's lock does not."""
    elements, pushes, workers = 1 << 16, 60, 4
    shard = shard_of(2 * elements, elements)
    ones, torn = np.ones(elements, np.float32), []

    def look(values: memoryview) -> None:
        seen = np.frombuffer(values, np.float32)
        if seen.min() != seen.max():
            torn.append(seen.copy())

    def push(worker: int) -> None:
        for seq in range(1, pushes + 1):
            for block in range(2):
                shard.push(worker, 1, seq, block, ones, look)

    threads = [threading.Thread(target=push, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not torn
    assert values(shard, 0) == values(shard, 1) == [workers * pushes] * elements
    assert [shard.version(block) for block in range(2)] == [workers * pushes] * 2


@pytest.mark.parametrize("barrier", ["fence", "freeze"])
def test_fence_and_freeze_wait_for_the_update_under_way(barrier: str) -> None:
    begun, proceed = threading.Event(), threading.Event()

    def slow(
        data: Vector, slots: tuple[Vector, ...], g: Vector, scratch: Vector, t: int, rate: float
    ) -> None:
        begun.set()
        assert proceed.wait(10)
        np.add(data, g, out=data)

    shard = shard_of(8, 4, Optimizer("slow", 0, (), slow))
    pusher = threading.Thread(target=shard.apply, args=(0, 1, 1, 1, ONES))
    pusher.start()
    assert begun.wait(10)
    action = shard.freeze if barrier == "freeze" else lambda: shard.fence(0, 2)
    closer = threading.Thread(target=action)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()  # it must not return before the update is over
    with pytest.raises(Frozen if barrier == "freeze" else Fenced):
        shard.apply(0, 1, 1, 0, ONES)  # and nothing new begins meanwhile
    proceed.set()
    closer.join(10)
    pusher.join(10)
    assert values(shard, 1) == [1, 1, 1, 1]


# ---- contributions to a round


def summing(size: int, block: int, optimizer: Optimizer = SUM, dtype: str = "float32") -> Shard:
    return Shard(np.zeros(size, dtype), block, optimizer, rounds=True)


def test_a_commit_is_one_update_by_the_scaled_sum_of_all_parts() -> None:
    shard = summing(6, 4)
    for part, times in enumerate((1, 2, 4)):
        for block, size in ((0, 4), (1, 2)):
            assert shard.contribute(part, 1, 1, part, block, times * ONES[:size])
    assert values(shard, 0) == [0, 0, 0, 0]  # nothing is in the parameters before
    shard.commit(1, 3, 0.5)
    assert values(shard, 0) == [3.5] * 4 and values(shard, 1) == [3.5] * 2
    assert [shard.version(block) for block in (0, 1)] == [1, 1]
    assert shard.applied(0, 0) == (0, 0)  # a contribution is no push


def test_contributions_and_commits_may_be_repeated() -> None:
    shard = summing(4, 4)
    assert shard.contribute(0, 1, 1, 0, 0, ONES) is True
    assert shard.contribute(0, 1, 1, 0, 0, ONES) is False
    shard.commit(1, 1, 2.0)
    shard.commit(1, 1, 2.0)
    assert (values(shard, 0), shard.version(0)) == ([2, 2, 2, 2], 1)
    with pytest.raises(RoundOver, match="worker/0: round 1 is over, now it is 2"):
        shard.contribute(0, 1, 1, 0, 0, ONES)
    assert shard.contribute(0, 1, 2, 0, 0, ONES)
    shard.commit(1, 1, 2.0)  # late, too
    assert (values(shard, 0), shard.version(0)) == ([2, 2, 2, 2], 1)


def test_a_round_that_is_tried_again_has_nothing_of_the_first_try() -> None:
    shard = summing(8, 4)
    shard.contribute(0, 1, 1, 0, 0, 5 * ONES)
    shard.contribute(1, 1, 1, 1, 0, 7 * ONES)  # dies before it has reached block 1
    for block in (0, 1):
        assert shard.contribute(0, 1, 2, 0, block, 5 * ONES)
        with pytest.raises(RoundOver, match="worker/1: round 1 is over, now it is 2"):
            shard.contribute(1, 1, 1, 1, block, 7 * ONES)
        assert shard.contribute(2, 1, 2, 2, block, ONES)
    shard.commit(2, 2, 1.0)
    assert values(shard, 0) == values(shard, 1) == [6, 6, 6, 6]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_commit_of_other_parts_than_there_are_changes_nothing_from_there_on(parts: int) -> None:
    shard = summing(8, 4)
    for part in range(2):
        shard.contribute(part, 1, 1, part, 1, ONES)
    for part in range(parts):
        shard.contribute(part, 1, 1, part, 0, ONES)
    for ask in (shard.commit, shard.squares):
        with pytest.raises(Incomplete, match=f"block 1: 2 of {parts} parts of round 1"):
            ask(1, parts, 1.0)
    assert (values(shard, 0), shard.version(0)) == ([parts] * 4, 1)
    assert (values(shard, 1), shard.version(1)) == ([0, 0, 0, 0], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_part_that_is_not_finite_is_refused_and_is_not_in_the_sum(bad: float) -> None:
    shard = summing(4, 4)
    poison = ONES.copy()
    poison[3] = bad
    with pytest.raises(NotFinite, match="block 0: element 3 is"):
        shard.contribute(0, 1, 1, 0, 0, poison)
    assert shard.contribute(0, 1, 1, 0, 0, ONES)  # its part is not taken
    with pytest.raises(NotFinite):
        shard.contribute(1, 1, 2, 0, 0, poison)  # and it begins no round
    shard.commit(1, 1, 1.0)
    assert values(shard, 0) == [1, 1, 1, 1]


def test_a_contribution_of_the_wrong_block_size_or_dtype_is_refused() -> None:
    shard = summing(6, 4)
    for block, gradient in [(2, ONES), (0, ONES[:3]), (1, ONES), (0, ONES.astype("float64"))]:
        with pytest.raises(Mismatched):
            shard.contribute(0, 1, 1, 0, block, gradient)
    with pytest.raises(Mismatched, match="this run has no rounds"):
        shard_of(4, 4).contribute(0, 1, 1, 0, 0, ONES)
    with pytest.raises(Mismatched, match="this run has no rounds"):
        shard_of(4, 4).commit(1, 1, 1.0)


def test_a_fenced_incarnation_contributes_nothing_more() -> None:
    shard = summing(4, 4)
    assert shard.contribute(0, 1, 1, 0, 0, ONES)
    shard.fence(0, 2)
    for part in (0, 1):  # not even what is there already
        with pytest.raises(Fenced, match="worker/0: incarnation 1 is over, now it is 2"):
            shard.contribute(0, 1, 1, part, 0, ONES)
    assert shard.contribute(0, 2, 1, 1, 0, ONES)
    shard.commit(1, 2, 1.0)  # what the dead had contributed counts
    assert values(shard, 0) == [2, 2, 2, 2]


def test_a_frozen_shard_sums_and_commits_nothing() -> None:
    shard = summing(8, 4)
    for block in (0, 1):
        shard.contribute(0, 1, 1, 0, block, ONES)
    shard.freeze()
    with pytest.raises(Frozen):
        shard.commit(1, 1, 3.0)
    assert shard.contribute(1, 1, 1, 1, 0, ONES)
    assert shard.contribute(1, 1, 1, 1, 1, ONES)
    assert shard.squares(1, 2, 1.0) == 4 * 8
    shard.thaw()
    shard.commit(1, 2, 3.0)
    assert values(shard, 0) == values(shard, 1) == [6, 6, 6, 6]
    shard.freeze()
    shard.commit(1, 2, 3.0)  # it is made already: there is nothing to refuse


def test_squares_are_those_of_the_scaled_sum_in_double_precision() -> None:
    huge = np.full(4, 1e25, np.float32)  # their squares overflow
    shard = summing(6, 4)
    shard.contribute(0, 1, 1, 0, 0, huge)
    shard.contribute(0, 1, 1, 0, 1, huge[:2])
    assert math.isclose(shard.squares(1, 1, 0.5), 6 * 0.25e50, rel_tol=1e-6)
    assert math.isclose(shard.squares(1, 1, 0.5), 6 * 0.25e50, rel_tol=1e-6)  # and stay so
    shard.commit(1, 1, 1e-25)
    assert np.allclose(values(shard, 0), 1.0)


def test_a_commit_steps_the_optimizer_once_by_the_mean() -> None:
    """N workers are one with a batch N times as large, whatever the optimizer."""
    rng = np.random.default_rng(0)
    for name in ("sgd", "momentum", "adagrad", "adam"):
        shard = summing(10, 4, make(name, {}, "float64"), "float64")
        alone = shard_of(10, 4, make(name, {}, "float64"), "float64")
        for round_ in range(1, 6):
            gradients = rng.integers(-8, 8, (4, 10)).astype("float64")  # sums of them are exact
            for block, part in ((b, slice(4 * b, 4 * b + 4)) for b in range(3)):
                for who in rng.permutation(4):
                    shard.contribute(who, 1, round_, int(who), block, gradients[who, part])
                alone.apply(0, 1, round_, block, gradients.mean(0)[part])
            shard.commit(round_, 4, 0.25)
        for block in range(3):
            assert values(shard, block, "float64") == values(alone, block, "float64")


def test_threads_contribute_at_once_and_the_sum_is_exact() -> None:
    """Each part comes from two threads: whoever is second finds it there."""
    elements, blocks, rounds, parts = 1 << 15, 3, 8, 4
    shard = summing(blocks * elements, elements, dtype="float64")
    new: list[bool] = []
    barrier = threading.Barrier(2 * parts)

    def contribute(part: int, first: int) -> None:
        gradient = np.full(elements, 10.0**part)
        for round_ in range(1, rounds + 1):
            for block in range(blocks):
                block = (block + first) % blocks
                new.append(shard.contribute(part, 1, round_, part, block, gradient))
            if barrier.wait(60) == 0:
                shard.commit(round_, parts, 1.0)
            barrier.wait(60)

    threads = [
        threading.Thread(target=contribute, args=(number % parts, number))
        for number in range(2 * parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(new) == parts * blocks * rounds
    for block in range(blocks):
        assert np.unique(shard.values(block)).tolist() == [1111.0 * rounds]
        assert shard.version(block) == rounds


def test_threads_that_commit_at_once_make_one_update() -> None:
    elements = 1 << 16
    shard = summing(2 * elements, elements)
    for block in (0, 1):
        shard.contribute(0, 1, 1, 0, block, np.ones(elements, np.float32))
    threads = [threading.Thread(target=shard.commit, args=(1, 1, 3.0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert np.unique([shard.values(0), shard.values(1)]).tolist() == [3.0]
    assert [shard.version(block) for block in (0, 1)] == [1, 1]
