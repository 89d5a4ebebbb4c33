"""The run's machine and the workers' loops together, stale-synchronous, in random schedules.

The machine, its strategy and each worker's `Stream` are the real ones; the shards only know whose
pushes they contain. Messages keep their order but not their time; workers die, come back, evaluate
and have nothing to do; targets that do not hold thaw the run. Every gradient's parameters are
checked, and every schedule must end.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsgd_cli.daemons.computing import Counts
from dsgd_cli.daemons.parameters import Landed
from dsgd_cli.daemons.streams import Stream
from dsgd_cli.engine import events as e
from dsgd_cli.engine.algorithms.stale_synchronous import Clocks, Gate
from dsgd_cli.engine.algorithms.streaming import Streaming
from dsgd_cli.engine.training import Training
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Operation
from tests.engine.schedules import assert_caught, checked, some_places

SHARDS = 2
TENSORS = (("W", (1,)),)
MOST_STEPS = 20_000  # of a schedule that is not stuck, once nothing more goes wrong
STEP_S = 1e-4  # of virtual time: nobody runs out of patience

Who = tuple[int, int]  # worker, incarnation
Contents = Counter[Who]  # of a shard, or of a fetch from it: pushes of each


class Spread:
    """`Parameters`, of which only is known whose pushes they contain."""

    nbytes = 4

    def __init__(self, world: World, who: Who) -> None:
        self.world, self.who = world, who
        self.gradient = SimpleNamespace(flat=np.zeros(1), views={})
        self.scratch = SimpleNamespace(flat=np.zeros(1), views={})
        self.shown = SimpleNamespace(flat=np.zeros(1), views=[])
        self.flight: tuple[Operation, list[int], list[Contents]] | None = None

    def begin(self, operation: Operation) -> None:
        assert self.flight is None
        found: list[Contents] = [Counter() for _ in range(SHARDS)]
        self.flight = operation, self.world.random.sample(range(SHARDS), SHARDS), found

    def fly(self) -> None:
        """The exchange reaches another shard."""
        if self.flight is not None and self.flight[1]:
            operation, shards, found = self.flight
            shard = shards.pop()
            contents = self.world.shards[shard]
            assert not (operation.sends and self.world.frozen), "pushed to a frozen shard"
            contents[self.who] += operation.sends
            found[shard] = contents.copy()

    def settle(self) -> Landed:
        assert self.flight is not None
        operation, shards, found = self.flight
        while shards:
            self.fly()
        if operation.fetches:
            self.shown = SimpleNamespace(flat=np.zeros(1), views=found)
        self.flight = None
        return Landed(operation)

    def based(self) -> None:
        pass


class Worker:
    """One incarnation: its loop, and the messages on their way."""

    def __init__(self, world: World, number: int, incarnation: int) -> None:
        self.world, self.who = world, (number, incarnation)
        self.inbox: deque[e.Decision] = deque()
        self.outbox: deque[e.Event] = deque()
        self.dead = False
        self.ill = world.random.choice([0.0, 0.0, 0.1, 1.0])  # how often a gradient is not finite
        self.streak, self.where = 0, ""
        self.parameters = Spread(world, self.who)
        self.stream = self.make_stream()

    def make_stream(self) -> Stream:
        world = self.world
        algorithm = {"name": "stale_synchronous", "bound": world.bound, "push_every": world.every}
        train = {"algorithm": algorithm, "optimizer": {"name": "sgd", "options": {}}}
        here = world.size(self.who[0])
        data = SimpleNamespace(x=np.zeros(here), y=np.zeros(here), examples=here)
        examples = sum(world.sizes)
        material: Any = SimpleNamespace(data=data, examples=examples, batch_size=world.batch)
        shards: Any = self.parameters
        computing: Any = self
        return Stream(train, material, shards, computing, self.say, self.send, 1)

    # what the loop asks of `Computing`

    def gradient(self, params: Any, x: Any, y: Any, out: Any, counts: Counts) -> tuple[float, bool]:
        self.world.read(self, params)
        counts.examples += len(x)
        return 1.0, self.world.random.random() > self.ill

    def order(self, epoch: int) -> Any:
        return np.arange(self.world.size(self.who[0]))

    # what it says

    def say(self, task: int, done_upto: int, counts: Counts, streak: int) -> None:
        assert streak == 0
        busy_s = 0.05 * counts.steps
        done = counts.steps, counts.examples
        self.outbox.append(e.Report(*self.who, task, done_upto, *done, compute_s=busy_s))

    def send(self, message: pb.FromWorker) -> None:
        for contents in self.world.shards:  # a clock may have had nothing to push
            contents[self.who] = max(contents[self.who], message.ticked.clock)
        self.outbox.append(e.Ticked(*self.who, message.ticked.clock))

    # what it hears

    def obey(self, order: e.Decision) -> None:
        match order:
            case e.Prepare():
                size = self.world.size(self.who[0])
                told = e.Prepared(*self.who, TENSORS, "float32", size, "d", f"of {size}", size)
                self.outbox.append(told)
            case e.Initialise():
                self.outbox.append(e.Initialised(*self.who))
            case e.Grant(_, task):
                wire = pb.Task(id=task.id, start=task.start, stop=task.stop)
                setattr(wire, "pass", task.epoch)
                self.stream.obey("grant", pb.Grant(task=wire))
            case e.Advance(_, limit):
                self.stream.obey("advance", pb.Advance(limit=limit))
            case e.Evaluate(_, evaluation):
                self.stream.evaluated(lambda views, flat: self.evaluated(evaluation))
            case e.Drain():
                self.stream.drain()
                self.outbox.append(e.Drained(*self.who))

    def evaluated(self, evaluation: int) -> None:
        good = self.world.random.random()
        metrics = {"accuracy": good, "loss": 1.0 - good}
        self.outbox.append(e.Evaluated(*self.who, evaluation, metrics))


class World:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.bound, self.every = rng.choice([0, 1, 3]), rng.choice([1, 1, 3])
        examples, self.batch = rng.choice([3, 20, 41]), rng.choice([1, 4])
        self.places = some_places(seed, 4)
        self.sizes = [examples + 5 * each for each in range(1 + max(self.places, default=0))]
        self.until = rng.choice(
            [
                e.Until(max_steps=rng.choice([1, 30, 61])),
                e.Until(max_epochs=2),
                e.Until(accuracy=0.8, max_steps=100),
            ]
        )
        self.machine = Training(
            e.Settings(
                seed=seed,
                batch_size=self.batch,
                until=self.until,
                every=rng.choice([e.Every(3, "step"), e.Every(10, "step"), e.Every()]),
                algorithm={"name": "stale_synchronous", "bound": self.bound},
                places=self.places,
            )
        )
        self.shards: list[Contents] = [Counter() for _ in range(SHARDS)]
        self.frozen = False
        self.workers: dict[int, Worker] = {}
        self.incarnations: Counter[int] = Counter()
        self.jobs: deque[e.Decision] = deque()  # for the servers
        self.since: dict[int, int] = {}  # of those that count: clocks before they did
        self.now_s = 0.0
        self.deaths = self.reads = 0
        self.finish: e.Finish | None = None

    def size(self, worker: int) -> int:
        """How many examples its host has."""
        return self.sizes[self.places[worker] if self.places else 0]

    def run(self) -> e.Finish:
        workers = self.random.choice([1, 2, 3, 4])
        for number in range(len(self.places) or workers):
            self.join(number)
        for _ in range(self.random.choice([100, 400])):
            self.happen()
        for number in [n for n, worker in self.workers.items() if worker.dead]:
            self.lose(number)
        for number in range(max(len(self.places), 1)):
            self.join(number)
        for _ in range(MOST_STEPS):
            if self.finish is not None:
                return self.finish
            self.go_on()
        raise AssertionError(f"stuck in {self.machine.phase}")

    def happen(self) -> None:
        chance, number = self.random.random(), self.random.randrange(4)
        if chance < 0.98 or self.finish is not None:
            self.go_on()
        elif number not in self.workers:
            self.join(number)
        elif self.workers[number].dead:
            self.lose(number)
        else:
            self.workers[number].dead = True
            self.deaths += 1

    def go_on(self) -> None:
        """Somebody goes on, the machine hears something, or time passes."""
        chance = self.random.random()
        if chance < 0.05:
            self.answer() if self.jobs else self.feed(e.Tick())
        elif self.workers:
            worker = self.random.choice(list(self.workers.values()))
            if chance < 0.2:
                worker.parameters.fly()
            elif chance < 0.5:
                if worker.outbox:
                    self.feed(worker.outbox.popleft())
            elif not worker.dead:
                if worker.inbox:
                    worker.obey(worker.inbox.popleft())
                elif worker.stream.busy:
                    worker.stream.batch()

    def join(self, number: int) -> None:
        if number not in self.workers and self.finish is None:
            self.incarnations[number] += 1
            self.workers[number] = Worker(self, number, self.incarnations[number])
            self.feed(e.WorkerJoined(number, self.incarnations[number]))

    def lose(self, number: int) -> None:
        del self.workers[number]
        self.feed(e.WorkerLost(number, self.incarnations[number]))

    def answer(self) -> None:
        """The servers have done what was asked of them first."""
        job = self.jobs.popleft()
        match job:
            case e.Fence():
                self.feed(e.Fenced(job.worker, job.incarnation))
            case e.Freeze():
                self.frozen = True
                self.feed(e.Frozen())
            case e.Thaw():
                self.frozen = False
                self.feed(e.Thawed())
            case e.Export():
                self.feed(e.Exported())
            case e.ConfigureShards():
                self.feed(e.Configured())

    def feed(self, event: e.Event) -> None:
        self.now_s += STEP_S
        for decision in self.machine.on(event, self.now_s):
            assert not isinstance(decision, e.Expel), decision
            if isinstance(decision, e.Finish):
                self.finish = decision
            elif isinstance(decision, e.Fence) or not hasattr(decision, "worker"):
                self.jobs.append(decision)
            else:
                self.workers[decision.worker].inbox.append(decision)
        self.jobs = deque(job for job in self.jobs if not isinstance(job, e.Record | e.Progress))
        if self.machine._strategy is not None:
            clocks = self.clocks
            counts = {n: self.since.get(n, clocks._completed[n]) for n in clocks._counts}
            self.since = counts

    @property
    def clocks(self) -> Clocks:
        strategy: Any = self.machine._strategy
        assert isinstance(strategy, Streaming)
        return strategy._clocks  # type: ignore[return-value]

    def read(self, worker: Worker, hand: list[Contents]) -> None:
        """A gradient of these parameters is computed."""
        self.reads += 1
        gate: Any = worker.stream._gate
        clocks, number = self.clocks, worker.who[0]
        here = clocks._base[number] + gate.clock
        assert here <= clocks.least() + self.bound, "too far ahead"
        assert number in clocks._counts, "nobody waits for it"
        for contents in hand:
            assert contents[worker.who] == gate.clock, "it does not read its writes"
            for other, since in self.since.items():
                needed = here - self.bound - clocks._base[other]
                found = contents[other, self.incarnations[other]]
                assert needed <= max(since, found), f"worker/{number} lacks worker/{other}"


def check(seed: int) -> World:
    world = World(seed)
    finish = world.run()
    until, reached = world.until, finish.outcome in ("converged", "finished")
    assert finish.failure is None
    assert reached or (until.accuracy is not None and finish.steps == until.max_steps)
    if until.accuracy is None and until.max_steps is not None:
        assert finish.steps == until.max_steps
    if until.max_steps is not None:
        assert finish.steps <= until.max_steps
    if not world.deaths:
        assert finish.steps == world.reads
        pushes = {sum(contents.values()) for contents in world.shards}
        assert len(pushes) == 1
    return world


@pytest.mark.parametrize("part", range(4))
def test_schedules(part: int) -> None:
    reads = deaths = 0
    for world in checked(check, range(part * 250, part * 250 + 250)):
        reads, deaths = reads + world.reads, deaths + world.deaths
    assert reads > 5000 and deaths > 200


# ── planted mistakes ───────────────────────────────────────────────────────────────────────────


def count_the_evaluator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Streaming, "away", lambda self, worker: None)


def forget_that_it_is_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Streaming, "back", lambda self, worker: None)


def wait_for_the_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Clocks, "leave", lambda self, worker: None)


def never_fetch_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "_freshen", lambda self: None)


def go_on_with_what_was_evaluated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "away", lambda self: None)


def overrun_max_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Streaming, "_batches_left", lambda self, reached: None)


@pytest.mark.parametrize(
    "mutant",
    [
        count_the_evaluator,
        forget_that_it_is_back,
        wait_for_the_lost,
        never_fetch_anew,
        go_on_with_what_was_evaluated,
        overrun_max_steps,
    ],
)
def test_a_planted_mistake_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert_caught(check, range(400))
