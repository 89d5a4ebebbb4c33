"""Thousands of seeded schedules of stale-synchronous workers, against the paper's two promises.

A model of the cluster: two shards that know whose clocks they contain, workers that fetch and push
shard by shard, messages that keep their order but not their time, joins, deaths in the middle of
anything, evaluations, and pauses for want of work. `Clocks` and one `Gate` for each worker decide;
`Book` keeps the clocks anew, and every read is checked against it. Mutants must be caught.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from dsgd_cli.engine.algorithms.stale_synchronous import Clocks, Gate
from tests.engine.schedules import assert_caught, checked

SHARDS = 2
MOST_STEPS = 5000  # of a schedule that is not stuck, once nothing more goes wrong

Who = tuple[int, int]  # worker, incarnation
Contents = Counter[Who]  # of a shard, or of a fetch from it: clocks of each


@dataclass
class Book:
    """Where everybody is: `shift` plus its own clocks, as the coordinator knows them."""

    own: dict[int, int] = field(default_factory=dict)
    shift: dict[int, int] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)  # own clocks before it counted
    low: int = 0

    def join(self, worker: int) -> None:
        self.own[worker], self.shift[worker] = 0, self.least()

    def leave(self, worker: int) -> None:
        for known in (self.own, self.shift, self.since):
            known.pop(worker, None)

    def pause(self, worker: int) -> None:
        self.since.pop(worker, None)

    def resume(self, worker: int) -> None:
        if worker not in self.since:
            self.shift[worker] = max(self.shift[worker], self.least() - self.own[worker])
            self.since[worker] = self.own[worker]

    def completed(self, worker: int, count: int) -> None:
        self.own[worker] = count
        self.least()

    def least(self) -> int:
        at = [self.shift[worker] + self.own[worker] for worker in self.since]
        self.low = max(min(at, default=self.low), self.low)
        return self.low


@dataclass
class Flight:
    """An exchange under way: the shards that it has not reached."""

    push: bool
    shards: list[int]
    found: list[Contents] = field(default_factory=lambda: [Counter() for _ in range(SHARDS)])


class Worker:
    """One incarnation, as `daemons.streams` makes it. It is run by `next(life)`."""

    def __init__(self, world: World, number: int, incarnation: int) -> None:
        self.world = world
        self.who = (number, incarnation)
        self.gate = Gate()
        self.hand: list[Contents] = []
        self.inbox: deque[tuple[str, int]] = deque()
        self.outbox: deque[tuple[str, int]] = deque()
        self.tasks: deque[int] = deque()  # batches in each
        self.summed = 0
        self.pushed = 0
        self.ended = 0  # tasks whose last push is under way
        self.flight: Flight | None = None
        self.dead = False
        self.life = self.live()

    def live(self) -> Iterator[None]:
        while True:
            if self.inbox:
                yield from self.obey(*self.inbox.popleft())
            elif self.tasks and self.gate.open:
                yield from self.batch()
            yield

    def obey(self, kind: str, value: int) -> Iterator[None]:
        if kind == "grant":
            if not self.tasks:
                self.gate.idled()
            self.tasks.append(value)
        elif kind == "advance":
            self.gate.limit = max(value, self.gate.limit)
        else:
            yield from self.evaluate()

    def batch(self) -> Iterator[None]:
        if not self.gate.fresh:
            yield from self.settle()
            if not self.gate.fresh:
                yield from self.begin(push=False)
                yield from self.settle()
        self.world.read(self)
        self.summed += 1
        self.tasks[0] -= 1
        ends = not self.tasks[0]
        if ends or self.summed == self.world.push_every:
            yield from self.begin(push=True)
        if ends:
            self.tasks.popleft()
            self.ended += 1
        if not self.tasks or not self.gate.open:
            yield from self.settle()

    def evaluate(self) -> Iterator[None]:
        if self.summed:
            yield from self.begin(push=True)
        yield from self.settle()
        self.outbox.append(("ticked", self.pushed))  # once more: nothing is in hand
        yield from self.begin(push=False)
        yield from self.settle()
        self.gate.away()
        self.outbox.append(("evaluated", 0))

    def begin(self, push: bool) -> Iterator[None]:
        yield from self.settle()
        if push:
            self.gate.pushed()
            self.summed = 0
        self.gate.fetch_begins()
        self.flight = Flight(push, self.world.random.sample(range(SHARDS), SHARDS))

    def settle(self) -> Iterator[None]:
        flight = self.flight
        if flight is None:
            return
        while flight.shards:
            yield
        self.flight = None
        self.hand = flight.found
        self.gate.fetched()
        if flight.push:
            self.pushed += 1
            self.outbox.append(("ticked", self.pushed))
        self.outbox.extend([("reported", 0)] * self.ended)
        self.ended = 0

    @property
    def has_a_clock_in_hand(self) -> bool:
        """Something that is computed, and not in all shards."""
        return bool(self.summed) or (self.flight is not None and self.flight.push)

    def fly(self) -> None:
        """The exchange reaches another shard."""
        flight = self.flight
        if flight is not None and flight.shards:
            shard = flight.shards.pop()
            contents = self.world.shards[shard]
            contents[self.who] += flight.push
            flight.found[shard] = contents.copy()


class World:
    """One schedule. The coordinator is what `streaming` makes of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bound = self.random.choice([0, 0, 1, 2, 3])
        self.push_every = self.random.choice([1, 1, 2, 3])
        self.clocks = Clocks(self.bound)
        self.book = Book()
        self.shards: list[Contents] = [Counter() for _ in range(SHARDS)]
        self.free = self.random.choice([3, 20])  # batches that nobody holds
        self.workers: dict[int, Worker] = {}
        self.held: dict[int, deque[int]] = {}
        self.away: set[int] = set()
        self.incarnations: Counter[int] = Counter()
        self.reads = 0

    def run(self) -> None:
        for number in range(self.random.choice([1, 2, 2, 3, 4])):
            self.join(number)
        for _ in range(self.random.choice([20, 60])):
            self.happen()
        for number in list(self.workers):
            if self.workers[number].dead:
                self.notice(number)
        if not self.workers:
            self.join(0)
        self.add(5)
        self.come_to_an_end()

    def come_to_an_end(self) -> None:
        """Progress: nobody waits for the dead, nor for who has nothing to do."""
        for _ in range(MOST_STEPS):
            if not self.free and not any(self.held.values()):
                return
            self.go_on(self.random.choice(list(self.workers)))
        raise AssertionError(f"stuck: {self.free} batches free, {self.held}")

    def happen(self) -> None:
        """The next event: mostly that somebody goes on."""
        if not self.workers:
            self.join(0)
        chance, number = self.random.random(), self.random.choice(list(self.workers))
        if chance < 0.9:
            for _ in range(self.random.choice([1, 3, 10])):
                self.go_on(number)
        elif chance < 0.92:
            self.add(self.random.choice([1, 10]))
        elif chance < 0.95:
            self.join(self.random.randrange(4))
        elif chance < 0.97:
            self.evaluate(number)
        elif self.workers[number].dead:
            self.notice(number)
        else:
            self.workers[number].dead = True

    def go_on(self, number: int) -> None:
        worker, chance = self.workers[number], self.random.random()
        if chance < 0.3:
            worker.fly()  # of the dead, too
        elif chance < 0.6:
            self.hear(worker)
        elif not worker.dead:
            next(worker.life)

    # ── the coordinator ──

    def both(self, what: str, *arguments: int) -> None:
        if what == "pause":
            worker = self.workers[arguments[0]]
            assert worker.dead or not worker.has_a_clock_in_hand, "nobody waits for its clock"
        for book in (self.clocks, self.book):
            getattr(book, what)(*arguments)

    def join(self, number: int) -> None:
        if number not in self.workers:
            self.incarnations[number] += 1
            self.workers[number] = Worker(self, number, self.incarnations[number])
            self.held[number] = deque()
            self.both("join", number)
            self.work()

    def notice(self, number: int) -> None:
        """It is dead, and fenced: what is under way is refused."""
        del self.workers[number]
        self.free += sum(self.held.pop(number))
        self.away.discard(number)
        self.both("leave", number)
        self.work()

    def add(self, batches: int) -> None:
        """Another epoch begins."""
        self.free += batches
        self.work()

    def evaluate(self, number: int) -> None:
        if not self.away:
            self.away.add(number)
            self.workers[number].inbox.append(("evaluate", 0))
            self.work()

    def hear(self, worker: Worker) -> None:
        if worker.outbox:
            number, (kind, value) = worker.who[0], worker.outbox.popleft()
            if kind == "ticked":
                again = self.clocks.has(number, value)
                self.both("completed", number, value)
                if again and number in self.away:
                    self.both("pause", number)
            elif kind == "reported":
                self.held[number].popleft()
            else:
                self.away.remove(number)
            self.work()

    def work(self) -> None:
        for number in self.workers:
            while self.free and len(self.held[number]) < 2:
                size = min(self.free, self.random.choice([1, 2, 4]))
                self.free -= size
                self.held[number].append(size)
                self.workers[number].inbox.append(("grant", size))
        for number in self.workers:
            if number not in self.away:
                self.both("resume" if self.held[number] else "pause", number)
        for number, limit in self.clocks.news():
            if number not in self.away:
                self.workers[number].inbox.append(("advance", limit))
        self.book.least()

    # ── what is promised ──

    def read(self, worker: Worker) -> None:
        """It computes a gradient of what it has in hand."""
        self.reads += 1
        book, (number, _), clock = self.book, worker.who, worker.gate.clock
        here = book.shift[number] + clock
        assert here <= book.least() + self.bound, f"worker/{number} is too far ahead"
        assert number in book.since, f"nobody waits for worker/{number}"
        for contents in worker.hand:
            assert contents[worker.who] == clock, f"worker/{number} does not read its writes"
            for other, since in book.since.items():
                needed = here - self.bound - book.shift[other]
                found = contents[self.workers[other].who]
                assert needed <= max(since, found), f"worker/{number} lacks worker/{other}"
                ahead = book.shift[other] + found - here
                assert ahead <= self.bound + 1, "it is left behind"


def check(seed: int) -> World:
    world = World(seed)
    world.run()
    return world


@pytest.mark.parametrize("part", range(10))
def test_schedules(part: int) -> None:
    reads: Counter[int] = Counter()
    for world in checked(check, range(part * 1000, part * 1000 + 1000)):
        reads[world.bound] += world.reads
    assert min(reads[bound] for bound in range(4)) > 1000


# ── one by one ─────────────────────────────────────────────────────────────────────────────────


def clocks(bound: int, *workers: int) -> Clocks:
    made = Clocks(bound)
    for worker in workers:
        made.join(worker)
        made.resume(worker)
    return made


def test_everybody_may_begin_the_bound_and_no_more() -> None:
    made = clocks(2, 0, 1)
    assert made.news() == [(0, 2), (1, 2)]
    made.completed(0, 3)
    assert made.news() == []
    assert made.blocked(0) and not made.blocked(1)
    made.completed(1, 1)
    assert made.news() == [(0, 3), (1, 3)]
    assert made.news() == []
    assert not made.blocked(0)


def test_a_bound_of_0_is_lock_step() -> None:
    made = clocks(0, 0, 1)
    for clock in range(5):
        assert made.news() == [(0, clock), (1, clock)]
        made.completed(clock % 2, clock + 1)
        assert made.news() == []
        assert made.blocked(clock % 2)
        made.completed(1 - clock % 2, clock + 1)


def test_who_joins_begins_at_the_least_clock() -> None:
    made = clocks(1, 0, 1)
    made.completed(0, 8)
    made.completed(1, 7)
    made.join(2)
    assert made.least() == 7
    made.resume(2)
    assert (2, 1) in made.news()  # by its own count
    made.completed(2, 1)
    assert made.least() == 7
    made.completed(1, 8)
    assert made.least() == 8


@pytest.mark.parametrize("how", [Clocks.leave, Clocks.pause])
def test_nobody_waits_for_who_is_gone_or_has_nothing_to_do(
    how: Callable[[Clocks, int], None],
) -> None:
    made = clocks(0, 0, 1)
    made.completed(0, 1)
    made.news()
    how(made, 1)
    assert made.news() == [(0, 1)]
    assert not made.blocked(1)


def test_who_comes_back_is_told_again_and_holds_nobody_up() -> None:
    made = clocks(1, 0, 1)
    assert made.news() == [(0, 1), (1, 1)]
    made.pause(1)
    made.completed(0, 9)
    assert made.news() == [(0, 10)]
    made.resume(1)
    assert made.least() == 9
    assert made.news() == [(1, 1)]
    made.pause(1)
    made.resume(1)
    assert made.news() == [(1, 1)]


def test_who_is_ahead_keeps_its_lead_over_a_pause() -> None:
    made = clocks(3, 0, 1)
    made.completed(0, 3)
    made.pause(0)
    made.resume(0)
    assert made.least() == 0
    assert made.news() == [(0, 3), (1, 3)]


def test_the_least_clock_never_falls() -> None:
    made = clocks(1, 0)
    made.completed(0, 5)
    assert made.least() == 5
    made.leave(0)
    assert made.least() == 5
    made.join(0)  # the next incarnation counts from 0
    made.completed(0, 0)
    made.resume(0)
    assert made.least() == 5
    assert made.news() == [(0, 1)]


def test_what_comes_late_from_the_lost_changes_nothing() -> None:
    made = clocks(1, 0)
    made.completed(7, 3)
    made.resume(7)
    made.pause(7)
    made.leave(7)
    made.completed(0, 2)
    made.completed(0, 1)  # goes back
    assert made.least() == 2


def test_a_gate_wants_a_fetch_for_each_clock() -> None:
    gate = Gate()
    assert not gate.open
    gate.limit = 1
    assert gate.open and not gate.fresh
    gate.fetch_begins()
    assert not gate.fresh
    gate.fetched()
    assert gate.fresh
    gate.pushed()
    assert gate.open and not gate.fresh
    gate.fetch_begins()
    gate.pushed()  # the fetch under way lacks it
    gate.fetched()
    assert not gate.open and not gate.fresh


def test_a_fetch_before_the_clock_was_allowed_is_not_good_enough() -> None:
    gate = Gate(limit=0)
    gate.pushed()
    gate.fetch_begins()
    gate.limit = 1
    gate.fetched()
    assert gate.open and not gate.fresh


def test_who_was_away_waits_until_it_counts_again() -> None:
    gate = Gate(limit=5)
    gate.fetch_begins()
    gate.fetched()
    gate.away()
    assert not gate.open and not gate.fresh
    gate.limit = 5
    assert gate.open and not gate.fresh


# ── planted mistakes ───────────────────────────────────────────────────────────────────────────


def allow_one_clock_more(patch: pytest.MonkeyPatch) -> None:
    limit = Clocks._limit
    patch.setattr(Clocks, "_limit", lambda self, *arguments: limit(self, *arguments) + 1)


def wait_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clocks, "leave", lambda self, worker: None)


def wait_for_who_has_nothing_to_do(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clocks, "pause", lambda self, worker: None)


def join_at_nought(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Clocks, worker: int) -> None:
        self._completed[worker] = self._base[worker] = 0
        self._floor = 0

    patch.setattr(Clocks, "join", mutant)


def resume_where_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clocks, "resume", lambda self, worker: self._counts.add(worker))


def follow_the_fastest(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Clocks) -> int:
        clocks = [self._base[worker] + self._completed[worker] for worker in self._counts]
        self._floor = max(max(clocks, default=self._floor), self._floor)
        return self._floor

    patch.setattr(Clocks, "least", mutant)


def tell_only_news(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clocks, "pause", lambda self, worker: self._counts.discard(worker))


def tell_nothing_new(patch: pytest.MonkeyPatch) -> None:
    news = Clocks.news
    patch.setattr(Clocks, "news", lambda self: news(self) if self._floor < 3 else [])


def trust_a_fetch_up_to_the_limit(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Gate) -> None:
        self._fetching_for = self.limit

    patch.setattr(Gate, "fetch_begins", mutant)


def fetch_before_it_is_allowed(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Gate) -> None:
        self._fetching_for = self.clock

    patch.setattr(Gate, "fetch_begins", mutant)


def trust_what_is_old(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "idled", lambda self: None)


def go_on_before_it_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "away", Gate.idled)


@pytest.mark.parametrize(
    "mutant",
    [
        allow_one_clock_more,
        wait_for_the_dead,
        wait_for_who_has_nothing_to_do,
        join_at_nought,
        resume_where_it_was,
        follow_the_fastest,
        tell_only_news,
        tell_nothing_new,
        trust_a_fetch_up_to_the_limit,
        fetch_before_it_is_allowed,
        trust_what_is_old,
        go_on_before_it_counts,
    ],
)
def test_a_planted_mistake_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert_caught(check, range(2000))
