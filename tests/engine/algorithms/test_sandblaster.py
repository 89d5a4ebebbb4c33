"""Sandblaster in a thousand seeded schedules: delays, deaths, copies, evaluations, early ends.

A model of the cluster in virtual time, of which the sums, the vectors, the worker's loop and the
run's state machine are the real ones. Whatever happens, the steps must be those of one worker that
nobody disturbs, and the parameters must be those of the last step whenever somebody looks. Mutants
are planted, and must be caught.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsgd_cli.daemons.computing import Computing, Counts, quiet
from dsgd_cli.daemons.parameters import Parameters
from dsgd_cli.daemons.rounds import Job, Rounds
from dsgd_cli.daemons.run import message_of
from dsgd_cli.engine import events as e
from dsgd_cli.engine import optimizers, portions
from dsgd_cli.engine.algorithms import search
from dsgd_cli.engine.algorithms.sandblaster import Sandblaster
from dsgd_cli.engine.layout import cut
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.portions import Portions
from dsgd_cli.engine.shard import Fenced, RoundOver, Shard
from dsgd_cli.engine.sums import Sums
from dsgd_cli.engine.training import Training
from dsgd_cli.engine.vectors import Gradient, Op, Vectors, together
from dsgd_cli.wire.channels.base import Channel, Exchange, Operation
from tests.engine.schedules import Clockwork, assert_caught, checked, some_places

Vector = np.ndarray[Any, Any]

SIZE = 7
TENSORS = (("w", (SIZE,)),)
BLOCK_BYTES = 16  # two numbers
LAST_FAULT_S = 3.0
END_S = 3000.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Least squares, as users write a model; beyond `cliff` in a parameter there is no loss."""

    method: str
    x: Vector
    y: Vector
    first: Vector
    cliff: float = math.inf

    @property
    def examples(self) -> int:
        return len(self.y)

    def piece(self, number: int, count: int) -> Problem:
        """What one of so many hosts has of the examples: the first has most."""
        ends = [0, *(self.examples - 3 * (count - each) for each in range(1, count)), self.examples]
        rows = slice(ends[number], ends[number + 1])
        return replace(self, x=self.x[rows], y=self.y[rows])

    def gradients(
        self, params: dict[str, Vector], x: Vector, y: Vector, out: dict[str, Vector]
    ) -> float:
        w = params["w"]
        if np.abs(w).max() > self.cliff:
            out["w"][:] = math.nan
            return math.nan
        rest = x @ w - y
        np.matmul(x.T, rest, out=out["w"])
        out["w"] /= len(y)
        return 0.5 * float(rest @ rest) / len(y)

    def gradient_sum(self, w: Vector) -> Vector:
        """Of all examples; workers contribute zeros where there is no loss."""
        if np.abs(w).max() > self.cliff:
            return np.zeros(SIZE)
        summed: Vector = self.x.T @ (self.x @ w - self.y)
        return summed


@functools.cache
def problem_of(number: int) -> Problem:
    rng = np.random.default_rng(number)
    method = ["lbfgs", "lbfgs", "conjugate_gradient", "gradient_descent"][number % 4]
    examples = [24, 14, 40][number % 3]
    widest = 1.5 if method == "gradient_descent" else 3.0
    x = np.linalg.qr(rng.standard_normal((examples, SIZE)))[0] * np.linspace(1.0, widest, SIZE)
    x = np.sqrt(examples) * x @ np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    y = x @ rng.standard_normal(SIZE) + 0.1 * rng.standard_normal(examples)
    if number % 5:
        return Problem(method, x, y, rng.standard_normal(SIZE))
    # The first step along the gradient leads over the cliff.
    return Problem(method, x, x @ np.full(SIZE, 0.02), np.zeros(SIZE), 0.1)


PROBLEMS = 12


@dataclass
class Step:
    loss: float
    x: Vector


class Recorder:
    """Around the method: what its steps are, and the parameters at that moment."""

    def __init__(self, method: search.Method, world: Simulation) -> None:
        self.method, self.world = method, world

    def send(self, answer: search.Answer) -> search.Request:
        request = self.method.send(answer)
        if isinstance(request, search.Step):
            self.world.stepped(request)
        return request


@dataclass(eq=False)
class Worker:
    """One incarnation. `cut` once nobody listens to it; then it may go on as a zombie."""

    number: int
    incarnation: int
    example_s: float
    cut: bool = False
    dead: bool = False
    stalls_s: float = 0.0
    busy: bool = False
    inbox: deque[e.Decision] = field(default_factory=deque)
    loop: Rounds | None = None
    computing: Any = None
    said: list[e.Report] = field(default_factory=list)  # after the contribution that is under way
    sending: list[tuple[int, Exchange, bytes]] = field(default_factory=list)
    computed: int = 0  # examples, in the batch in hand
    sent_until: float = 0.0
    heard_until: float = 0.0


class Wire:
    """A worker's channel to a shard. What it contributes is under way until the world says so."""

    def __init__(self, worker: Worker, index: int, shard: Shard) -> None:
        self.worker, self.index, self.shard = worker, index, shard
        self.exchange: Exchange | None = None

    def begin(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def advance(self) -> bool:
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        if exchange.operation is Operation.CONTRIBUTE:
            assert exchange.data is not None
            self.worker.sending.append((self.index, exchange, bytes(exchange.data)))
        else:
            assert exchange.into is not None
            self._pull(exchange, exchange.into)
        return True

    def _pull(self, exchange: Exchange, into: memoryview) -> None:
        place, shard = 0, self.shard
        for block in range(shard.blocks):
            data = shard.read(block)
            if not exchange.since or shard.version(block) > exchange.since[block]:
                into[place : place + len(data)] = data
            place += len(data)
        exchange.versions = [shard.version(block) for block in range(shard.blocks)]

    def close(self) -> None:
        """Nothing is open."""


class Simulation(Clockwork):
    """One schedule. `run` returns the `Finish`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = rng = random.Random(seed)
        self.number = rng.randrange(PROBLEMS)
        self.problem = problem_of(self.number)
        self.faults = rng.random() < 0.8
        self.workers_wanted = rng.randint(1, 5)
        self.places = some_places(seed, self.workers_wanted)
        self.servers = rng.randint(1, 3)
        self.rows = rng.choice([1, 3, 100])
        self.share = rng.choice([1, 2, 4])
        self.speeds: Sequence[float] = [1e-4, 1e-3, 1e-2]
        self.until = rng.choice(
            [
                e.Until(),
                e.Until(),
                e.Until(max_steps=4),
                e.Until(max_epochs=rng.randint(1, 9)),
                e.Until(max_time_s=rng.random()),
                e.Until(accuracy=0.9),
            ]
        )
        self.every = rng.choice([e.Every(), e.Every(3), e.Every(1, "step"), e.Every(0.1, "s")])
        self.expected: list[Step] | None = None
        self.setup()

    def setup(self) -> None:
        algorithm = {
            "name": "sandblaster",
            "method": self.problem.method,
            "memory": 3,
            "l2": 0.01,
            "tolerance": 1e-5,
            "portions": self.share,
            "rows": self.rows,
        }
        self.machine = Training(
            e.Settings(
                seed=0,
                batch_size=None,
                until=self.until,
                every=self.every,
                algorithm=algorithm,
                workers=self.workers_wanted,
                dtype="float64",
                places=self.places,
            )
        )
        self.layout = cut(TENSORS, "float64", self.servers, BLOCK_BYTES)
        self.shards: list[Shard] = []
        self.vectors: list[Vectors] = []
        self.train = {"algorithm": algorithm}
        pieces = 1 + max(self.places, default=0)
        self.materials: list[Any] = [
            SimpleNamespace(model=self.problem, data=piece, batch_size=self.rows)
            for piece in (self.problem.piece(each, pieces) for each in range(pieces))
        ]
        self.jobs: deque[e.Decision] = deque()
        self.workers: dict[int, Worker] = {}  # the sessions that the coordinator knows
        self.hung = 0  # for ever
        self.incarnations: Counter[int] = Counter()
        self.steps: list[Step] = []
        self.decided: Counter[str] = Counter()
        self.finish: e.Finish | None = None

    # ── the world's clockwork ──────────────────────────────────────────────────────────────────

    def delay(self) -> float:
        return self.random.choice([0.0, 0.0, 0.001, 0.01 * self.random.random()])

    def run(self) -> e.Finish:
        for number in range(self.workers_wanted):
            self.after(self.delay(), functools.partial(self.join, number))
        if self.random.random() < 0.1:
            self.after(self.random.random(), lambda: self.feed(e.StopRequested("asked")))
        self.after(0.05, self.tick)
        with quiet():
            while self.agenda and self.finish is None and self.now < END_S:
                self.next()
        assert self.finish is not None, f"still {self.machine.phase} after {self.now:.0f} s"
        return self.finish

    def tick(self) -> None:
        self.feed(e.Tick())
        self.after(0.05 if self.now < 10.0 else 1.0, self.tick)

    # ── who is there ───────────────────────────────────────────────────────────────────────────

    def join(self, number: int) -> None:
        self.incarnations[number] += 1
        worker = Worker(number, self.incarnations[number], self.random.choice(self.speeds))
        self.workers[number] = worker
        self.feed(e.WorkerJoined(number, worker.incarnation))
        if self.faults and self.random.random() < 0.6:
            fault = self.hang if self.random.random() < 0.3 else self.lose
            self.after(self.random.random() ** 2, lambda: fault(worker))

    def hang(self, worker: Worker) -> None:
        """What it does next takes long, or, for two of them, for ever."""
        stalls_s = self.random.choice([0.1, 1.0, 5.0, math.inf])
        self.hung += math.isinf(stalls_s)
        worker.stalls_s = stalls_s if self.hung <= 2 else 5.0

    def lose(self, worker: Worker) -> None:
        """Killed, or only cut off: a zombie goes on contributing until it is fenced."""
        if worker.cut or self.now > LAST_FAULT_S:
            return
        worker.dead = self.random.random() < 0.6
        worker.cut = True
        del self.workers[worker.number]
        again = functools.partial(self.join, worker.number)
        if self.random.random() < 0.3:  # the new session is there before the loss is noticed
            again()
        else:
            self.after(self.delay() + self.random.choice([0.0, 0.3]), again)
            self.feed(e.WorkerLost(worker.number, worker.incarnation))

    def partition(self, worker: Worker) -> int:
        return self.places[worker.number] if self.places else 0

    def expel(self, expel: e.Expel) -> None:
        worker = self.workers.pop(expel.worker)
        worker.cut = True
        self.after(self.delay(), functools.partial(self.join, worker.number))

    # ── messages ───────────────────────────────────────────────────────────────────────────────

    def send(self, worker: Worker, event: e.Event) -> None:
        """Worker to coordinator, in order; what is on its way may outlive the session."""
        worker.sent_until = max(worker.sent_until, self.now + self.delay())
        self.at(worker.sent_until, lambda: self.feed(event))

    def tell(self, decision: Any) -> None:
        """Coordinator to worker, in order."""
        worker = self.workers[decision.worker]
        worker.heard_until = max(worker.heard_until, self.now + self.delay())

        def hear() -> None:
            if not worker.cut:
                worker.inbox.append(decision)
                self.work(worker)

        self.at(worker.heard_until, hear)

    def feed(self, event: e.Event) -> None:
        if self.finish is not None:
            return
        for decision in self.machine.on(event, self.now):
            self.carry_out(decision)
        strategy = self.machine._strategy
        if isinstance(strategy, Sandblaster) and not isinstance(strategy._method, Recorder):
            strategy._method = Recorder(strategy._method, self)  # type: ignore[assignment]

    def carry_out(self, decision: e.Decision) -> None:
        assert self.finish is None, "a decision after Finish"
        self.decided[type(decision).__name__] += 1
        match decision:
            case e.Record() | e.Progress():
                pass
            case e.Finish():
                self.finish = decision
            case e.Expel():
                self.expel(decision)
            case (
                e.Prepare()
                | e.Initialise()
                | e.Start()
                | e.Work()
                | e.Late()
                | e.Evaluate()
                | e.Drain()
            ):
                if isinstance(decision, e.Work):
                    mine = self.partition(self.workers[decision.worker])
                    assert decision.task.partition == mine, "it does not have these examples"
                self.tell(decision)
            case _:
                self.jobs.append(decision)
                if len(self.jobs) == 1:
                    self.next_job()

    # ── the servers: one job after the other ───────────────────────────────────────────────────

    def next_job(self) -> None:
        job = self.jobs[0]
        if isinstance(job, e.ConfigureShards):
            self.configure()
        if isinstance(job, e.Operate):
            self.check_sums(job.ops)
        said: list[tuple[float, ...]] = []
        at = self.now
        for index in range(self.servers):
            at += self.delay()
            self.at(at, functools.partial(self.do_job, job, index, said))
        self.at(at + self.delay(), lambda: self.job_done(job, said))

    def configure(self) -> None:
        optimizer = optimizers.make("sgd", {"learning_rate": 1.0}, "float64")
        for part in self.layout.shards:
            values = np.zeros(part.stop - part.start)
            self.shards.append(Shard(values, self.layout.block_elements, optimizer, rounds=True))
        self.vectors = [Vectors(shard, "float64") for shard in self.shards]

    def do_job(self, job: e.Decision, index: int, said: list[tuple[float, ...]]) -> None:
        shard = self.shards[index]
        match job:
            case e.Operate(number, ops):
                said.append(self.vectors[index].do(number, ops))
                if self.random.random() < 0.1:  # the answer was late, so it was asked again
                    said[-1] = self.vectors[index].do(number, ops)
            case e.Fence(worker, incarnation):
                shard.fence(worker, incarnation)
            case e.Freeze():
                shard.freeze()
            case e.Thaw():
                shard.thaw()

    def job_done(self, job: e.Decision, said: list[tuple[float, ...]]) -> None:
        self.jobs.popleft()
        if self.jobs:
            self.next_job()
        match job:
            case e.ConfigureShards():
                self.feed(e.Configured())
            case e.Operate(number, ops):
                self.feed(e.Operated(number, together(ops, said)))
            case e.Fence(worker, incarnation):
                self.feed(e.Fenced(worker, incarnation))
            case e.Freeze():
                self.feed(e.Frozen())
            case e.Thaw():
                self.feed(e.Thawed())
            case e.Export():
                self.check_parameters(self.x, "exported")
                self.feed(e.Exported())

    @property
    def x(self) -> Vector:
        blocks = [shard.values(block) for shard in self.shards for block in range(shard.blocks)]
        return np.concatenate(blocks)

    # ── what must be true ──────────────────────────────────────────────────────────────────────

    def check_sums(self, ops: Sequence[Op]) -> None:
        """Each portion counts once on every shard, with the gradient at these parameters."""
        for op in ops:
            if not isinstance(op, Gradient):
                continue
            summed = [
                shard.summed(block, op.round, op.parts)
                for shard in self.shards
                for block in range(shard.blocks)
            ]
            expected = self.problem.gradient_sum(self.x)
            right = np.allclose(np.concatenate(summed), expected, rtol=1e-9, atol=1e-9)
            assert right, "these are not the gradients of all portions, once each"

    def stepped(self, step: search.Step) -> None:
        """It is the step that one worker alone would have taken."""
        assert step.number == len(self.steps)
        self.steps.append(Step(step.loss, self.x.copy()))
        if self.expected is None:
            return
        assert step.number < len(self.expected), "it does not end where it should"
        expected = self.expected[step.number]
        assert math.isclose(step.loss, expected.loss, rel_tol=1e-9), f"loss of {step}"
        assert np.allclose(self.x, expected.x, rtol=1e-9, atol=1e-9)

    def check_parameters(self, x: Vector, what: str) -> None:
        """They are those of the last step."""
        last = self.steps[-1].x if self.steps else self.problem.first
        assert np.array_equal(x, last), f"{what} in the middle of a step"

    # ── a worker ───────────────────────────────────────────────────────────────────────────────

    def work(self, worker: Worker) -> None:
        """Go on with whatever is next: what the coordinator says, else the next batch."""
        while not worker.busy and not worker.dead:
            if worker.inbox:
                self.obey(worker, worker.inbox.popleft())
            elif worker.loop is not None and worker.loop.busy:
                self.batch(worker, worker.loop)
            else:
                return

    def obey(self, worker: Worker, decision: e.Decision) -> None:
        who = (worker.number, worker.incarnation)
        match decision:
            case e.Prepare():
                partition = self.partition(worker)
                n, data = self.materials[partition].data.examples, f"data {partition}"
                self.send(worker, e.Prepared(*who, TENSORS, "float64", n, "d", data, n))
            case e.Initialise():
                self.initialise()
                self.send(worker, e.Initialised(*who))
            case e.Start():
                self.start(worker)
            case e.Evaluate():
                self.busy(worker, self.delay(), lambda: self.evaluate(worker, decision))
            case e.Drain():
                assert worker.loop is not None
                worker.loop.drain()
                self.send(worker, e.Drained(*who))
            case _:
                assert worker.loop is not None
                message = message_of(decision, 1)
                kind = message.WhichOneof("kind") or ""
                worker.loop.obey(kind, getattr(message, kind))

    def initialise(self) -> None:
        for shard, part in zip(self.shards, self.layout.shards, strict=True):
            values = self.problem.first[part.start : part.stop]
            for block in range(shard.blocks):
                start = block * self.layout.block_elements
                shard.write(block, values[start : start + self.layout.block_elements])

    def start(self, worker: Worker) -> None:
        wires: list[Channel] = [Wire(worker, i, shard) for i, shard in enumerate(self.shards)]
        parameters = Parameters(self.layout, wires)
        parameters.pull()
        material = self.materials[self.partition(worker)]
        worker.computing = Computing(material, 0)

        def say(task: int, done_upto: int, counts: Counts, streak: int, round_: int) -> None:
            about = {"nonfinite_streak": streak, "round": round_}
            who = (worker.number, worker.incarnation)
            worker.said.append(e.Report(*who, task, done_upto, **asdict(counts), **about))
            worker.computed += counts.examples

        worker.loop = Rounds(
            self.train, material, parameters, worker.computing, say, lambda message: None, 1
        )

    def busy(self, worker: Worker, for_s: float, then: Callable[[], None]) -> None:
        worker.busy = True
        for_s, worker.stalls_s = for_s + worker.stalls_s, 0.0

        def done() -> None:
            worker.busy = False
            if not worker.dead:
                then()
                self.work(worker)

        if for_s < math.inf:
            self.after(for_s, done)

    def evaluate(self, worker: Worker, evaluate: e.Evaluate) -> None:
        assert worker.loop is not None
        if not worker.cut:
            worker.loop.evaluated(lambda views, flat: self.check_parameters(flat, "evaluated"))
        metrics = {"loss": 1.0, "accuracy": self.random.random() ** 0.3}
        who = (worker.number, worker.incarnation)
        self.send(worker, e.Evaluated(*who, evaluate.evaluation_id, metrics))

    def batch(self, worker: Worker, loop: Rounds) -> None:
        """The real loop computes at once; what it sends and says comes when that is over."""
        rows = min(self.rows, loop._todo[0].task.stop - loop._todo[0].at)
        loop.batch()
        self.busy(worker, worker.example_s * rows, lambda: self.contribute(worker))

    def contribute(self, worker: Worker) -> None:
        """Shard by shard; a worker may die in the middle, and what is under way may arrive."""
        sending, worker.sending = worker.sending, []
        said, worker.said = worker.said, []
        if not sending:
            return
        refused: list[Exception] = []
        at = self.now
        worker.busy = True
        self.random.shuffle(sending)
        for index, exchange, data in sending:
            at += self.delay()
            arrives = self.random.random() < 0.3
            piece = functools.partial(self.arrive, worker, index, exchange, data, refused, arrives)
            self.at(at, piece)

        def answered() -> None:
            worker.busy = False
            if not refused and not worker.dead:
                for report in said:
                    self.send(worker, report)
            self.work(worker)

        self.at(at, answered)

    def arrive(
        self,
        worker: Worker,
        index: int,
        exchange: Exchange,
        data: bytes,
        refused: list[Exception],
        arrives: bool,
    ) -> None:
        if worker.dead and not arrives:
            return
        shard, values = self.shards[index], np.frombuffer(data)
        who, place = (worker.number, worker.incarnation), 0
        try:
            for block, size in enumerate(shard.sizes):
                part = values[place : place + size]
                shard.contribute(*who, exchange.seq, exchange.tag, block, part)
                place += size
        except Fenced as fenced:
            refused.append(fenced)
            worker.dead = True
        except RoundOver as over:
            refused.append(over)


class Undisturbed(Simulation):
    """One worker, one server, nothing in between."""

    def __init__(self, number: int) -> None:
        super().__init__(0)
        self.number, self.problem, self.faults = number, problem_of(number), False
        self.workers_wanted = self.servers = self.share = 1
        self.places = ()
        self.until, self.every = e.Until(max_time_s=1e9), e.Every(1e9, "s")
        self.random = random.Random(1)
        self.setup()

    def delay(self) -> float:
        return 0.0


@functools.cache
def undisturbed(number: int) -> list[Step]:
    world = Undisturbed(number)
    assert "no gradient is larger" in world.run().reason
    return world.steps


def check(seed: int) -> Simulation:
    """One schedule, with what must be true at its end."""
    world = Simulation(seed)
    world.expected = undisturbed(world.number)
    finish = world.run()
    assert finish.outcome in ("converged", "finished", "stopped"), finish
    if not finish.exported:  # there is nothing yet
        assert finish.reason == "asked"
        assert not world.steps
        return world
    assert finish.steps == max(0, len(world.steps) - 1)
    world.check_parameters(world.x, "ended")
    if "no gradient is larger" in finish.reason:
        assert len(world.steps) == len(world.expected)
        assert finish.outcome != ("converged" if world.until.accuracy is None else "finished")
    return world


@pytest.mark.parametrize("part", range(4))
def test_schedules(part: int) -> None:
    reasons: Counter[str] = Counter()
    decided: Counter[str] = Counter()
    for world in checked(check, range(part * 200, part * 200 + 200)):
        assert world.finish is not None
        reasons[world.finish.reason.split()[0]] += 1
        decided += world.decided
    assert reasons["no"] > 50  # gradient is larger
    assert min(reasons[why] for why in ("max_steps", "max_epochs", "max_time", "asked")) > 5
    assert min(decided[what] for what in ("Late", "Fence", "Expel", "Evaluate", "Thaw")) > 5


# ── stragglers ─────────────────────────────────────────────────────────────────────────────────


class Straggler(Simulation):
    """Four workers, one of them slower; computing is all that takes time."""

    EXAMPLE_S, EXAMPLES = 0.1, 400

    def __init__(self, times: float) -> None:
        super().__init__(0)
        self.times = times
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.EXAMPLES, SIZE))
        y = x @ rng.standard_normal(SIZE) + rng.standard_normal(self.EXAMPLES)
        self.problem, self.faults = Problem("lbfgs", x, y, np.zeros(SIZE)), False
        self.workers_wanted, self.servers, self.rows, self.share = 4, 2, 100, 20
        self.places = ()
        self.until, self.every = e.Until(), e.Every(1e9, "s")
        self.setup()

    def delay(self) -> float:
        return 1e-4

    def join(self, number: int) -> None:
        self.speeds = [self.EXAMPLE_S * (self.times if number == 3 else 1.0)]
        super().join(number)

    def tick(self) -> None:
        self.feed(e.Tick())
        self.after(0.2, self.tick)

    def slowdown(self) -> float:
        """How much longer it took than the speeds of all together allow."""
        self.run()
        strategy = self.machine._strategy
        assert strategy is not None
        speed = (3.0 + 1.0 / self.times) / self.EXAMPLE_S
        return self.now / (strategy.epochs * self.EXAMPLES / speed)


@pytest.mark.parametrize("times", [1.0, 5.0, 20.0])
def test_a_straggler_costs_no_more_than_its_speed(times: float) -> None:
    world = Straggler(times)
    assert 1.0 < world.slowdown() < 1.3
    if times > 1.0:
        assert world.decided["Late"] >= len(world.steps)


def test_without_copies_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "LATE", math.inf)
    world = Straggler(20.0)
    assert world.slowdown() > 2.0
    assert world.decided["Late"] == 0


# ── planted mistakes ───────────────────────────────────────────────────────────────────────────


def sum_every_copy(patch: pytest.MonkeyPatch) -> None:
    is_new = Sums.is_new

    def mutant(self: Sums, block: int, round_: int, part: int) -> bool:
        is_new(self, block, round_, part)
        return True

    patch.setattr(Sums, "is_new", mutant)


def add_old_rounds_to_new_ones(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Sums, block: int, round_: int, part: int) -> bool:
        return round_ > self._rounds[block] or part not in self._parts[block]

    patch.setattr(Sums, "is_new", mutant)


def count_the_loss_of_every_copy(patch: pytest.MonkeyPatch) -> None:
    done = Portions.done

    def mutant(
        self: Portions, worker: int, portion: int, now_s: float
    ) -> tuple[bool, tuple[int, ...]]:
        return True, done(self, worker, portion, now_s)[1]

    patch.setattr(Portions, "done", mutant)
    patch.setattr(Sandblaster, "_cancel", lambda self, portion, workers: None)


def mix_up_the_partitions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partitions, "of", lambda self, worker: 0)


def let_the_dead_keep_their_portions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Portions, "leave", lambda self, worker: None)


def let_the_dead_keep_their_copies(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Sandblaster, worker: int) -> None:
        if self._portions is not None:
            self._portions.leave(worker)

    patch.setattr(Sandblaster, "withdraw", mutant)


def compute_with_the_parameters_of_the_last_pass(patch: pytest.MonkeyPatch) -> None:
    work = Rounds._work

    def mutant(self: Rounds, body: Any) -> None:
        fetch = self._fetch
        work(self, body)
        self._fetch = fetch

    patch.setattr(Rounds, "_work", mutant)


def drop_the_fetch_with_the_portion(patch: pytest.MonkeyPatch) -> None:
    drop = Rounds._drop

    def mutant(self: Rounds, task_id: int) -> None:
        drop(self, task_id)
        self._fetch = False

    patch.setattr(Rounds, "_drop", mutant)


def change_the_parameters_unnoticed(patch: pytest.MonkeyPatch) -> None:
    assign = Shard.assign

    def mutant(self: Shard, block: int, values: Vector) -> None:
        assign(self, block, values)
        self._version[block] -= 1

    patch.setattr(Shard, "assign", mutant)


def evaluate_what_is_in_hand(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Rounds, evaluate: Callable[[Any, Vector], None]) -> None:
        evaluate(self._shards.shown.views, self._shards.shown.flat)

    patch.setattr(Rounds, "evaluated", mutant)


def evaluate_in_the_middle_of_a_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sandblaster, "rests", True)


def end_in_the_middle_of_a_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sandblaster, "end", lambda self: iter(()))


def operate_again_when_asked_again(patch: pytest.MonkeyPatch) -> None:
    do = Vectors.do

    def mutant(self: Vectors, number: int, ops: Sequence[Op]) -> tuple[float, ...]:
        self._number = number - 1
        return do(self, number, ops)

    patch.setattr(Vectors, "do", mutant)


def take_a_trial_too_far_for_the_end(patch: pytest.MonkeyPatch) -> None:
    sum_ = Rounds._sum

    def mutant(self: Rounds, job: Job, buffer: Any, rows: int) -> None:
        sum_(self, job, buffer, rows)
        if not job.finite:
            job.streak = self._computing.streak

    patch.setattr(Rounds, "_sum", mutant)


@pytest.mark.parametrize(
    "mutant",
    [
        sum_every_copy,
        add_old_rounds_to_new_ones,
        count_the_loss_of_every_copy,
        mix_up_the_partitions,
        let_the_dead_keep_their_portions,
        let_the_dead_keep_their_copies,
        compute_with_the_parameters_of_the_last_pass,
        drop_the_fetch_with_the_portion,
        change_the_parameters_unnoticed,
        evaluate_what_is_in_hand,
        evaluate_in_the_middle_of_a_step,
        end_in_the_middle_of_a_step,
        operate_again_when_asked_again,
        take_a_trial_too_far_for_the_end,
    ],
)
def test_a_planted_mistake_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(PROBLEMS):
        undisturbed(number)
    mutant(monkeypatch)
    assert_caught(check, range(600))
