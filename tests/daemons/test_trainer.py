"""The worker's loop against real shards without a network: what is exact, and when."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.spec import Train
from dsgd_cli.daemons.computing import quiet
from dsgd_cli.daemons.parameters import DIRECT_BYTES, Closed, Landed, Parameters, newer_bytes
from dsgd_cli.daemons.server import RunShard
from dsgd_cli.daemons.trainer import Trainer
from dsgd_cli.engine import optimizers
from dsgd_cli.engine.layout import Layout, cut, flatten
from dsgd_cli.engine.rate import Rate
from dsgd_cli.engine.shard import Shard
from dsgd_cli.engine.staleness import Staleness
from dsgd_cli.engine.tasks import order
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Channel, Exchange, Header, Operation, Route, Shape

RATE = 0.1
BATCH = 32
ROUTE = Route("", 1, 0, worker=0, incarnation=1)

Vector = np.ndarray[Any, Any]


class InProcess:
    """A channel to a shard of this process; answers when `advance` is called, not before.

    What is to be sent is copied when it is sent and compared when it is applied: it must not have
    changed meanwhile, and what is fetched must not be shown.
    """

    def __init__(self, shard: Shard, dtype: str = "float32") -> None:
        self.shard = shard
        self.held = RunShard(shard, Shape(0, 1), np.dtype(dtype), -1, None)
        self.dtype = dtype
        self.seqs: list[int] = []
        self.fetched: list[int] = []  # blocks
        self.contributions: list[tuple[int, int]] = []  # (round, part)
        self.pending: Exchange | None = None
        self.copy = b""
        self.gate = threading.Event()
        self.gate.set()

    def begin(self, exchange: Exchange) -> None:
        assert self.pending is None, "one exchange at a time"
        self.pending = exchange
        if exchange.data is not None:
            self.copy = bytes(exchange.data)

    def advance(self) -> bool:
        self.gate.wait()
        exchange, self.pending = self.pending, None
        assert exchange is not None
        if exchange.data is not None:
            assert bytes(exchange.data) == self.copy, "a buffer in flight was changed"
        if exchange.operation in (Operation.PUSH, Operation.PUSH_PULL):
            self.seqs.append(exchange.seq)
        if exchange.operation is Operation.CONTRIBUTE:
            self.contributions.append((exchange.seq, exchange.tag))
        place = 0
        for block in range(self.shard.blocks):
            size = len(self.shard.read(block))
            if exchange.data is not None:
                header = Header(ROUTE, exchange.seq, exchange.operation, exchange.tag)
                state = self.held.change(header, block, exchange.data[place : place + size])
            else:
                state = self.held.read(0, block)
            exchange.versions.append(state[0])
            if exchange.into is not None and not (
                exchange.since and state[0] <= exchange.since[block]
            ):
                exchange.into[place : place + size] = self.shard.read(block)
                self.fetched.append(block)
            place += size
        return True

    def other(self, value: float = 0.0) -> None:
        """Another worker's push."""
        seq = self.shard.applied(9, 0)[1] + 1
        for block in range(self.shard.blocks):
            size = len(self.shard.read(block)) // np.dtype(self.dtype).itemsize
            self.shard.apply(9, 1, seq, block, np.full(size, value, self.dtype), 1 << 40)

    def close(self) -> None:
        self.gate.set()

    def size(self, block: int) -> int:
        return self.shard.sizes[block]


def shards_of(
    layout: Layout,
    most: int | None = None,
    damping: str = "none",
    rate: Rate | None = None,
    *,
    rounds: bool = False,
) -> list[InProcess]:
    optimizer = optimizers.make("sgd", {"learning_rate": RATE}, layout.dtype)

    def shard(size: int) -> Shard:
        values = np.zeros(size, layout.dtype)
        return Shard(
            values,
            layout.block_elements,
            optimizer,
            rate=rate,
            staleness=Staleness(most, damping),
            rounds=rounds,
        )

    return [InProcess(shard(s.stop - s.start)) for s in layout.shards]


class Run:
    """A trainer of softmax on the digits, and its shards."""

    def __init__(
        self,
        servers: int = 2,
        model: str = "softmax",
        name: str = "downpour",
        optimizer: dict[str, Any] | None = None,
        rate: Rate | None = None,
        **algorithm: Any,
    ) -> None:
        self.said: list[pb.FromWorker] = []
        self.check: Callable[[pb.FromWorker], None] = lambda message: None
        train = Train.model_validate(
            {
                "model": model,
                "data": "digits",
                "algorithm": {name: algorithm},
                "optimizer": {"sgd": {"learning_rate": RATE, **(optimizer or {})}},
            }
        ).model_dump(mode="json")
        prepare = pb.Prepare(epoch=1, seed=0, train_json=json.dumps(train))
        folder = Path("/nowhere")  # nothing is kept: `best` is infinite
        self.trainer = Trainer(prepare, {}, 0, 1, self._say, folder)
        self.material = self.trainer._material
        self.initial = self.material.initial()
        self.layout = cut([(n, a.shape) for n, a in self.initial.items()], "float32", servers, 4096)
        late = (algorithm.get("max_staleness"), algorithm.get("damping", "none"))
        rounds = name in ("synchronous", "sandblaster")
        self.channels = shards_of(self.layout, *late, rate, rounds=rounds)
        self.trainer.use(Parameters(self.layout, self.channels))
        self.trainer.initialise()
        self.trainer.start()
        self.loop: Any = self.trainer._loop
        self.loop._report_at_s = float("inf")  # a task reports when it ends

    def _say(self, message: pb.FromWorker) -> None:
        self.check(message)
        self.said.append(message)

    def task(self, number: int, batches: int, start: int = 0) -> None:
        task = pb.Task(id=number, start=start, stop=start + batches * BATCH)
        setattr(task, "pass", 1)
        self.trainer.obey("grant", pb.Grant(epoch=1, task=task))

    def work(self, batches: int | None = None) -> None:
        with quiet():
            while self.trainer.busy and batches != 0:
                self.trainer.batch()
                batches = None if batches is None else batches - 1

    @property
    def reports(self) -> list[pb.Report]:
        return [message.report for message in self.said if message.HasField("report")]

    def values(self) -> Vector:
        """What the shards hold."""
        parts = [
            channel.shard.read(b) for channel in self.channels for b in range(channel.shard.blocks)
        ]
        return np.concatenate([np.frombuffer(part, "float32") for part in parts])

    def others(self) -> None:
        """One push of another worker, which changes no value."""
        for channel in self.channels:
            channel.other()

    def expected(
        self,
        batches: int,
        delay: int = 0,
        every: int = 1,
        fetch_every: int = 1,
        made: Callable[[Vector, int], Vector] = lambda total, count: total,
    ) -> Vector:
        """Plain gradient descent whose gradients are of parameters that lack `delay` updates.

        Or of those of the last multiple of `fetch_every`. `made`: an update of a sum of gradients.
        """
        flat = np.zeros(self.layout.size, np.float32)
        flatten(self.layout, self.initial, flat)
        history = [flat.copy()]
        count = 0
        rows = order(0, 1, self.material.data.examples)
        total = np.zeros_like(flat)
        out = np.zeros_like(flat)
        for batch in range(batches):
            some = rows[batch * BATCH : (batch + 1) * BATCH]
            if batch % fetch_every == 0:
                of = history[max(0, len(history) - 1 - delay)]
            views = {
                t.name: of[t.offset : t.offset + t.size].reshape(t.shape)
                for t in self.layout.tensors
            }
            into = {
                t.name: out[t.offset : t.offset + t.size].reshape(t.shape)
                for t in self.layout.tensors
            }
            self.material.model.gradients(
                views, self.material.data.x[some], self.material.data.y[some], into
            )
            total += out
            count += 1
            if (batch + 1) % every == 0 or batch + 1 == batches:
                history.append(history[-1] - np.float32(RATE) * made(total, count))
                total[:] = count = 0
        return history[-1]


def spoil(run: Run, bad: Callable[[int], bool]) -> None:
    """These gradients are not finite; they count from 1."""
    original = run.material.model.functions.gradients
    calls = 0

    def gradients(params: Any, x: Any, y: Any, out: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, grads = original(params, x, y, out=out)
        if bad(calls):
            out["W1"][0, 0] = np.nan
        return loss, grads

    functions = run.material.model.functions._replace(gradients=gradients)
    object.__setattr__(run.material.model, "functions", functions)


@pytest.mark.parametrize(("overlap", "delay"), [(False, 0), (True, 1)])
def test_one_worker_is_gradient_descent_with_the_delay_that_is_promised(
    overlap: bool, delay: int
) -> None:
    run = Run(overlap=overlap)
    run.task(1, 12)
    run.work()
    np.testing.assert_allclose(run.values(), run.expected(12, delay), rtol=1e-5, atol=1e-7)
    assert all(channel.seqs == list(range(1, 13)) for channel in run.channels)


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_without_overlap_one_worker_is_gradient_descent_to_the_last_bit(servers: int) -> None:
    """Only so: blocking, pushing and fetching every step, and with no steps of its own."""
    run = Run(servers, overlap=False, local_learning_rate=0.0)
    run.task(1, 12)
    run.work()
    np.testing.assert_array_equal(run.values(), run.expected(12))


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_what_is_pushed_is_the_sum_or_the_mean(reduce: str, servers: int) -> None:
    run = Run(
        servers, overlap=False, reduce=reduce, push_every=3, fetch_every=3, local_learning_rate=0.0
    )
    run.task(1, 11)  # the last push is of two gradients
    run.work()
    mean = reduce == "mean"
    made = run.expected(11, 0, 3, 3, lambda total, count: total / count if mean else total)
    np.testing.assert_allclose(run.values(), made, rtol=1e-5, atol=1e-7)


def test_between_fetches_the_parameters_are_the_same() -> None:
    run = Run(overlap=False, fetch_every=3, local_learning_rate=0.0)
    run.task(1, 12)
    run.work()
    np.testing.assert_array_equal(run.values(), run.expected(12, fetch_every=3))
    assert run.channels[0].seqs == list(range(1, 13))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("push_every", [1, 2, 3])
@pytest.mark.parametrize("fetch_every", [1, 2, 3, 5])
def test_with_steps_of_its_own_a_worker_sees_all_that_it_has_computed(
    push_every: int, fetch_every: int, overlap: bool
) -> None:
    """Read my writes: steps at the server's rate leave no delay, whatever is under way."""
    run = Run(
        overlap=overlap, push_every=push_every, fetch_every=fetch_every, local_learning_rate=RATE
    )
    run.task(1, 7)
    run.task(2, 8, start=7 * BATCH)
    run.work()
    np.testing.assert_allclose(run.values(), run.expected(15), rtol=1e-4, atol=1e-6)


def test_steps_of_ones_own_follow_the_schedule() -> None:
    schedule = {"warm_up": "4 steps", "decay": {"step": {"every": "6 steps", "factor": 0.5}}}
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    run = Run(
        optimizer=schedule,
        rate=lambda update: factors[update - 1],
        overlap=True,
        local_learning_rate=RATE,
    )
    run.task(1, 12)
    run.work()
    found = iter(factors)
    made = run.expected(12, made=lambda total, _: total * np.float32(next(found)))
    np.testing.assert_allclose(run.values(), made, rtol=1e-5, atol=1e-7)


def test_steps_of_ones_own_are_in_no_push() -> None:
    run = Run(overlap=False, fetch_every=100, local_learning_rate=7.0)
    shown = run.loop._shards.shown
    before = shown.flat.copy()
    run.task(1, 1)
    run.work()
    own, pushed = shown.flat - before, run.values() - before
    np.testing.assert_allclose(own, pushed * 7.0 / RATE, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("servers", [1, 3])
def test_what_is_pushed_is_clipped_over_all_shards(servers: int, reduce: str) -> None:
    most = 0.5
    run = Run(
        servers,
        overlap=False,
        reduce=reduce,
        push_every=2,
        fetch_every=2,
        local_learning_rate=0.0,
        optimizer={"clip_norm": most},
    )
    norms = []

    def clipped(total: Vector, count: int) -> Vector:
        total = total / (count if reduce == "mean" else 1)
        norms.append(float(np.linalg.norm(total)))
        return total * min(1.0, most / norms[-1])

    run.task(1, 20)
    run.work()
    made = run.expected(20, 0, 2, 2, clipped)
    np.testing.assert_allclose(run.values(), made, rtol=1e-4, atol=1e-6)
    assert max(norms) > most


@pytest.mark.parametrize("overlap", [False, True])
def test_a_push_that_is_too_late_is_reported_and_changes_nothing(overlap: bool) -> None:
    run = Run(overlap=overlap, max_staleness=1, local_learning_rate=0.0)
    run.task(1, 8)
    run.work(batches=3)
    run.others()
    run.work(batches=1)  # 1 late: good enough
    before = run.values()
    for _ in range(2):
        run.others()
    run.work(batches=1)
    run.work()
    (report,) = run.reports
    # With a push under way, two gradients are of parameters that lack those two.
    assert report.dropped == (2 if overlap else 1)
    assert report.steps == 8
    assert report.done_upto == 8 * BATCH  # it will not come again
    assert sum(report.staleness.values()) == 8
    assert run.channels[0].seqs == list(range(1, 9))
    assert (run.values() != before).any()


def test_a_push_that_was_dropped_does_not_make_the_next_one_look_newer() -> None:
    run = Run(overlap=False, max_staleness=0, fetch_every=4, local_learning_rate=0.0)
    run.task(1, 8)
    run.others()  # since the first fetch: all four pushes until the next are late
    before = run.values()
    run.work(batches=4)
    np.testing.assert_array_equal(run.values(), before)
    run.work()
    (report,) = run.reports
    assert report.dropped == 4
    assert dict(report.staleness) == {0: 4, 1: 4}


def test_a_late_push_is_damped() -> None:
    run = Run(servers=1, overlap=False, damping="inverse", local_learning_rate=0.0)
    run.task(1, 1)
    before = run.values()
    for _ in range(4):
        run.others()
    run.work()
    step = run.expected(1) - before
    np.testing.assert_allclose(run.values() - before, step / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("overlap", [False, True])
def test_sums_go_out_every_so_often_and_when_the_task_ends(overlap: bool) -> None:
    run = Run(overlap=overlap, push_every=5, fetch_every=5, local_learning_rate=0.0)
    run.task(1, 12)
    run.work()
    assert run.channels[0].seqs == [1, 2, 3]
    if not overlap:
        expected = run.expected(12, 0, every=5)
        np.testing.assert_allclose(run.values(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("algorithm", [{}, {"push_every": 3}, {"push_every": 2, "fetch_every": 3}])
def test_what_is_reported_as_done_is_in_the_parameters(
    overlap: bool, algorithm: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(overlap=overlap, **algorithm)
    every = algorithm.get("push_every", 1)

    def check(message: pb.FromWorker) -> None:
        if message.HasField("report"):
            before, start = {1: (0, 0), 2: (-(-10 // every), 10 * BATCH)}[message.report.task]
            if own := message.report.done_upto - start:
                needed = before + -(-own // (every * BATCH))
                assert all(len(channel.seqs) >= needed for channel in run.channels)

    run.check = check
    monkeypatch.setattr("dsgd_cli.daemons.streams.REPORT_S", 0.0)
    run.loop._report_at_s = 0.0
    run.task(1, 10)
    run.task(2, 10, start=10 * BATCH)
    run.work()
    last = {report.task: report for report in run.reports}
    assert last[1].done_upto == 10 * BATCH
    assert last[2].done_upto == 20 * BATCH
    for number in (1, 2):
        mine = [report for report in run.reports if report.task == number]
        assert sum(report.steps for report in mine) == 10
        assert sum(report.examples for report in mine) == 10 * BATCH
    assert run.channels[0].pending is None


def test_a_push_that_is_under_way_is_not_done() -> None:
    run = Run(overlap=True)
    run.task(1, 10)
    run.work(batches=4)
    assert run.channels[0].seqs == [1, 2, 3]
    assert run.channels[0].pending is not None
    run.loop._say(run.loop._tally)
    assert run.reports[-1].done_upto == 3 * BATCH
    assert run.reports[-1].steps == 4
    run.trainer.drain()
    assert run.channels[0].seqs == [1, 2, 3, 4]
    assert run.reports[-1].done_upto == 4 * BATCH
    assert run.said[-1].HasField("drained")
    assert not run.trainer.busy


def test_the_pipeline_goes_on_from_task_to_task() -> None:
    run = Run(overlap=True)
    run.task(1, 3)
    run.task(2, 3, start=3 * BATCH)
    run.work(batches=3)
    assert run.channels[0].pending is not None  # the first task's last push
    assert not run.reports
    run.work(batches=1)
    assert [report.done_upto for report in run.reports] == [3 * BATCH]
    run.work()
    np.testing.assert_allclose(run.values(), run.expected(6, 1), rtol=1e-5, atol=1e-7)


def test_an_evaluation_sees_the_own_pushes() -> None:
    run = Run(overlap=True)
    run.task(1, 10)
    run.work(batches=5)
    run.trainer.evaluate(pb.Evaluate(evaluation=7, best=float("inf")))
    shown = run.loop._shards.shown
    flat = np.concatenate([np.frombuffer(part, "float32") for part in shown.parts])
    np.testing.assert_array_equal(flat, run.values())
    assert run.said[-1].evaluated.evaluation == 7


def test_a_gradient_that_is_not_finite_takes_no_seq() -> None:
    run = Run(overlap=True)
    spoil(run, lambda call: call in (3, 6))
    run.task(1, 6)
    run.work()
    assert run.channels[0].seqs == [1, 2, 3, 4]
    assert run.reports[-1].done_upto == 6 * BATCH
    assert run.reports[-1].nonfinite_streak == 1
    assert run.reports[-1].nonfinite_where == "W1"
    assert np.isfinite(run.values()).all()


# ── stale-synchronous ──────────────────────────────────────────────────────────────────────────


def bounded(push_every: int = 1) -> Run:
    return Run(name="stale_synchronous", bound=1, push_every=push_every)


def advance(run: Run, limit: int) -> None:
    run.trainer.obey("advance", pb.Advance(epoch=1, limit=limit))


def ticks(run: Run) -> list[int]:
    return [message.ticked.clock for message in run.said if message.HasField("ticked")]


def test_a_clock_begins_when_it_may_and_says_when_every_shard_has_it() -> None:
    run = bounded()
    run.task(1, 5)
    run.work()
    assert not run.trainer.busy and run.channels[0].seqs == []
    advance(run, 1)
    run.work()
    assert run.channels[0].seqs == [1, 2]
    assert ticks(run) == [1, 2]  # the others may be waiting, so the last one is settled at once
    advance(run, 4)
    run.work()
    assert ticks(run) == [1, 2, 3, 4, 5]
    assert [report.done_upto for report in run.reports] == [5 * BATCH]


@pytest.mark.parametrize("push_every", [1, 2])
def test_a_worker_reads_its_own_pushes(push_every: int) -> None:
    """Alone it is plain gradient descent, though a push is under way when the next clock begins."""
    run = bounded(push_every)
    advance(run, 100)
    run.task(1, 5)
    run.task(2, 6, start=5 * BATCH)
    run.work()
    clocks = -(-5 // push_every) + 6 // push_every
    assert ticks(run) == list(range(1, clocks + 1))
    if push_every == 1:
        np.testing.assert_array_equal(run.values(), run.expected(11))


def test_what_others_pushed_meanwhile_is_fetched_before_the_first_clock_of_a_task() -> None:
    run = bounded()
    advance(run, 100)
    run.task(1, 2)
    run.work()
    run.others()
    run.task(2, 1, start=2 * BATCH)
    run.work()
    assert dict(run.reports[-1].staleness) == {0: 1}


def test_an_evaluation_ends_the_clock_and_waits_until_the_worker_counts_again() -> None:
    run = bounded(push_every=3)
    advance(run, 100)
    run.task(1, 8)
    run.work(batches=4)
    run.trainer.evaluate(pb.Evaluate(evaluation=1, best=float("inf")))
    assert ticks(run) == [1, 2, 2]  # the fourth gradient does not wait; and nothing is in hand
    kinds = [message.WhichOneof("kind") for message in run.said]
    assert kinds.index("evaluated") > max(i for i, kind in enumerate(kinds) if kind == "ticked")
    assert not run.trainer.busy
    run.others()
    advance(run, 3)
    run.work()
    assert ticks(run) == [1, 2, 2, 3, 4]
    (report,) = run.reports
    assert (report.done_upto, dict(report.staleness)) == (8 * BATCH, {0: 4})


def test_a_clock_without_a_finite_gradient_keeps_nobody_waiting() -> None:
    run = bounded(push_every=2)
    spoil(run, lambda call: call in (3, 4, 5))
    advance(run, 100)
    run.task(1, 7)
    run.work()
    assert ticks(run) == [1, 2, 3, 4]
    assert run.channels[0].seqs == [1, 2, 3]  # of gradients 1 and 2, 6, 7
    assert [report.done_upto for report in run.reports] == [7 * BATCH]


def large() -> tuple[Layout, list[InProcess], Parameters]:
    layout = cut([("w", (DIRECT_BYTES,))], "float32", 2)
    channels = shards_of(layout)
    return layout, channels, Parameters(layout, channels)


def test_a_large_exchange_moves_while_the_caller_goes_on() -> None:
    _, channels, parameters = large()
    parameters.pull()
    for channel in channels:
        channel.gate.clear()
    parameters.gradient.flat[:] = 1.0
    shown = parameters.shown.views
    parameters.begin(Operation.PUSH_PULL)
    parameters.gradient.flat[:] = 7.0  # another buffer: the channel compares what it sends
    assert (shown["w"] == 0.0).all()
    for channel in channels:
        channel.gate.set()
    assert parameters.settle() == Landed(Operation.PUSH_PULL)
    np.testing.assert_allclose(parameters.shown.views["w"], -RATE)
    parameters.close()


def test_after_the_end_nothing_begins_and_nobody_waits() -> None:
    _, channels, parameters = large()
    for channel in channels:
        channel.gate.clear()
    parameters.begin(Operation.PULL)
    parameters.close()  # opens the gates, as a real channel breaks what is under way
    parameters.settle()
    parameters.begin(Operation.PULL)
    with pytest.raises(Closed):
        parameters.settle()


def test_staleness_counts_the_others_since_the_fetch() -> None:
    layout = cut([("w", (64,))], "float32", 1)
    (channel,) = shards_of(layout)
    channels: list[Channel] = [channel]
    parameters = Parameters(layout, channels)
    parameters.pull()

    def push(foreign: int) -> int:
        for _ in range(foreign):
            channel.other()
        parameters.begin(Operation.PUSH_PULL)
        return parameters.settle().stale

    assert [push(foreign) for foreign in (0, 3, 1)] == [0, 3, 1]


def test_staleness_is_that_of_what_the_gradient_was_computed_with() -> None:
    """Which is not what is shown when it is sent: the exchange before it has landed meanwhile."""
    layout = cut([("w", (64,))], "float32", 1)
    (channel,) = shards_of(layout)
    parameters = Parameters(layout, [channel])
    parameters.pull()
    found = []
    parameters.based()
    parameters.begin(Operation.PUSH_PULL)
    for foreign in (0, 3, 1, 0, 0):
        parameters.based()  # the next gradient is computed while the exchange is under way
        for _ in range(foreign):
            channel.other()
        found.append(parameters.settle().stale)
        parameters.begin(Operation.PUSH_PULL)
    assert found == [0, 3, 4, 1, 0]


def test_each_shard_counts_the_own_pushes_that_it_has_applied() -> None:
    """One shard may find too late what another one takes."""
    layout = cut([("w", (64,))], "float32", 2)
    channels = shards_of(layout, most=0)
    parameters = Parameters(layout, channels)
    parameters.pull()
    channels[0].other()
    for _ in range(3):
        parameters.begin(Operation.PUSH)
        landed = parameters.settle()
        assert (landed.stale, landed.dropped) == (1, True)
    assert [channel.shard.version(0) for channel in channels] == [1, 3]
    parameters.pull()
    parameters.begin(Operation.PUSH)
    landed = parameters.settle()
    assert (landed.stale, landed.dropped) == (0, False)


def test_what_moves_is_counted_by_shard_also_of_pulls_that_bring_only_what_is_new() -> None:
    layout = cut([("w", (80,))], "float32", 2, 96)  # blocks of 96, 96, 96 and 32 bytes
    channels = shards_of(layout, rounds=True)
    parameters = Parameters(layout, channels)
    moved = parameters.moved
    parameters.pull()
    assert moved.take() == [192, 128]
    parameters.begin(Operation.PUSH_PULL)
    assert moved.take() == [0, 0]  # not answered yet
    parameters.settle()
    parameters.pull()
    parameters.contribute(parameters.gradient, 1, 0)
    assert moved.take() == [4 * 192, 4 * 128]
    for shard, expected in ((0, [192, 0]), (1, [0, 128])):
        parameters.pull()  # both copies have everything
        moved.take()
        channels[shard].other()
        parameters.pull()
        assert moved.take() == expected
    first = channels[0].shard
    first.apply(9, 1, 2, 1, np.zeros(24, np.float32), 1 << 40)  # its second block alone
    assert not parameters.catch_up(9)
    assert moved.take() == [96, 0]  # what is shown is not fetched once more
    assert not parameters.catch_up(9)
    assert moved.take() == [0, 0]


def test_whoever_waits_for_an_update_does_not_fetch_what_is_in_hand() -> None:
    layout = cut([("w", (80,))], "float32", 2, 96)
    channels = shards_of(layout, rounds=True)
    parameters = Parameters(layout, channels)
    parameters.pull()
    for shard, channel in enumerate(channels):
        channel.other(1.0 + shard)
    parameters.pull()  # now the other copy is of an update before
    parameters.moved.take()
    assert not parameters.catch_up(2)
    assert parameters.moved.take() == [0, 0]
    channels[0].other(5.0)
    assert not parameters.catch_up(2)
    channels[1].other(6.0)
    assert parameters.catch_up(2)
    assert parameters.moved.take() == [192, 128]
    there = b"".join(c.shard.read(block) for c in channels for block in range(c.shard.blocks))
    assert parameters.shown.flat.tobytes() == there


def test_a_pull_of_a_shorter_last_block_counts_what_it_is_long() -> None:
    shape = Shape(100, 40)
    exchange = Exchange(Operation.PULL, since=[1, 2, 3], versions=[1, 3, 4])
    assert newer_bytes(exchange, shape) == 40 + 20
    exchange.versions = [2, 2, 3]
    assert newer_bytes(exchange, shape) == 40


def test_a_report_says_what_moved_since_the_last_one() -> None:
    run = Run(servers=3, overlap=False)
    sizes = [4 * (shard.stop - shard.start) for shard in run.layout.shards]
    run.task(1, 5)
    run.work()
    run.task(2, 3, start=5 * BATCH)
    run.work()
    first, second = (list(report.shard_bytes) for report in run.reports)
    assert first == [(1 + 1 + 2 * 5) * size for size in sizes]  # written, fetched; five batches
    assert second == [2 * 3 * size for size in sizes]
