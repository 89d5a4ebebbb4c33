"""The run as a state machine: events in, decisions out, time as an argument.

`on` updates what is known, then `_advance` takes every step that this allows, so that nothing
waits for the next tick. Invariants: tasks of a lost worker are leased again only after every
shard has fenced it; at most one evaluation is under way; a target counts only if it holds on the
frozen vector that is exported; `Finish` is the last decision and is given once; no worker is
waited for without a bound (`patience`): one that hangs is expelled, then it is like a dead one.
What the workers do between Start and Drain is the algorithm's (`algorithms.base.Strategy`).
Carries nothing out, and knows no process but the workers; `events` says what each value asks for.

Whenever parameters exist they are exported, but for RunFailed. `verdict` says what a run is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from dsgd_cli.contract.names import process_name
from dsgd_cli.engine import convergence, patience, verdict
from dsgd_cli.engine.algorithms.base import Left, Reached, Strategy
from dsgd_cli.engine.algorithms.table import make_strategy
from dsgd_cli.engine.convergence import Streak
from dsgd_cli.engine.evaluations import Evaluation, Evaluations
from dsgd_cli.engine.events import (
    Claimed,
    Committed,
    Configured,
    ConfigureShards,
    Decision,
    Drain,
    Drained,
    Evaluated,
    Event,
    Expel,
    Export,
    Exported,
    Failure,
    Fence,
    Fenced,
    Finish,
    Freeze,
    Frozen,
    Grant,
    Initialise,
    Initialised,
    Measured,
    Moved,
    Operated,
    Prepare,
    Prepared,
    Progress,
    Record,
    Report,
    RunFailed,
    SetRate,
    Settings,
    Start,
    StopRequested,
    Thaw,
    Thawed,
    Tick,
    Ticked,
    Work,
    WorkerFailed,
    WorkerJoined,
    WorkerLost,
)
from dsgd_cli.engine.ledger import Ledger
from dsgd_cli.engine.members import Member, Members, MemberState
from dsgd_cli.engine.partitions import Partitions, partition_of
from dsgd_cli.engine.verdict import Ending, Why, difference

PROGRESS_S = 0.25


class Phase(Enum):
    """GATHERING → CONFIGURING → INITIALISING → STARTING → TRAINING → DRAINING → FREEZING →
    JUDGING → EXPORTING → FINISHED; JUDGING → THAWING → TRAINING when a target does not hold on
    the frozen vector. Errors and divergence go from TRAINING or DRAINING to FREEZING, from
    FREEZING or JUDGING to EXPORTING, and to FINISHED while there are no parameters."""

    GATHERING = "gathering"  # nobody has loaded the model yet
    CONFIGURING = "configuring"
    INITIALISING = "initialising"
    STARTING = "starting"  # parameters exist; the others finish loading
    TRAINING = "training"
    DRAINING = "draining"
    FREEZING = "freezing"
    JUDGING = "judging"  # the frozen vector is evaluated
    THAWING = "thawing"
    EXPORTING = "exporting"
    FINISHED = "finished"


class Training:
    """One run, from the first worker that joins to `Finish`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._until = settings.until
        self._phase = Phase.GATHERING
        self._since_s: float | None = None  # when the phase began
        self._ending: Ending | None = None
        self._members = Members()
        self._ledger = Ledger()
        self._evaluations = Evaluations(settings)
        self._strategy: Strategy | None = None  # from the first `Prepared` on
        self._references: dict[int, Prepared] = {}  # of each partition: its first worker's
        self._initialiser: int | None = None
        self._fences: dict[tuple[int, int], Left] = {}
        self._draining: set[int] = set()
        self._rate = 1.0  # what the servers were told last
        self._exported = False
        self._asked_s = math.inf  # when somebody asked for the end
        self._all_here = False  # a worker of each partition
        self._seen_s = 0.0  # when they were
        self._worked_s = 0.0  # when one did something
        self._ended_s: float | None = None
        self._progress_s = 0.0
        self._now_s = 0.0
        self._out: list[Decision] = []

    @property
    def phase(self) -> Phase:
        return self._phase

    def on(self, event: Event, now_s: float) -> list[Decision]:
        """Take one event, return what to do now, in order."""
        self._out = []
        if self._phase is Phase.FINISHED:
            return self._out
        self._now_s = max(now_s, self._now_s)
        if self._since_s is None:
            self._since_s = self._now_s
        if self._all_here:
            self._seen_s = self._now_s
        self._take(event)
        self._advance()
        self._maybe_progress()
        return self._out

    # ── what happened ──────────────────────────────────────────────────────────────────────────

    def _take(self, event: Event) -> None:
        match event:
            case WorkerJoined():
                self._joined(event)
            case StopRequested():
                self._asked_s = min(self._now_s, self._asked_s)
                self._end(Why.STOP, event.why)
            case RunFailed():
                self._end(Why.FAILED, event.failure.error, event.failure, sealed=False)
                self._finish()
            case Fenced():
                self._fenced(event)
            case Configured() | Frozen() | Thawed() | Exported():
                self._cluster_answered(event)
            case Committed() | Measured() | Operated():
                self._hear(event)
            case Tick():
                self._find_hung()
            case _:
                member = self._members.living(event.worker, event.incarnation)
                if member is not None:
                    self._take_from(member, event)

    def _take_from(
        self,
        member: Member,
        event: (
            WorkerLost
            | Moved
            | Prepared
            | Initialised
            | Report
            | Claimed
            | Ticked
            | Evaluated
            | Drained
            | WorkerFailed
        ),
    ) -> None:
        member.moved_s = self._now_s
        match event:
            case WorkerLost():
                self._lost(member)
            case Moved():
                self._worked_s = self._now_s
            case Prepared():
                self._prepared(member, event)
            case Initialised():
                self._initialised(member)
            case Report():
                self._report(member, event)
            case Claimed() | Ticked():
                self._hear(event)
            case Evaluated():
                self._evaluated(event)
            case Drained():
                self._drained(member)
            case WorkerFailed():
                self._worker_failed(event)

    def _joined(self, event: WorkerJoined) -> None:
        older = self._members.living(event.worker)
        if older is not None and older.incarnation < event.incarnation:
            self._lost(older)
        member = self._members.admit(event.worker, event.incarnation)
        self._all_here = not self._absent()
        if member is not None:
            member.moved_s = self._now_s
            self._out.append(Prepare(member.worker))
            self._happened("joined", member)

    def _lost(self, member: Member) -> None:
        """Forget the member; its tasks wait until every shard has fenced it."""
        self._members.remove(member)
        self._all_here = not self._absent()
        self._draining.discard(member.worker)
        self._happened("lost", member)
        if self._initialiser == member.worker:
            self._initialiser = None
        self._evaluations.leave(member.worker, again=True)
        left = self._strategy.leave(member.worker) if self._strategy is not None else ()
        if member.touched:
            self._fences[member.worker, member.incarnation + 1] = left
            self._out.append(Fence(member.worker, member.incarnation + 1))

    def _find_hung(self) -> None:
        """Before the training a phase has a bound; from then on each worker has one."""
        if not self._ledger.started:
            return
        for member in self._members.every():
            patience_s = self._patience_s(member)
            if patience_s is None:
                member.moved_s = self._now_s
            elif self._now_s - member.moved_s > patience_s:
                self._expel(member, f"it has done nothing for {patience_s:.0f} s")

    def _patience_s(self, member: Member) -> float | None:
        """How long the member may seem to do nothing; None: it has nothing to do."""
        if member.state is MemberState.PREPARING:
            return patience.SETUP_S
        if self._evaluates(member):
            return patience.evaluation_s(self._evaluations.longest_s)
        strategy = self._strategy
        if strategy is None or self._phase is not Phase.TRAINING:
            return None
        at_work = strategy.expects(member.worker)
        return patience.batch_s(strategy.batch_s(member.worker)) if at_work else None

    def _evaluates(self, member: Member) -> bool:
        return self._evaluations.is_with(member.worker)

    def _expel(self, member: Member, why: str) -> None:
        """It lives, but it hangs: as good as lost."""
        process = process_name("worker", member.worker)
        self._happened("hung", member, reason=why)
        self._out.append(Expel(member.worker, member.incarnation, f"{process} hangs: {why}"))
        self._lost(member)

    def _fenced(self, event: Fenced) -> None:
        left = self._fences.pop((event.worker, event.incarnation), ())
        if self._strategy is not None:
            self._strategy.put_back(left)

    def _worker_failed(self, event: WorkerFailed) -> None:
        process = process_name("worker", event.worker)
        failure = Failure(process, event.error, event.traceback, event.kind)
        self._end(Why.FAILED, f"{process}: {event.error}", failure)

    def _prepared(self, member: Member, event: Prepared) -> None:
        if member.state is not MemberState.PREPARING:
            return
        partition = self._partition(member.worker)
        what = "the training set is empty" if event.examples < 1 else None
        per_host = bool(self._settings.places)
        for other, reference in self._references.items():
            what = what or difference(reference, event, other == partition, per_host)
        if what is not None:
            self._end(Why.FAILED, what, Failure(process_name("worker", event.worker), what))
            return
        member.state = MemberState.PREPARED
        self._references.setdefault(partition, event)
        if self._strategy is None and len(self._references) == self._partition_count:
            self._all_known(event)

    def _all_known(self, event: Prepared) -> None:
        """Of each partition a worker has said how much there is."""
        sizes = tuple(self._references[each].examples for each in range(self._partition_count))
        partitions = Partitions(sizes, self._settings.places)
        self._strategy = make_strategy(self._settings, partitions)
        self._enter(Phase.CONFIGURING)
        self._out.append(ConfigureShards(event.tensors, event.dtype, partitions.examples))

    def _initialised(self, member: Member) -> None:
        if self._phase is Phase.INITIALISING and member.worker == self._initialiser:
            self._enter(Phase.STARTING)

    def _cluster_answered(self, event: Configured | Frozen | Thawed | Exported) -> None:
        match event, self._phase:
            case Configured(), Phase.CONFIGURING:
                self._enter(Phase.INITIALISING)
            case Frozen(), Phase.FREEZING:
                self._enter(Phase.JUDGING)
            case Thawed(), Phase.THAWING:
                self._enter(Phase.TRAINING)
            case Exported(), Phase.EXPORTING:
                self._exported = True
                self._finish()

    def _hear(self, event: Claimed | Ticked | Committed | Measured | Operated) -> None:
        """Something that only the algorithm knows what to do with."""
        if self._strategy is not None:
            self._worked_s = self._now_s
            self._strategy.take(event, self._now_s)
            self._count_epochs()

    def _report(self, member: Member, event: Report) -> None:
        strategy = self._strategy
        epoch = None if strategy is None else strategy.epoch_of(event)
        if strategy is None or epoch is None:
            return
        self._worked_s = self._now_s
        strategy.report(event, self._now_s)
        self._ledger.steps += strategy.steps()
        self._record(*self._ledger.add(event, epoch, self._now_s))
        self._count_epochs()
        member.steps += max(event.steps, int(event.examples > 0))
        member.streak = Streak(
            member.worker, event.nonfinite_streak, self._ledger.steps, event.nonfinite_where
        )
        every = self._members.every()
        at_work = [m for m in every if m.steps > 0 or strategy.expects(m.worker)]
        if reason := convergence.diverged_gradients([m.streak for m in at_work]):
            self._end(Why.DIVERGED, reason)

    def _count_epochs(self) -> None:
        assert self._strategy is not None
        self._ledger.steps += self._strategy.steps()
        for complete in self._strategy.complete():
            self._record(self._ledger.epoch(complete, self._now_s))

    def _evaluated(self, event: Evaluated) -> None:
        if self._evaluations.frees(event) and self._strategy is not None:
            self._worked_s = self._now_s
            self._strategy.back(event.worker)
        evaluation = self._evaluations.answer(event, self._now_s, self._ledger.steps)
        if evaluation is None:
            return
        line = self._ledger.evaluation(
            self._metrics,
            epoch=self._epochs,
            workers=tuple(evaluation.weights),
            frozen=evaluation.frozen,
            now_s=self._now_s,
        )
        self._record(line)
        self._weigh(evaluation)

    def _weigh(self, evaluation: Evaluation) -> None:
        """What the metrics mean for the run."""
        step, metrics = self._ledger.steps, self._metrics
        worker = evaluation.worst()
        absent = self._evaluations.missing(metrics)
        if reason := convergence.diverged_evaluation(metrics, step=step, worker=worker):
            self._end(Why.DIVERGED, reason)
        elif absent:
            error = (
                f"{absent[0]} is set, but the model's metrics are "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )
            self._end(Why.FAILED, error, Failure(process_name("worker", worker), error))
        elif convergence.holds(self._until, metrics):
            self._end(Why.TARGET, convergence.describe(self._until, metrics))

    def _drained(self, member: Member) -> None:
        if member.worker not in self._draining or self._strategy is None:
            return
        self._draining.discard(member.worker)
        self._strategy.withdraw(member.worker)
        self._strategy.back(member.worker)
        self._evaluations.leave(member.worker)  # one that it had not begun

    def _end(
        self, why: Why, reason: str, failure: Failure | None = None, *, sealed: bool = True
    ) -> None:
        """The run shall end, unless it ends for a weightier reason already, or is being exported:
        what a worker does then changes nothing any more."""
        if sealed and self._phase is Phase.EXPORTING:
            return
        if self._ending is None or why.value > self._ending.why.value:
            self._ending = Ending(why, reason, failure)

    # ── what to do about it ────────────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        """Take steps until none changes the phase."""
        phase = None
        while phase is not self._phase:
            phase = self._phase
            _STEPS[phase](self)

    def _gathering(self) -> None:
        """GATHERING, CONFIGURING: there are no parameters that could be kept."""
        if self._phase is Phase.GATHERING and self._waited_s > patience.SETUP_S:
            loading = self._members.who(MemberState.PREPARING)
            self._too_late(loading, "load the model and the data")
        if self._ending is not None:
            self._finish()

    def _initialising(self) -> None:
        if self._waited_s > patience.SETUP_S:
            asked = [m for m in self._members.every() if m.worker == self._initialiser]
            self._too_late(asked, "write the first parameters")
        if self._ending is not None:
            self._finish()
        elif self._initialiser is None and not self._fences:
            ready = self._members.who(MemberState.PREPARED)
            for member in ready[:1]:
                member.touched = True
                self._initialiser = member.worker
                self._out.append(Initialise(member.worker))

    def _starting(self) -> None:
        loading = self._members.who(MemberState.PREPARING)
        ready = self._members.who(MemberState.PREPARED)
        bound_s = patience.GATHER_S if ready else patience.SETUP_S
        if self._ending is None and (loading or not ready) and self._waited_s < bound_s:
            return
        self._enter(Phase.TRAINING)
        self._ledger.start(self._now_s)
        self._progress_s = self._worked_s = self._now_s

    def _training(self) -> None:
        self._start_prepared()
        if self._ending is None and (reason := self._limit()):
            self._end(Why.LIMIT, reason)
        if self._now_s - self._worked_s > patience.STALL_S:
            reason = f"no worker has done anything for {patience.STALL_S:.0f} s"
            self._end(Why.FAILED, reason, Failure("", reason, kind="internal"))
        if self._partition_count > 1 and self._now_s - self._seen_s > patience.ABSENT_S:
            absent = " or ".join(self._absent())
            reason = f"no {absent} for {patience.ABSENT_S:.0f} s: nobody has its examples"
            self._end(Why.FAILED, reason, Failure("", reason, kind="internal"))
        if self._ending is not None:
            self._leave_training(self._ending)
            return
        strategy = self._strategy
        assert strategy is not None
        if self._evaluations.rate != self._rate:
            self._rate = self._evaluations.rate
            self._record(self._ledger.happened("rate", self._now_s, factor=self._rate))
            self._out.append(SetRate(self._rate))
        if strategy.rests and self._evaluations.due(self._reached()):
            self._evaluate(frozen=False)
        if self._evaluations.now is None or not strategy.stands_still:
            self._work(strategy)

    def _work(self, strategy: Strategy) -> None:
        members = self._members.who(MemberState.STARTED)
        reached = Reached(self._now_s, **self._reached(), max_steps=self._until.max_steps)
        for decision in strategy.work(members, reached):
            self._out.append(decision)
            if isinstance(decision, Grant | Work):
                member = self._members.living(decision.worker)
                assert member is not None
                self._members.take_turn(member)
        self._count_epochs()

    def _leave_training(self, ending: Ending) -> None:
        if ending.abrupt:
            self._out.extend(self._strategy.end() if self._strategy is not None else ())
            self._freeze()
            return
        self._enter(Phase.DRAINING)
        assert self._strategy is not None
        self._out.extend(self._strategy.end())
        for member in self._members.who(MemberState.STARTED):
            self._draining.add(member.worker)
            self._out.append(Drain(member.worker))

    def _still_draining(self) -> None:
        self._start_prepared()
        for worker in sorted(self._draining):
            member = self._members.living(worker)
            if member is not None and self._now_s > self._drained_by_s(member):
                self._expel(member, "it did not end its batch when the run was to end")
        if not self._draining or (self._ending is not None and self._ending.abrupt):
            self._freeze()

    def _drained_by_s(self, member: Member) -> float:
        assert self._strategy is not None
        usual_s = self._strategy.batch_s(member.worker) or 0.0
        if self._evaluates(member):
            usual_s += self._evaluations.longest_s or 0.0
        began_s = self._now_s - self._waited_s
        asked_by_s = self._asked_s + patience.STOP_DRAIN_S
        return min(began_s + patience.drain_s(usual_s), asked_by_s)

    def _freeze(self) -> None:
        self._draining.clear()
        self._evaluations.drop()
        self._evaluations.judged = False
        self._enter(Phase.FREEZING)
        self._ended_s = self._now_s
        self._out.append(Freeze())

    def _judging(self) -> None:
        self._start_prepared()
        ending = self._ending
        assert ending is not None
        if ending.abrupt:
            self._export()
        elif self._evaluations.judged:
            self._verdict(ending)
        elif self._nobody_judges(ending):
            if ending.why is not Why.STOP:
                reason = f"{ending.reason}, but no worker could evaluate the final model"
                self._ending = Ending(Why.STOP, reason)
            self._export()
        elif self._evaluations.now is None:
            self._evaluate(frozen=True)

    def _nobody_judges(self, ending: Ending) -> bool:
        """Whether the model must come home without metrics."""
        alone = not self._all_here
        if ending.why is Why.STOP:
            return alone or self._now_s - self._asked_s > patience.STOP_S
        alone_s = min(self._now_s - self._seen_s, self._waited_s)
        bound_s = patience.judging_s(self._evaluations.longest_s)
        return (alone and alone_s > patience.ALONE_S) or self._waited_s > bound_s

    def _verdict(self, ending: Ending) -> None:
        """The frozen vector is evaluated: over, or on again."""
        if convergence.holds(self._until, self._metrics) or ending.why is not Why.TARGET:
            self._export()
            return
        stands = convergence.describe(self._until, self._metrics)
        if reason := self._limit():
            self._ending = Ending(Why.LIMIT, reason)
            self._export()
            return
        self._record(self._ledger.happened("thawed", self._now_s, reason=stands))
        self._ending = None
        self._ended_s = None
        self._enter(Phase.THAWING)
        self._out.append(Thaw())

    def _export(self) -> None:
        self._enter(Phase.EXPORTING)
        self._out.append(Export())

    def _waiting(self) -> None:
        """FREEZING, THAWING, EXPORTING: only the answer leads on."""
        if self._phase is not Phase.EXPORTING:
            self._start_prepared()

    def _nothing(self) -> None:
        """FINISHED."""

    # ── the pieces ─────────────────────────────────────────────────────────────────────────────

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._since_s = self._now_s

    @property
    def _waited_s(self) -> float:
        """How long the phase lasts."""
        return 0.0 if self._since_s is None else self._now_s - self._since_s

    def _too_late(self, members: list[Member], what: str) -> None:
        """There is nothing to be kept yet, so there is no use in trying on."""
        if self._ending is None:
            late = [process_name("worker", member.worker) for member in members]
            processes = late or self._absent()
            who = ", ".join(processes) or "the workers"
            error = f"{who} did not {what} within {patience.SETUP_S:.0f} s"
            self._end(Why.FAILED, error, Failure(next(iter(processes), ""), error))

    def _partition(self, worker: int) -> int:
        """Whose examples the worker has."""
        return partition_of(worker, self._settings.places)

    @property
    def _partition_count(self) -> int:
        return 1 + max(self._settings.places, default=0)

    def _absent(self) -> list[str]:
        """The workers of a partition of which none is here; none: of every one somebody is."""
        here = {self._partition(member.worker) for member in self._members.every()}
        workers = range(max(self._settings.workers, len(self._settings.places)))
        absent = [worker for worker in workers if self._partition(worker) not in here]
        first = {self._partition(worker) for worker in absent[:1]}
        return [process_name("worker", w) for w in absent if self._partition(w) in first]

    @property
    def _epochs(self) -> int:
        return 0 if self._strategy is None else self._strategy.epochs

    @property
    def _metrics(self) -> Mapping[str, float]:
        return self._evaluations.metrics

    def _reached(self) -> dict[str, Any]:
        elapsed_s = self._ledger.elapsed_s(self._now_s)
        return {"epochs": self._epochs, "steps": self._ledger.steps, "elapsed_s": elapsed_s}

    def _limit(self) -> str | None:
        over = self._strategy.over() if self._strategy is not None else None
        limit = convergence.limit(self._until, **self._reached())
        return over or limit or self._evaluations.ended_by

    def _start_prepared(self) -> None:
        assert self._strategy is not None
        for member in self._members.who(MemberState.PREPARED):
            member.state = MemberState.STARTED
            member.touched = True
            member.moved_s = self._now_s
            self._strategy.join(member.worker)
            self._out.append(Start(member.worker))

    def _evaluate(self, frozen: bool) -> None:
        """Hand it to one worker of each partition: the one that was given something the longest
        time ago, but not to one that may still be at what somebody else has done, or at an
        evaluation that was dropped: it is slow, or it hangs."""
        strategy = self._strategy
        assert strategy is not None

        def turn(member: Member) -> tuple[bool, bool, int]:
            return self._evaluates(member), strategy.lags(member.worker), member.turn

        ready = self._members.who(MemberState.STARTED)
        chosen: dict[int, Member] = {}
        for member in sorted(ready, key=turn):
            chosen.setdefault(self._partition(member.worker), member)
        if len(chosen) < self._partition_count:
            return
        for member in chosen.values():
            self._members.take_turn(member)
            strategy.away(member.worker)
        weights = {m.worker: self._references[each].held_out for each, m in chosen.items()}
        self._out += self._evaluations.begin(weights, frozen, self._now_s, self._reached())

    def _finish(self) -> None:
        ending = self._ending
        assert ending is not None
        self._enter(Phase.FINISHED)
        self._record(*self._ledger.flush(self._now_s))
        if self._ledger.started:
            self._out.append(Progress(self._progress_fields()))
        frozen = self._metrics if self._evaluations.judged else None
        metrics = {key: value for key, value in (frozen or {}).items() if math.isfinite(value)}
        name = verdict.metric_name(self._until, self._metrics)
        ended_s = self._now_s if self._ended_s is None else self._ended_s
        references = self._references.values()
        self._out.append(
            Finish(
                outcome=verdict.outcome(ending, self._until, frozen),
                reason=verdict.reason(ending, self._until, frozen),
                metric=name,
                value=None if name is None else metrics.get(name),
                loss=metrics.get("loss"),
                steps=self._ledger.steps,
                examples=self._ledger.examples,
                seconds=round(self._ledger.elapsed_s(ended_s), 6),
                epochs=self._epochs,
                exported=self._exported,
                metrics=metrics,
                failure=ending.failure,
                best=self._evaluations.best,
                staleness=dict(sorted(self._ledger.staleness.items())),
                dropped=self._ledger.dropped,
                classes=next((each.classes for each in references), ()),
                columns=next((each.columns for each in references if each.columns), ()),
                label=next((each.label for each in references if each.label), ""),
            )
        )

    def _maybe_progress(self) -> None:
        running = self._ledger.started and self._phase is not Phase.FINISHED
        if running and self._now_s - self._progress_s >= PROGRESS_S:
            self._progress_s = self._now_s
            self._out.append(Progress(self._progress_fields()))

    def _progress_fields(self) -> dict[str, Any]:
        name = verdict.metric_name(self._until, self._metrics)
        value = self._metrics.get(name or "", math.nan)
        return {
            **self._ledger.progress(self._now_s),
            "epoch": self._epochs,
            "metric": name,
            "value": value if math.isfinite(value) else None,
            "limits": convergence.limits(self._until),
            "workers": len(self._members.every()),
        }

    def _record(self, *lines: dict[str, Any]) -> None:
        self._out.extend(Record(line) for line in lines)

    def _happened(self, what: str, member: Member, **more: Any) -> None:
        process = process_name("worker", member.worker)
        line = self._ledger.happened(
            what, self._now_s, process=process, incarnation=member.incarnation, **more
        )
        self._record(line)


_STEPS: dict[Phase, Callable[[Training], None]] = {
    Phase.GATHERING: Training._gathering,
    Phase.CONFIGURING: Training._gathering,
    Phase.INITIALISING: Training._initialising,
    Phase.STARTING: Training._starting,
    Phase.TRAINING: Training._training,
    Phase.DRAINING: Training._still_draining,
    Phase.FREEZING: Training._waiting,
    Phase.JUDGING: Training._judging,
    Phase.THAWING: Training._waiting,
    Phase.EXPORTING: Training._waiting,
    Phase.FINISHED: Training._nothing,
}
