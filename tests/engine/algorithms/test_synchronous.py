"""Thousands of seeded schedules of synchronous SGD: deaths, zombies, delays, evaluations, NaN.

A model of the cluster carries out what `Training` decides, on real shards. The gradient of a batch
is 1 in a coordinate of its own, and the version that it was computed with in the last one: so each
update says which batches are in it, how often, and of which parameters. What is promised is checked
on the way; mistakes are planted, and must be caught.
"""

from __future__ import annotations

import inspect
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dsgd_cli.engine import events as e
from dsgd_cli.engine import sums
from dsgd_cli.engine.algorithms import synchronous
from dsgd_cli.engine.algorithms.base import Left, Reached
from dsgd_cli.engine.algorithms.synchronous import Batch, Synchronous
from dsgd_cli.engine.optimizers import Optimizer
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.shard import Fenced, RoundOver, Shard
from dsgd_cli.engine.tasks import EPOCHS_AHEAD, Task
from dsgd_cli.engine.training import Phase, Training
from tests.engine.schedules import Clockwork, assert_caught, checked, some_places

Vector = np.ndarray[Any, Any]

TENSORS = (("W", (4, 2)),)
ROWS = 4  # of a batch
BATCHES = 64  # that a gradient can tell apart
WIDTH = BATCHES + 1  # elements of a block
LAST_FAULT_S = 2.0
END_S = 2000.0


@dataclass
class Job:
    """A batch as its worker has it."""

    task: Task
    round: int
    part: int | None
    needs: int
    computed: bool = False
    base: int = 0  # version of the parameters that it was computed with
    finite: bool = True
    unreported: bool = True


@dataclass
class Worker:
    """One incarnation. `cut` once nobody listens to it, `dead` once it does nothing any more."""

    number: int
    incarnation: int
    batch_s: float
    cut: bool = False
    dead: bool = False
    busy: bool = False
    stalls_s: float = 0.0
    hung_until: float = 0.0
    inbox: list[Callable[[Worker], None]] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)
    todo: list[Job] = field(default_factory=list)
    version: int = 0  # updates that the parameters in hand have at least
    shown: int = 0  # and really
    streak: int = 0
    sent_until: float = 0.0
    heard_until: float = 0.0


@dataclass(frozen=True)
class Update:
    """What a commit has put into the parameters: batch -> weight."""

    weights: dict[int, float]
    base: float  # version times the sum of the weights


class Simulation(Clockwork):
    """One schedule. `run` returns the `Finish`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = rng = random.Random(seed)
        self.faults = rng.random() < 0.8
        self.backups = rng.choice([0, 0, 1, 2])
        self.needed = rng.choice([1, 2, 2, 3, 4])
        self.n = rng.choice([3, 16, 22, 30])
        workers = self.needed + self.backups
        self.places = some_places(seed, workers)
        others = max(self.places, default=0)
        self.sizes = [self.n, *(self.n // 3 for _ in range(others))]
        self.first = [sum(-(-size // ROWS) for size in self.sizes[:each]) for each in range(4)]
        self.per_epoch = sum(-(-size // ROWS) for size in self.sizes)
        self.clip = rng.choice([None, None, 0.6, 1e6])
        poison = rng.choice([0.0, 0.0, 0.1, 0.3])
        self.poisoned = {batch for batch in range(BATCHES) if rng.random() < poison}
        self.until = rng.choice(
            [
                e.Until(max_epochs=rng.choice([1, 2, 3])),
                e.Until(max_steps=rng.choice([1, 4, 7, 12])),
                e.Until(max_steps=10, max_epochs=2),
                e.Until(accuracy=0.9, max_epochs=3),
                e.Until(max_time_s=1.0, max_epochs=3),
            ]
        )
        self.machine = Training(
            e.Settings(
                seed=seed,
                batch_size=ROWS,
                until=self.until,
                every=rng.choice([e.Every(), e.Every(3, "step"), e.Every(0.3, "s")]),
                algorithm={"name": "synchronous", "backup_workers": self.backups},
                optimizer={"clip_norm": self.clip},
                workers=workers,
                places=self.places,
            )
        )
        self.blocks = rng.choice([1, 2])
        self.updates: list[defaultdict[int, list[Vector]]] = []  # shard: version: blocks
        self.shards = [self.make_shard() for _ in range(rng.choice([1, 2, 3]))]
        self.workers: dict[int, Worker] = {}  # the sessions that the coordinator knows
        self.every: list[Worker] = []
        self.incarnations: Counter[int] = Counter()
        self.jobs: list[Callable[[], None]] = []  # the coordinator's calls to all shards
        self.calling = False
        self.accepted: dict[int, set[int]] = defaultdict(set)  # round: parts
        self.commits: list[e.Commit] = []
        self.made: list[Update] = []
        self.quality = 0.0
        self.deaths = 0
        self.drains = 0
        self.stopped = False
        self.finish: e.Finish | None = None

    def make_shard(self) -> Shard:
        made: defaultdict[int, list[Vector]] = defaultdict(list)
        self.updates.append(made)

        def record(data: Vector, slots: Any, g: Vector, scratch: Any, t: int, rate: float) -> None:
            made[t].append(g.copy())

        values = np.zeros(self.blocks * WIDTH)
        return Shard(values, WIDTH, Optimizer("record", 0, (), record), rounds=True)

    # ── the world's clockwork ──────────────────────────────────────────────────────────────────

    def delay(self) -> float:
        return self.random.choice([0.0, 0.001, 0.01, 0.1 * self.random.random()])

    def run(self) -> e.Finish:
        for number in range(self.needed + self.backups):
            late_s = self.random.choice([0.0, 0.0, 0.0, 0.5, 6.0])
            self.after(late_s, lambda number=number: self.join(number))  # type: ignore[misc]
        if self.random.random() < 0.1:
            self.after(2 * self.random.random(), self.stop)
        self.after(0.1, self.tick)
        while self.agenda and self.now < END_S and self.finish is None:
            self.next()
        assert self.finish is not None, f"still {self.machine.phase} after {END_S} s"
        return self.finish

    def tick(self) -> None:
        self.feed(e.Tick())
        self.after(0.1 if self.now < 10.0 else 2.0, self.tick)

    def stop(self) -> None:
        self.stopped = True
        self.feed(e.StopRequested("asked"))

    def join(self, number: int) -> None:
        self.incarnations[number] += 1
        speed_s = self.random.choice([0.002, 0.01, 0.05])
        worker = Worker(number, self.incarnations[number], speed_s)
        self.workers[number] = worker
        self.every.append(worker)
        self.feed(e.WorkerJoined(number, worker.incarnation))
        if self.faults and self.random.random() < 0.6:
            fault = self.hang if self.random.random() < 0.05 else self.lose
            self.after(1.5 * self.random.random() ** 2, lambda: fault(worker))

    def hang(self, worker: Worker) -> None:
        if self.now <= LAST_FAULT_S:
            worker.stalls_s = self.random.choice([1.0, math.inf])

    def lose(self, worker: Worker) -> None:
        """Killed, or only cut off: a zombie goes on until it is fenced. It may stay away."""
        if worker.cut or self.now > LAST_FAULT_S or self.finish is not None:
            return
        worker.dead = self.random.random() < 0.6
        self.cut(worker)
        partition = self.partition(worker.number)
        alone = partition not in map(self.partition, self.workers)
        if self.random.random() < 0.2:  # the new session is there before the loss is noticed
            self.join(worker.number)
            return
        if alone or self.random.random() < 0.8:
            again_s = self.delay() + self.random.choice([0.0, 0.3, 3.0])
            self.after(again_s, lambda: self.join(worker.number))
        self.feed(e.WorkerLost(worker.number, worker.incarnation))

    def cut(self, worker: Worker) -> None:
        self.deaths += 1
        worker.cut = True
        del self.workers[worker.number]

    # ── messages ───────────────────────────────────────────────────────────────────────────────

    def send(self, worker: Worker, event: e.Event) -> None:
        """Worker to coordinator, in order; what is on its way may outlive the session."""
        at = worker.sent_until = max(worker.sent_until, self.now + self.delay())
        self.after(at - self.now, lambda: self.feed(event))

    def tell(self, number: int, do: Callable[[Worker], None]) -> None:
        """Coordinator to worker, in order; it listens between two batches."""
        worker = self.workers[number]
        at = worker.heard_until = max(worker.heard_until, self.now + self.delay())

        def hear() -> None:
            if not worker.cut:
                worker.inbox.append(do)
                self.work(worker)

        self.after(at - self.now, hear)

    def feed(self, event: e.Event) -> None:
        if self.finish is not None:
            return
        for decision in self.machine.on(event, self.now):
            assert self.finish is None, "a decision after Finish"
            self.carry_out(decision)

    # ── decisions ──────────────────────────────────────────────────────────────────────────────

    def carry_out(self, decision: e.Decision) -> None:
        number = getattr(decision, "worker", None)
        if number is not None and not isinstance(decision, e.Fence):
            assert number in self.workers, f"{decision} is for a worker that is gone"
        match decision:
            case e.Prepare(number):
                self.tell(number, lambda w: self.send(w, self.prepared(w)))
            case e.Initialise(number):
                self.tell(number, lambda w: self.send(w, e.Initialised(w.number, w.incarnation)))
            case e.Work():
                assert self.machine.phase is Phase.TRAINING
                mine = self.partition(decision.worker)
                assert decision.task.partition == mine, "it does not have these examples"
                self.tell(decision.worker, lambda w: self.take_work(w, decision))
            case e.Accept():
                self.accepted[decision.round].add(decision.part)
                self.tell(decision.worker, lambda w: self.be_accepted(w, decision))
            case e.Late(number, task_id):
                self.tell(number, lambda w: self.drop(w, task_id))
            case e.Evaluate():
                self.tell(decision.worker, lambda w: self.evaluate(w, decision))
            case e.Drain(number):
                self.drains += 1
                self.tell(number, self.drain)
            case e.Expel():
                self.expel(decision)
            case e.Commit():
                self.commits.append(decision)
                assert decision.parts <= self.needed, "too many gradients"
                self.call(lambda shard: self.commit(shard, decision), self.committed)
            case e.Measure(round_, parts, scale):
                squares: list[float] = []
                self.call(
                    lambda shard: squares.append(shard.squares(round_, parts, scale)),
                    lambda: e.Measured(round_, sum(squares)),
                )
            case e.Fence(number, incarnation):
                self.call(
                    lambda shard: shard.fence(number, incarnation),
                    lambda: e.Fenced(number, incarnation),
                )
            case e.Freeze():
                self.call(Shard.freeze, e.Frozen)
            case e.Thaw():
                self.call(Shard.thaw, e.Thawed)
            case e.Export():
                self.call(lambda shard: None, e.Exported)
            case e.ConfigureShards():
                self.call(lambda shard: None, e.Configured)
            case e.Finish():
                self.finish = decision

    def partition(self, worker: int) -> int:
        return self.places[worker] if self.places else 0

    def prepared(self, worker: Worker) -> e.Event:
        partition = self.partition(worker.number)
        size, who = self.sizes[partition], (worker.number, worker.incarnation)
        return e.Prepared(*who, TENSORS, "float32", size, "d", f"data {partition}", size)

    def expel(self, expel: e.Expel) -> None:
        worker = self.workers[expel.worker]
        assert self.now < worker.hung_until + 1.0, f"{expel}, but it is at work"
        self.cut(worker)
        self.after(self.delay(), lambda: self.join(worker.number))

    # ── the coordinator's calls, one after the other ───────────────────────────────────────────

    def call(self, do: Callable[[Shard], object], answer: Callable[[], e.Event]) -> None:
        self.jobs.append(lambda: self.call_all(do, answer))
        self.next_call()

    def next_call(self) -> None:
        if self.jobs and not self.calling:
            self.calling = True
            self.jobs.pop(0)()

    def call_all(self, do: Callable[[Shard], object], answer: Callable[[], e.Event]) -> None:
        left = set(range(len(self.shards)))

        def one(shard: int) -> None:
            try:
                do(self.shards[shard])
            except sums.Incomplete as error:
                raise AssertionError(f"shard {shard}: {error}") from error
            left.discard(shard)
            if not left:
                self.after(self.delay(), done)

        def done() -> None:
            self.calling = False
            self.feed(answer())
            self.next_call()

        slow = self.random.choice([1, 1, 5])
        for shard in range(len(self.shards)):
            self.after(slow * self.delay(), lambda shard=shard: one(shard))  # type: ignore[misc]

    def commit(self, shard: Shard, commit: e.Commit) -> None:
        shard.commit(commit.round, commit.parts, commit.scale)
        if self.random.random() < 0.2:  # the call is repeated
            shard.commit(commit.round, commit.parts, commit.scale)
        for worker in self.every:
            if worker.todo:
                self.after(self.delay(), lambda worker=worker: self.work(worker))  # type: ignore[misc]

    def committed(self) -> e.Event:
        self.made.append(self.update_of(len(self.made) + 1))
        return e.Committed(self.commits[-1].round)

    def update_of(self, version: int) -> Update:
        """The update as the shards have made it; the same in all of them."""
        found = [block for made in self.updates for block in made[version]]
        assert len(found) == len(self.shards) * self.blocks
        for block in found:
            assert np.array_equal(block, found[0]), "shards have summed different gradients"
        weights = {int(i): float(found[0][i]) for i in np.flatnonzero(found[0][:BATCHES])}
        update = Update(weights, float(found[0][BATCHES]))
        self.check_update(update, version)
        return update

    def check_update(self, update: Update, version: int) -> None:
        weights, clipped = update.weights, sum(update.weights.values())
        assert len(weights) == self.commits[-1].parts, "a part counts twice"
        rows = {batch: self.rows(batch) for batch in weights}
        for batch, weight in weights.items():
            expected = clipped * rows[batch] / sum(rows.values())
            assert math.isclose(weight, expected), "weights are not the numbers of examples"
            for other in self.made:
                assert batch not in other.weights, f"batch {batch} is in two updates"
        assert math.isclose(update.base, (version - 1) * clipped), "of older parameters"
        copies = self.blocks * len(self.shards)
        squares = sum(w * w for w in weights.values()) + update.base**2
        norm = math.sqrt(copies * squares) / clipped  # of what was not clipped
        bound = 1.0 if self.clip is None else min(1.0, self.clip / norm)
        assert math.isclose(clipped, bound), f"weights sum to {clipped}, not to {bound}"

    def rows(self, batch: int) -> int:
        place = batch % self.per_epoch
        partition = max(each for each in range(len(self.sizes)) if self.first[each] <= place)
        return min(ROWS, self.sizes[partition] - (place - self.first[partition]) * ROWS)

    # ── a worker ───────────────────────────────────────────────────────────────────────────────

    def work(self, worker: Worker) -> None:
        """Goes on with what it was told, then with the next batch."""
        while worker.inbox and not worker.busy and not worker.dead:
            worker.inbox.pop(0)(worker)
        if worker.busy or worker.dead or not worker.todo:
            return
        job = min(worker.todo, key=lambda job: job.needs)
        if job.needs > worker.version:
            shown = min(shard.version(b) for shard in self.shards for b in range(self.blocks))
            if shown < job.needs:
                return
            worker.version, worker.shown = job.needs, shown
        self.busy(worker, worker.batch_s, lambda: self.computed(worker, job))

    def busy(self, worker: Worker, for_s: float, then: Callable[[], None]) -> None:
        worker.busy = True
        for_s *= self.random.choice([0.5, 1.0, 5.0])
        if worker.stalls_s:
            for_s, worker.stalls_s = for_s + worker.stalls_s, 0.0
            worker.hung_until = self.now + for_s

        def done() -> None:
            worker.busy = False
            if not worker.dead:
                then()
                self.work(worker)

        if for_s < math.inf:
            self.after(for_s, done)

    def take_work(self, worker: Worker, work: e.Work) -> None:
        job = Job(work.task, work.round, work.part, work.needs)
        worker.jobs[work.task.id] = job
        worker.todo.append(job)

    def be_accepted(self, worker: Worker, accept: e.Accept) -> None:
        job = worker.jobs.get(accept.task_id)
        if job is not None:
            job.round, job.part = accept.round, accept.part
            if job.computed:
                self.contribute(worker, job)

    def drop(self, worker: Worker, task_id: int) -> None:
        job = worker.jobs.pop(task_id, None)
        if job in worker.todo:
            worker.todo.remove(job)

    def drain(self, worker: Worker) -> None:
        worker.jobs.clear()
        worker.todo.clear()
        self.send(worker, e.Drained(worker.number, worker.incarnation))

    def evaluate(self, worker: Worker, evaluate: e.Evaluate) -> None:
        def done() -> None:
            self.quality = min(1.0, self.quality + 0.3 * self.random.random())
            accuracy = self.quality - (0.3 * self.random.random() if evaluate.frozen else 0.0)
            metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
            who = (worker.number, worker.incarnation)
            self.send(worker, e.Evaluated(*who, evaluate.evaluation_id, metrics))

        self.busy(worker, 0.05, done)

    def computed(self, worker: Worker, job: Job) -> None:
        job.computed, job.base = True, worker.shown
        worker.todo.remove(job)
        job.finite = self.batch(job.task) not in self.poisoned
        worker.streak = 0 if job.finite else worker.streak + 1
        if job.part is None:
            self.send(worker, e.Claimed(worker.number, worker.incarnation, job.task.id))
        else:
            self.contribute(worker, job)

    def batch(self, task: Task) -> int:
        assert task.start % ROWS == 0
        return (task.epoch - 1) * self.per_epoch + self.first[task.partition] + task.start // ROWS

    def contribute(self, worker: Worker, job: Job) -> None:
        """To every block of every shard, one after the other in each; nothing else meanwhile."""
        if not job.finite:
            self.report(worker, job)
            return
        assert job.part is not None
        gradient, round_, part = self.gradient(job), job.round, job.part
        left, over = len(self.shards) * self.blocks, False
        worker.busy = True

        def arrive(shard: Shard, block: int) -> None:
            nonlocal left, over
            if worker.dead and self.random.random() < 0.5:
                return  # it died in the middle of it
            try:
                shard.contribute(worker.number, worker.incarnation, round_, part, block, gradient)
            except RoundOver:
                self.check_late(round_, part)
                over = True
            except Fenced:
                worker.dead = True
            left -= 1
            if left == 0 and not worker.dead:
                worker.busy = False
                if not over:
                    self.report(worker, job)
                self.work(worker)

        for shard in self.shards:
            at = self.delay()
            for block in range(self.blocks):
                self.after(at, lambda shard=shard, block=block: arrive(shard, block))  # type: ignore[misc]
                at += self.random.choice([0.0, 0.0, 0.02])

    def check_late(self, round_: int, part: int) -> None:
        """Whoever is too late for a round that was made has no business there."""
        for commit in self.commits:
            if commit.round == round_:
                assert part in range(self.needed), "somebody late has sent his gradient"

    def gradient(self, job: Job) -> Vector:
        gradient = np.zeros(WIDTH)
        gradient[self.batch(job.task)] = 1.0
        gradient[BATCHES] = job.base
        gradient *= (job.task.stop - job.task.start) / ROWS
        return gradient

    def report(self, worker: Worker, job: Job) -> None:
        examples = job.task.stop - job.task.start if job.unreported else 0
        steps, job.unreported = int(job.unreported), False
        report = e.Report(
            worker.number,
            worker.incarnation,
            job.task.id,
            done_upto=job.task.stop,
            steps=steps,
            examples=examples,
            nonfinite_streak=worker.streak,
            round=job.round if job.finite else 0,
        )
        self.send(worker, report)

    # ── what must be true at the end ───────────────────────────────────────────────────────────

    def steps_in_order(self) -> list[set[int]]:
        """The batches of each update when nobody is late, if all of them are made."""
        batches = list(range(BATCHES))
        if self.until.max_epochs is not None:
            batches = batches[: self.until.max_epochs * self.per_epoch]
        batches = batches[: self.until.max_steps]
        steps = [batches[i : i + self.needed] for i in range(0, len(batches), self.needed)]
        return [good for step in steps if (good := set(step) - self.poisoned)]

    def check_end(self, finish: e.Finish) -> None:
        made = [set(update.weights) for update in self.made]
        limit = finish.reason.partition(" ")[0]
        if self.backups == 0 and not self.places:
            expected = self.steps_in_order()
            assert made == expected[: len(made)], f"{made} are not the steps {expected}"
            assert len(made) == len(expected) or limit not in ("max_epochs", "max_steps"), limit
        if not self.poisoned:
            for step in made[:-1]:  # a partition may be at its end before the others
                assert len(step) == self.needed or self.places, "a step of too few gradients"
            assert finish.steps == sum(map(len, made)), "steps are not the gradients in updates"
        if limit == "max_epochs" and self.until.max_epochs is not None:
            assert finish.epochs == self.until.max_epochs
            everything = set(range(finish.epochs * self.per_epoch)) - self.poisoned
            assert set().union(*made) == everything, "examples are missing"
            assert finish.steps == finish.epochs * self.per_epoch, "max_epochs is not met exactly"
        if limit == "max_steps":
            assert finish.steps == self.until.max_steps, "max_steps is not met exactly"
        strategy = self.machine._strategy
        if isinstance(strategy, Synchronous):
            vain = strategy._round - strategy._step
            assert vain <= self.deaths + self.drains, f"{vain} rounds in vain"


def check(seed: int) -> e.Finish:
    simulation = Simulation(seed)
    finish = simulation.run()
    if finish.outcome == "diverged":
        assert simulation.poisoned
    else:
        assert finish.outcome in ("converged", "finished", "stopped"), finish
        simulation.check_end(finish)
    return finish


@pytest.mark.parametrize("part", range(4))
def test_schedules(part: int) -> None:
    seeds = range(part * 500, part * 500 + 500)
    outcomes = Counter(finish.outcome for finish in checked(check, seeds))
    assert outcomes["converged"] > 10
    assert outcomes["finished"] > 50
    assert outcomes["stopped"] > 20


# ── planted mistakes ───────────────────────────────────────────────────────────────────────────


def commit_before_all_have_reported(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Synchronous, dry: bool) -> list[Batch]:
        parts = self._parts()
        return parts if len(parts) >= self.needed or (dry and not self._under_way()) else []

    patch.setattr(Synchronous, "_complete_parts", mutant)


def try_again_in_the_same_round(patch: pytest.MonkeyPatch) -> None:
    begin = Synchronous._begin_round
    spoil = Synchronous._spoil_round

    def mutant(self: Synchronous) -> None:
        patch.setattr(Synchronous, "_begin_round", lambda self: None)
        spoil(self)
        patch.setattr(Synchronous, "_begin_round", begin)

    patch.setattr(Synchronous, "_spoil_round", mutant)


def forget_who_had_begun_the_next_round(patch: pytest.MonkeyPatch) -> None:
    begin = Synchronous._begin_round

    def mutant(self: Synchronous) -> None:
        self._skipped = 0
        begin(self)

    patch.setattr(Synchronous, "_begin_round", mutant)


def wait_for_what_the_dead_will_not_send_again(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Synchronous) -> None:
        self._begin_round()
        self._again = True
        for batch in self._parts():
            batch.reported = False

    patch.setattr(Synchronous, "_spoil_round", mutant)


def do_not_tell_the_survivors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Synchronous, "_tell_again", lambda self: iter(()))


def accept_one_too_many(patch: pytest.MonkeyPatch) -> None:
    accept = Synchronous._accept_waiting

    def mutant(self: Synchronous) -> Iterator[e.Decision]:
        self.needed += self.backups > 0
        yield from accept(self)
        self.needed -= self.backups > 0

    patch.setattr(Synchronous, "_accept_waiting", mutant)


def lose_the_batches_of_the_late(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Synchronous, batch: Batch) -> None:
        self._forget(batch)
        self._drop.append(e.Late(batch.worker, batch.task.id))

    patch.setattr(Synchronous, "_give_up", mutant)


def do_not_wait_for_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The steps are no longer what they are without deaths."""
    leave = Synchronous.leave

    def mutant(self: Synchronous, worker: int) -> Left:
        left = leave(self, worker)
        self._pending -= len(left)
        return left

    patch.setattr(Synchronous, "leave", mutant)
    patch.setattr(Synchronous, "put_back", lambda self, left: self.queue.put_back(left))


def begin_the_next_step_before_this_is_handed_out(patch: pytest.MonkeyPatch) -> None:
    of_step = Synchronous._of_step

    def mutant(self: Synchronous, step: int) -> list[Batch]:
        batches = of_step(self, step)
        handing_out = "_hand_out" in {frame.function for frame in inspect.stack()[1:2]}
        return batches * self.needed if handing_out else batches

    patch.setattr(Synchronous, "_of_step", mutant)


def wait_for_an_update_that_is_not_made(patch: pytest.MonkeyPatch) -> None:
    stepped = Synchronous._stepped

    def mutant(self: Synchronous) -> None:
        self._updates += not self._committing
        stepped(self)

    patch.setattr(Synchronous, "_stepped", mutant)


def weigh_all_batches_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(synchronous, "_rows", lambda batch: ROWS)


def clip_each_update(patch: pytest.MonkeyPatch) -> None:
    make = Synchronous._make_update

    def mutant(self: Synchronous, finite: list[Batch]) -> Iterator[e.Decision]:
        for decision in make(self, finite):
            if isinstance(decision, e.Commit) and self._squares is not None and self.clip_norm:
                scale = ROWS / sum(map(synchronous._rows, finite))
                scale *= self.clip_norm / math.sqrt(self._squares)
                decision = e.Commit(decision.round, decision.parts, scale)
            yield decision

    patch.setattr(Synchronous, "_make_update", mutant)


def count_what_is_reported(patch: pytest.MonkeyPatch) -> None:
    """Steps are counted when their updates are made: else the last one is not."""
    report = Synchronous.report
    stepped = Synchronous._stepped

    def reported(self: Synchronous, event: e.Report, now_s: float) -> None:
        report(self, event, now_s)
        self._steps += event.steps

    def mutant(self: Synchronous) -> None:
        steps = self._steps
        stepped(self)
        self._steps = steps

    patch.setattr(Synchronous, "report", reported)
    patch.setattr(Synchronous, "_stepped", mutant)


def overrun_max_steps(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Synchronous, reached: Reached) -> int:
        return 1

    patch.setattr(Synchronous, "_batches_allowed", mutant)


def add_to_a_step_that_is_being_measured(patch: pytest.MonkeyPatch) -> None:
    """When one partition had nothing left for it, and somebody of another has come back."""
    hand_out = Synchronous._hand_out

    def mutant(self: Synchronous, *about: Any) -> Generator[e.Decision, None, bool]:
        measuring, self._measuring = self._measuring, False
        dry = yield from hand_out(self, *about)
        self._measuring = self._measuring or measuring
        return dry

    patch.setattr(Synchronous, "_hand_out", mutant)


def mix_up_the_partitions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partitions, "of", lambda self, worker: 0)


def make_a_short_step_of_few_examples(patch: pytest.MonkeyPatch) -> None:
    begin = Synchronous.__post_init__

    def mutant(self: Synchronous) -> None:
        begin(self)
        self.queue.ahead = EPOCHS_AHEAD

    patch.setattr(Synchronous, "__post_init__", mutant)


def believe_the_newest_streak(patch: pytest.MonkeyPatch) -> None:
    """Of the worker, whatever it has computed since."""
    report = Synchronous.report

    def mutant(self: Synchronous, event: e.Report, now_s: float) -> None:
        batch = self._batches[event.task_id]
        report(self, event, now_s)
        batch.finite = event.nonfinite_streak == 0

    patch.setattr(Synchronous, "report", mutant)


def add_to_the_sums_of_the_last_round(patch: pytest.MonkeyPatch) -> None:
    add = sums.Sums.add

    def mutant(self: sums.Sums, block: int, round_: int, part: int, gradient: Vector) -> None:
        left = self._sums[block].copy() if round_ > self._taken[block] + 1 else 0.0
        first = round_ > self._rounds[block] > self._taken[block]
        add(self, block, round_, part, gradient)
        if first:
            self._sums[block] += left

    patch.setattr(sums.Sums, "add", mutant)


@pytest.mark.parametrize(
    "mutant",
    [
        commit_before_all_have_reported,
        try_again_in_the_same_round,
        forget_who_had_begun_the_next_round,
        wait_for_what_the_dead_will_not_send_again,
        do_not_tell_the_survivors,
        accept_one_too_many,
        lose_the_batches_of_the_late,
        do_not_wait_for_the_fence,
        begin_the_next_step_before_this_is_handed_out,
        wait_for_an_update_that_is_not_made,
        weigh_all_batches_alike,
        clip_each_update,
        count_what_is_reported,
        overrun_max_steps,
        add_to_a_step_that_is_being_measured,
        mix_up_the_partitions,
        make_a_short_step_of_few_examples,
        believe_the_newest_streak,
        add_to_the_sums_of_the_last_round,
    ],
)
def test_a_planted_mistake_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert_caught(check, range(2000))
