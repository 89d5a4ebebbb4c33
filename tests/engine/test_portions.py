"""Portions of a pass: each counts once, whoever dies, is late, or does it twice."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.portions import LATE, Paces, Portions

LONG_S = 1e6
WORKERS = st.integers(0, 3)


class World(RuleBasedStateMachine):
    """Workers that take portions, do them in any order, or not, and die."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.portions = Portions(Partitions.whole(40), [9])
        self.held: dict[int, set[int]] = {}  # what each worker has; it may be done meanwhile
        self.counted: Counter[int] = Counter()
        self.last: dict[int, int] = {}

    def free(self) -> set[int]:
        out = set().union(*self.held.values()) if self.held else set()
        return set(range(9)) - set(self.counted) - out

    def holders(self, portion: int) -> list[int]:
        return [worker for worker, held in self.held.items() if portion in held]

    @rule(worker=WORKERS)
    def take(self, worker: int) -> None:
        free = self.free()
        portion = self.portions.next(worker, self.now_s)
        if portion is None:
            assert not free, "there is work, and somebody who wants it"
            return
        assert portion not in self.counted, "it is done"
        assert portion not in self.held.get(worker, ()), "a copy for who has it already"
        if free:
            assert portion in free, "a second copy while others have not begun"
            follows = self.last.get(worker, -2) + 1
            assert follows not in free or portion == follows
        assert len(self.holders(portion)) < 2
        self.held.setdefault(worker, set()).add(portion)
        self.last[worker] = portion

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def do(self, data: st.DataObject) -> None:
        having = [(worker, n) for worker, held in self.held.items() for n in sorted(held)]
        worker, portion = data.draw(st.sampled_from(having))
        self.held[worker].remove(portion)
        others = set(self.holders(portion))
        counts, late = self.portions.done(worker, portion, self.now_s)
        assert counts == (portion not in self.counted)
        assert set(late) == (others if counts else set())
        if counts:
            self.counted[portion] += 1

    @rule(worker=WORKERS)
    def die(self, worker: int) -> None:
        self.portions.leave(worker)
        self.held.pop(worker, None)
        self.last.pop(worker, None)

    @rule(seconds=st.sampled_from([0.1, 1.0, LONG_S]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def what_only_the_dead_had_is_free(self) -> None:
        assert self.portions.free() == len(self.free())

    @invariant()
    def complete_when_each_has_counted(self) -> None:
        assert self.portions.complete == (len(self.counted) == 9)
        assert set(self.counted.values()) <= {1}

    def teardown(self) -> None:
        """Whatever happened: one who lives, and time, are enough."""
        for worker in range(3):
            self.die(worker)
        for portion in sorted(self.held.get(3, ())):
            self.portions.done(3, portion, self.now_s)
        while (portion := self.portions.next(3, self.now_s)) is not None:
            self.portions.done(3, portion, self.now_s)
        assert self.portions.complete


World.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_portions_are_a_partition(examples: int, count: int) -> None:
    portions = Portions(Partitions.whole(examples), [count])
    assert portions.count == portions.free() == min(examples, count)
    bounds = [portions.bounds(n) for n in range(portions.count)]
    assert (bounds[0][0], bounds[-1][1]) == (0, examples)
    assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 2**32))
def test_whoever_does_them_in_whatever_order_it_ends(workers: int, count: int, seed: int) -> None:
    rng, portions = random.Random(seed), Portions(Partitions.whole(count), [count])
    held: list[tuple[int, int]] = []
    counted: Counter[int] = Counter()
    while not portions.complete:
        worker = rng.randrange(workers)
        portion = portions.next(worker, 0.0)
        if portion is not None:
            held.append((worker, portion))
        if held and (portion is None or rng.random() < 0.5):
            who, what = held.pop(rng.randrange(len(held)))
            counted[what] += portions.done(who, what, 0.0)[0]
    assert counted == Counter(range(count))


def test_a_worker_gets_what_follows() -> None:
    """Of each worker's portions all but the last few follow on one another."""
    portions = Portions(Partitions.whole(40), [40])
    taken: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for turn in range(30):
        portion = portions.next(turn % 3, float(turn))
        assert portion is not None
        taken[turn % 3].append(portion)
    assert taken[0] == list(range(10))
    assert all(after == before + 1 for row in taken.values() for before, after in pairwise(row))


def slow_and_done() -> Portions:
    """Of four portions worker 0 has done three in 1 s each, worker 1 has had one since 0 s."""
    portions = Portions(Partitions.whole(8), [4])
    slow = portions.next(1, 0.0)
    assert slow == 0
    for second in range(3):
        portion = portions.next(0, float(second))
        assert portion is not None
        portions.done(0, portion, second + 1.0)
    return portions


def test_a_late_portion_is_given_to_a_second_worker_only() -> None:
    portions = slow_and_done()
    assert portions.next(0, LATE) is None, "not late yet"
    assert portions.next(1, 3.0) is None, "it has it itself"
    assert portions.next(0, 3.0) == 0
    assert portions.next(0, 100.0) is None
    assert portions.next(2, 100.0) is None, "two have it"


def test_the_first_copy_counts_and_the_others_are_named() -> None:
    portions = slow_and_done()
    portions.next(0, 3.0)
    assert portions.done(0, 0, 4.0) == (True, (1,))
    assert portions.complete
    assert portions.done(1, 0, 9.0) == (False, ())


def test_a_copy_stays_out_when_the_other_dies() -> None:
    portions = slow_and_done()
    portions.next(0, 3.0)
    portions.leave(1)
    assert portions.free() == 0
    portions.leave(0)
    assert portions.free() == 1


def test_who_comes_back_begins_where_there_is_most_to_do() -> None:
    portions = Portions(Partitions.whole(10), [10])
    assert [portions.next(0, 0.0), portions.next(1, 0.0)] == [0, 5]
    portions.leave(0)
    assert portions.next(0, 1.0) == 0, "it has lost what it had, and needs nothing that follows"


@pytest.mark.parametrize("longer", [1, 2])
def test_the_copy_is_of_what_is_out_for_longest(longer: int) -> None:
    portions = Portions(Partitions.whole(3), [3])
    assert portions.next(0, 0.0) == 0
    portions.done(0, 0, 1.0)
    since = {1: 2.0, 2: 2.0} | {longer: 1.0}
    taken = {worker: portions.next(worker, since[worker]) for worker in (longer, 3 - longer)}
    assert portions.next(0, 50.0) == taken[longer]


def world_of(paces: dict[int, float], portions: int) -> Portions:
    """Nobody has anything; all begin at 0 s."""
    known = Paces()
    for worker, pace_s in paces.items():
        known.done(worker, -pace_s, 0.0)
    return Portions(Partitions.whole(portions), [portions], known)


def test_what_a_slow_worker_will_do_last_is_done_by_a_fast_one_at_once() -> None:
    portions = world_of({0: 1.0, 1: 5.0}, 2)
    assert [portions.next(1, 0.0), portions.next(1, 0.0)] == [0, 1]
    assert portions.next(0, 0.0) == 1, "the one that would be done after 10 s"
    assert portions.next(0, 0.0) == 0, "and then the one that would be done after 5 s"


def test_a_slow_worker_does_nothing_again_that_is_about_to_be_done() -> None:
    portions = world_of({0: 1.0, 1: 5.0}, 2)
    assert [portions.next(0, 0.0), portions.next(0, 0.0)] == [0, 1]
    assert portions.next(1, 0.0) is None
    assert portions.next(1, 1.4) is None
    assert portions.next(1, 3.1) == 0, "overdue: who knows when it will be"


def test_a_pace_is_known_from_pass_to_pass_and_leaves_out_what_was_waited_for() -> None:
    paces = Paces()
    first = Portions(Partitions.whole(2), [2], paces)
    assert paces.of(0) is None
    for _ in range(2):
        first.next(0, 0.0)
    first.done(0, 0, 1.0)
    first.done(0, 1, 2.0)
    assert paces.of(0) == paces.of(1) == 1.0
    second = Portions(Partitions.whole(2), [2], paces)
    assert second.next(1, 10.0) is not None
    assert second.next(1, 10.0) is not None
    assert second.next(0, 10.0) is not None


def test_a_host_does_and_helps_with_its_own_portions_only() -> None:
    partitions = Partitions((40, 10), (0, 0, 1))
    paces = Paces()
    for worker in range(3):
        paces.done(worker, 0.0, 1.0)
    portions = Portions(partitions, [4, 2], paces)
    assert [portions.bounds(n) for n in range(6)][4:] == [(0, 5), (5, 10)]
    taken = [portions.next(2, 0.0) for _ in range(3)]
    assert taken == [4, 5, None]
    mine = [portions.next(0, 0.0) for _ in range(4)]
    assert mine == [0, 1, 2, 3]
    late_s = 1e3  # all are overdue, and somebody is asked to help
    assert portions.next(1, late_s) in mine
    portions.done(2, 4, late_s)
    assert portions.next(2, late_s) is None  # what is late is not here
