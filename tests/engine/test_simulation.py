"""Thousands of seeded schedules of deaths, hangs, restarts, zombies, delays, stale messages.

A model of the cluster (sessions that keep order, workers that compute in virtual time, one shard
that knows who pushed which position) carries out what `Training` decides and checks the promises
on the way; in a third of the schedules hosts have different examples. Mutants of the machine are
planted, and must be caught.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from dsgd_cli.engine import convergence, patience, training
from dsgd_cli.engine import events as e
from dsgd_cli.engine.algorithms.streaming import Streaming
from dsgd_cli.engine.evaluations import Evaluation
from dsgd_cli.engine.members import Member, Members, MemberState
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import Remainder, TaskQueue
from dsgd_cli.engine.training import Phase, Training
from tests.engine.schedules import Clockwork, assert_caught, checked, some_places

TENSORS = (("W", (4, 2)),)
LAST_FAULT_S = 3.0
END_S = 4000.0
STOP_S = patience.STOP_S + 1.0  # a tick, and what the shards take to answer


@dataclass
class Worker:
    """One incarnation: what it holds, and how far it is. `cut` once nobody listens to it."""

    number: int
    incarnation: int
    batch_s: float
    cut: bool = False
    dead: bool = False
    stalls_s: float = 0.0  # so long hangs what it does next
    hung_until: float = 0.0
    prepared: bool = False
    started: bool = False
    busy: bool = False
    drain: bool = False
    tasks: list[e.Task] = field(default_factory=list)
    at: int = 0  # computed up to here in tasks[0]
    pushed: int = 0
    unreported: int = 0
    evaluations: list[e.Evaluate] = field(default_factory=list)
    sent_until: float = 0.0
    heard_until: float = 0.0


@dataclass
class Shard:
    """Which positions are in the parameters, how often; who is refused."""

    applied: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    fence: Counter[int] = field(default_factory=Counter)
    frozen: bool = False

    def push(self, worker: Worker, positions: list[tuple[int, int, int]]) -> bool:
        if worker.incarnation < self.fence[worker.number] or (self.frozen and worker.cut):
            return False
        assert not self.frozen, f"worker/{worker.number} pushed to a frozen shard"
        self.applied.update(positions)
        return True


class Simulation(Clockwork):
    """One schedule. `run` returns the `Finish`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = rng = random.Random(seed)
        self.faults = rng.random() < 0.8
        self.n = rng.choice([1, 7, 24, 60])
        self.batch = rng.choice([1, 4, 5])
        self.places = some_places(seed, 2 + seed // 6 % 3)
        self.sizes = [self.n + 7 * each for each in range(1 + max(self.places, default=0))]
        self.settings = e.Settings(
            seed=seed,
            batch_size=self.batch,
            until=rng.choice(
                [
                    e.Until(accuracy=0.9, max_epochs=4),
                    e.Until(accuracy=0.9, max_time_s=6.0),
                    e.Until(accuracy=0.9, max_steps=17, max_time_s=20.0),
                    e.Until(loss=0.1, accuracy=0.9),
                    e.Until(max_epochs=3),
                ]
            ),
            every=rng.choice([e.Every(), e.Every(2), e.Every(3, "step"), e.Every(0.3, "s")]),
            workers=max(len(self.places), 1),
            places=self.places,
        )
        self.machine = Training(self.settings)
        self.shard = Shard()
        self.workers: dict[int, Worker] = {}  # the sessions that the coordinator knows
        self.incarnations: Counter[int] = Counter()
        self.unfenced: dict[tuple[int, int], list[e.Task]] = {}
        self.evaluating: dict[int, set[int]] = {}  # evaluation -> those who have not answered
        self.answers: dict[int, dict[int, dict[str, float]]] = {}  # evaluation -> partition -> …
        self.quality = 0.0
        self.frozen_metrics: dict[str, float] | None = None  # of the last frozen evaluation
        self.stopped_s = math.inf
        self.finish: e.Finish | None = None
        self.deaths = 0

    # ── the world's clockwork ──────────────────────────────────────────────────────────────────

    def delay(self) -> float:
        return self.random.choice([0.0, 0.001, 0.01, 0.2 * self.random.random()])

    def run(self) -> e.Finish:
        chosen = self.random.choice([1, 2, 4])
        for number in range(len(self.places) or chosen):
            self.after(self.delay(), lambda number=number: self.join(number))  # type: ignore[misc]
        if self.random.random() < 0.15:
            self.after(3 * self.random.random(), self.stop)
        self.after(0.1, self.tick)
        while self.agenda and self.now < END_S:
            self.next()
        assert self.finish is not None, f"still {self.machine.phase} after {END_S} s"
        return self.finish

    def tick(self) -> None:
        self.feed(e.Tick())
        if self.finish is None:
            self.after(0.1 if self.now < 20.0 or self.stopped else 1.0, self.tick)

    @property
    def stopped(self) -> bool:
        return self.stopped_s < math.inf

    def stop(self) -> None:
        self.stopped_s = self.now
        self.feed(e.StopRequested("asked"))

    def join(self, number: int) -> None:
        self.incarnations[number] += 1
        speed = self.random.choice([0.001, 0.01, 0.1])
        self.workers[number] = Worker(number, self.incarnations[number], speed)
        self.feed(e.WorkerJoined(number, self.incarnations[number]))
        if self.faults and self.random.random() < 0.7:
            worker = self.workers[number]
            fault = self.hang if self.random.random() < 0.2 else self.lose
            self.after(2.0 * self.random.random() ** 2, lambda: fault(worker))

    def hang(self, worker: Worker) -> None:
        """What it does next takes long, or for ever."""
        if self.now <= LAST_FAULT_S:
            worker.stalls_s = self.random.choice([3.0, 8.0, 60.0, math.inf])

    def lose(self, worker: Worker) -> None:
        """Killed, or only cut off: a zombie goes on pushing until it is fenced."""
        if worker.cut or self.now > LAST_FAULT_S or self.finish is not None:
            return
        worker.dead = self.random.random() < 0.6
        self.cut(worker)
        again_s = self.delay() + self.random.choice([0.0, 0.5])
        if self.random.random() < 0.3:  # the new session is there before the loss is noticed
            self.join(worker.number)
        else:
            self.after(again_s, lambda: self.join(worker.number))
            self.feed(e.WorkerLost(worker.number, worker.incarnation))

    def cut(self, worker: Worker) -> None:
        self.deaths += 1
        worker.cut = True
        del self.workers[worker.number]
        self.unfenced[worker.number, worker.incarnation + 1] = list(worker.tasks)
        self.drop_evaluations(worker.number)

    def expel(self, expel: e.Expel) -> None:
        """The coordinator ends the session; if it was only slow, it goes on as a zombie."""
        worker = self.workers[expel.worker]
        assert worker.incarnation == expel.incarnation
        news_s = 1.0  # may be on their way
        assert self.now < worker.hung_until + news_s, f"{expel}, but it is at work"
        self.cut(worker)
        lost = e.WorkerLost(worker.number, worker.incarnation)
        self.after(self.delay(), lambda: self.feed(lost))
        self.after(self.delay(), lambda: self.join(worker.number))

    # ── messages ───────────────────────────────────────────────────────────────────────────────

    def send(self, worker: Worker, event: e.Event) -> None:
        """Worker to coordinator, in order; what is on its way may outlive the session."""
        at = max(worker.sent_until, self.now + self.delay())
        worker.sent_until = at
        self.at(at, lambda: self.feed(event))

    def tell(self, number: int, do: Callable[[Worker], None]) -> None:
        """Coordinator to worker, in order."""
        worker = self.workers[number]
        at = max(worker.heard_until, self.now + self.delay())
        worker.heard_until = at
        self.at(at, lambda: None if worker.cut else do(worker))

    def feed(self, event: e.Event) -> None:
        before = self.finish
        if isinstance(event, e.Evaluated) and event.evaluation_id in self.evaluating:
            worker = self.workers.get(event.worker)
            if worker is not None and worker.incarnation == event.incarnation:
                self.answered(event)
        if isinstance(event, e.Drained):
            self.drained(event)
        decisions = self.machine.on(event, self.now)
        assert before is None or not decisions, "a decision after Finish"
        for decision in decisions:
            self.carry_out(decision)

    def answered(self, event: e.Evaluated) -> None:
        """When all have answered, the metrics are the means over all examples."""
        answers = self.answers.setdefault(event.evaluation_id, {})
        answers[self.partition(event.worker)] = dict(event.metrics)
        self.evaluating[event.evaluation_id].discard(event.worker)
        if self.evaluating[event.evaluation_id]:
            return
        del self.evaluating[event.evaluation_id]
        if self.shard.frozen and self.machine.phase is Phase.JUDGING:
            self.frozen_metrics = {
                name: sum(answers[each][name] * size for each, size in enumerate(self.sizes))
                / sum(self.sizes)
                for name in event.metrics
            }

    def partition(self, worker: int) -> int:
        return self.places[worker] if self.places else 0

    def drained(self, event: e.Drained) -> None:
        """Evaluations that the worker dropped are no longer under way."""
        worker = self.workers.get(event.worker)
        if worker is None or worker.incarnation != event.incarnation:
            return
        self.drop_evaluations(event.worker)

    def drop_evaluations(self, number: int) -> None:
        for evaluation, who in list(self.evaluating.items()):
            if number in who:
                del self.evaluating[evaluation]

    # ── decisions ──────────────────────────────────────────────────────────────────────────────

    def carry_out(self, decision: e.Decision) -> None:
        assert self.finish is None, "a decision after Finish"
        number = getattr(decision, "worker", None)
        if number is not None and not isinstance(decision, e.Fence):
            assert number in self.workers, f"{decision} is for a worker that is gone"
        match decision:
            case e.Prepare():
                self.tell(decision.worker, lambda worker: self.prepare(worker))
            case e.ConfigureShards():
                self.after(self.delay(), lambda: self.feed(e.Configured()))
            case e.Initialise():
                assert not self.unfenced_writers(), "two initialisers at once"
                self.tell(
                    decision.worker,
                    lambda w: self.send(w, e.Initialised(w.number, w.incarnation)),
                )
            case e.Start():
                self.workers[decision.worker].started = True
                assert self.workers[decision.worker].prepared, "started before it is prepared"
            case e.Grant():
                self.granted(decision)
            case e.Evaluate():
                self.evaluate(decision)
            case e.Expel():
                self.expel(decision)
            case e.Fence():
                self.after(self.delay(), lambda: self.fence(decision))
            case e.Drain():
                self.tell(decision.worker, self.drain)
            case e.Freeze():
                self.shard.frozen = True
                self.after(self.delay(), lambda: self.feed(e.Frozen()))
            case e.Thaw():
                self.after(self.delay(), self.thaw)
            case e.Export():
                assert self.shard.frozen, "exported while pushes are taken"
                self.after(self.delay(), lambda: self.feed(e.Exported()))
            case e.Record():
                self.check_record(decision)
            case e.Finish():
                self.finish = decision
                assert self.now < self.stopped_s + STOP_S, "it does not stop when asked"

    def unfenced_writers(self) -> bool:
        return self.machine.phase is Phase.INITIALISING and bool(self.machine._fences)

    def prepare(self, worker: Worker) -> None:
        worker.prepared = True
        partition = self.partition(worker.number)
        size, who = self.sizes[partition], (worker.number, worker.incarnation)
        data = f"data {partition}"
        self.send(worker, e.Prepared(*who, TENSORS, "float32", size, "d", data, held_out=size))

    def granted(self, grant: e.Grant) -> None:
        worker, task = self.workers[grant.worker], grant.task
        assert worker.started
        assert not self.shard.frozen, "granted while frozen"
        assert task.partition == self.partition(grant.worker), "it does not have these examples"
        assert 0 <= task.start < task.stop <= self.sizes[task.partition]
        for tasks in self.unfenced.values():
            for other in tasks:
                assert not overlap(task, other), f"{task} overlaps {other}, not fenced yet"
        for other_worker in self.workers.values():
            for other in other_worker.tasks:
                assert not overlap(task, other), f"{task} overlaps {other}, still held"
        # Held until the *coordinator* has the last report: it is the coordinator's view we check.
        worker.tasks.append(task)
        self.tell(grant.worker, self.work)

    def evaluate(self, evaluate: e.Evaluate) -> None:
        assert self.workers[evaluate.worker].started
        asked = self.evaluating.setdefault(evaluate.evaluation_id, set())
        assert len(self.evaluating) == 1, "two evaluations at once"
        assert evaluate.frozen == self.shard.frozen
        assert evaluate.keep == (not asked), "one of them keeps"
        mine = self.partition(evaluate.worker)
        assert mine not in map(self.partition, asked), "two of one partition"
        asked.add(evaluate.worker)

        def hear(worker: Worker) -> None:
            worker.evaluations.append(evaluate)
            self.work(worker)

        self.tell(evaluate.worker, hear)

    def fence(self, fence: e.Fence) -> None:
        self.shard.fence[fence.worker] = max(self.shard.fence[fence.worker], fence.incarnation)

        def fenced() -> None:
            self.unfenced.pop((fence.worker, fence.incarnation), None)
            self.feed(e.Fenced(fence.worker, fence.incarnation))

        self.after(self.delay(), fenced)

    def thaw(self) -> None:
        self.shard.frozen = False
        self.feed(e.Thawed())

    def drain(self, worker: Worker) -> None:
        worker.drain = True
        self.work(worker)

    def check_record(self, record: e.Record) -> None:
        line = record.fields
        if line["kind"] != "epoch":
            return
        places = [(each, i) for each, size in enumerate(self.sizes) for i in range(size)]
        applied = [self.shard.applied[(line["epoch"], *place)] for place in places]
        assert min(applied) >= 1, f"epoch {line['epoch']} lost {applied.count(0)} positions"
        assert line["distinct"] == sum(self.sizes) <= line["examples"]
        if not self.deaths:
            assert max(applied) == 1
            assert line["examples"] == sum(self.sizes)

    # ── a worker ───────────────────────────────────────────────────────────────────────────────

    def work(self, worker: Worker) -> None:
        """Go on with whatever is next: an evaluation, the drain, a batch."""
        if worker.busy or worker.dead:
            return
        if worker.evaluations:
            self.busy(worker, 0.05 * self.random.random(), lambda: self.evaluated(worker))
        elif worker.drain:
            self.finish_drain(worker)
        elif worker.tasks:
            self.busy(worker, worker.batch_s, lambda: self.computed(worker))

    def busy(self, worker: Worker, for_s: float, then: Callable[[], None]) -> None:
        worker.busy = True
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

    def evaluated(self, worker: Worker) -> None:
        evaluate = worker.evaluations.pop(0)
        if not worker.cut:
            self.quality = min(1.0, self.quality + 0.2 * self.random.random())
        accuracy = self.quality - (0.3 * self.random.random() if evaluate.frozen else 0.0)
        metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
        answer = e.Evaluated(worker.number, worker.incarnation, evaluate.evaluation_id, metrics)
        self.send(worker, answer)

    def computed(self, worker: Worker) -> None:
        task = worker.tasks[0]
        worker.at = min(task.stop, max(worker.at, task.start) + self.batch)
        worker.unreported += 1
        ended = worker.at == task.stop
        if ended or self.random.random() < 0.6:
            self.push(worker)
        if ended or self.random.random() < 0.5:
            self.report(worker)
        if ended:
            worker.tasks.pop(0)
            worker.at = worker.pushed = 0

    def push(self, worker: Worker) -> None:
        task = worker.tasks[0]
        begin = max(worker.pushed, task.start)
        positions = [(task.epoch, task.partition, i) for i in range(begin, worker.at)]
        if self.shard.push(worker, positions):
            worker.pushed = worker.at
        else:
            worker.dead = True

    def report(self, worker: Worker) -> None:
        task, steps = worker.tasks[0], worker.unreported
        worker.unreported = 0
        computed = max(worker.at, task.start)
        reported = self.reported.setdefault((worker.number, worker.incarnation, task.id), 0)
        examples = computed - task.start - reported
        self.reported[worker.number, worker.incarnation, task.id] += examples
        self.send(
            worker,
            e.Report(
                worker.number,
                worker.incarnation,
                task.id,
                done_upto=max(worker.pushed, task.start),
                steps=steps,
                examples=examples,
                loss_sum=float(examples),
                loss_count=examples,
                compute_s=steps * worker.batch_s,
            ),
        )

    def finish_drain(self, worker: Worker) -> None:
        if worker.tasks and worker.at > 0:
            self.push(worker)
            self.report(worker)
        worker.tasks.clear()
        worker.at = worker.pushed = 0
        worker.drain = False
        self.send(worker, e.Drained(worker.number, worker.incarnation))

    @property
    def reported(self) -> dict[tuple[int, int, int], int]:
        return self.__dict__.setdefault("_reported", {})


def overlap(one: e.Task, other: e.Task) -> bool:
    if (one.epoch, one.partition) != (other.epoch, other.partition):
        return False
    return one.start < other.stop and other.start < one.stop


def check(seed: int) -> e.Finish:
    """One schedule, with what must be true at its end."""
    simulation = Simulation(seed)
    finish = simulation.run()
    until = simulation.settings.until
    judged = simulation.frozen_metrics
    if finish.outcome in ("converged", "finished"):
        assert judged is not None
        assert (finish.outcome == "converged") == bool(convergence.targets(until))
        assert convergence.holds(until, judged) or finish.outcome == "finished"
        assert finish.exported
        assert finish.metrics == pytest.approx(judged)
    else:
        assert finish.outcome == "stopped"
        limit = convergence.limit(
            until, epochs=finish.epochs, steps=finish.steps, elapsed_s=simulation.now
        )
        assert simulation.stopped or limit or "no worker could" in finish.reason
    if until.max_epochs is not None and not simulation.stopped:
        assert finish.epochs <= until.max_epochs
    if until.max_steps is not None and not simulation.deaths:
        assert finish.steps <= until.max_steps
    return finish


@pytest.mark.parametrize("part", range(4))
def test_schedules(part: int) -> None:
    seeds = range(part * 500, part * 500 + 500)
    outcomes = Counter(finish.outcome for finish in checked(check, seeds))
    assert outcomes["converged"] > 50
    assert outcomes["finished"] > 50
    assert outcomes["stopped"] > 50


# ── planted mistakes ───────────────────────────────────────────────────────────────────────────


def lease_again_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    lost = Training._lost

    def mutant(self: Training, member: Member) -> None:
        lost(self, member)
        self._fenced(e.Fenced(member.worker, member.incarnation + 1))

    patch.setattr(Training, "_lost", mutant)


def listen_to_the_dead(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Members, worker: int, incarnation: int | None = None) -> Member | None:
        return self._living.get(worker)

    patch.setattr(Members, "living", mutant)


def forget_the_remainder(patch: pytest.MonkeyPatch) -> None:
    leave = TaskQueue.leave

    def mutant(self: TaskQueue, worker: int) -> tuple[Remainder, ...]:
        return leave(self, worker)[1:]

    patch.setattr(TaskQueue, "leave", mutant)


def give_the_whole_task_back(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: TaskQueue, worker: int) -> tuple[Remainder, ...]:
        leases = self._leases.get(worker, {})
        tasks = [lease.task for lease in leases.values()]
        leases.clear()
        return tuple(Remainder(t.epoch, t.start, t.stop, t.partition) for t in tasks)

    patch.setattr(TaskQueue, "withdraw", mutant)


def wait_for_a_dead_worker_to_drain(patch: pytest.MonkeyPatch) -> None:
    lost = Training._lost

    def mutant(self: Training, member: Member) -> None:
        draining = set(self._draining)
        lost(self, member)
        self._draining = draining

    patch.setattr(Training, "_lost", mutant)


def lose_a_dead_evaluators_evaluation(patch: pytest.MonkeyPatch) -> None:
    lost = Training._lost

    def mutant(self: Training, member: Member) -> None:
        evaluation = self._evaluations.now
        lost(self, member)
        self._evaluations.now = evaluation

    patch.setattr(Training, "_lost", mutant)


def believe_the_moving_vector(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Training, "_verdict", lambda self, ending: self._export())


def freeze_without_draining(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Training, "_leave_training", lambda self, ending: self._freeze())


def keep_what_a_drained_worker_dropped(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Training, member: Member) -> None:
        self._draining.discard(member.worker)

    patch.setattr(Training, "_drained", mutant)


def evaluate_twice_at_once(patch: pytest.MonkeyPatch) -> None:
    original = Training._training

    def mutant(self: Training) -> None:
        original(self)
        if self._phase is Phase.TRAINING and self._evaluations._schedule.due(**self._reached()):
            self._evaluate(frozen=False)

    patch.setitem(training._STEPS, Phase.TRAINING, mutant)


def start_before_the_model_is_loaded(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Members, state: MemberState) -> list[Member]:
        hidden = (MemberState.PREPARED, MemberState.PREPARING)
        wanted = hidden if state is MemberState.PREPARED else (state,)
        return [member for member in self.every() if member.state in wanted]

    patch.setattr(Members, "who", mutant)


def mix_up_the_partitions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partitions, "of", lambda self, worker: 0)


def end_with_the_first_partition(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partitions, "examples", property(lambda self: self.sizes[0]))


def weigh_all_partitions_alike(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Evaluation) -> dict[str, float]:
        found = [answer.metrics for answer in self.answers.values()]
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    patch.setattr(Evaluation, "metrics", mutant)


def overrun_max_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Streaming, "_batches_left", lambda self, reached: None)


def never_find_out_who_hangs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Training, "_find_hung", lambda self: None)


def take_the_slow_for_hung(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patience, "batch_s", lambda usual_s: 0.15)


def wait_for_a_hung_worker_to_drain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Training, "_drained_by_s", lambda self, member: math.inf)


def wait_for_a_judge_when_asked_to_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patience, "STOP_S", math.inf)


def finish_twice(patch: pytest.MonkeyPatch) -> None:
    finish = Training._finish

    def mutant(self: Training) -> None:
        finish(self)
        self._phase = Phase.EXPORTING

    patch.setattr(Training, "_finish", mutant)


@pytest.mark.parametrize(
    "mutant",
    [
        lease_again_before_the_fence,
        listen_to_the_dead,
        forget_the_remainder,
        give_the_whole_task_back,
        wait_for_a_dead_worker_to_drain,
        lose_a_dead_evaluators_evaluation,
        believe_the_moving_vector,
        freeze_without_draining,
        keep_what_a_drained_worker_dropped,
        evaluate_twice_at_once,
        start_before_the_model_is_loaded,
        mix_up_the_partitions,
        end_with_the_first_partition,
        weigh_all_partitions_alike,
        overrun_max_steps,
        never_find_out_who_hangs,
        take_the_slow_for_hung,
        wait_for_a_hung_worker_to_drain,
        wait_for_a_judge_when_asked_to_stop,
        finish_twice,
    ],
)
def test_a_planted_mistake_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert_caught(check, range(600))
