"""The worker's loop of rounds against real shards without a network: who contributes what, when."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsgd_cli.daemons.computing import quiet
from dsgd_cli.engine.sums import Incomplete
from dsgd_cli.wire import dsgd_pb2 as pb
from tests.daemons.test_trainer import BATCH, RATE, Run

Vector = np.ndarray[Any, Any]


class Rounds(Run):
    """A worker of `synchronous`, or of `sandblaster`, and its coordinator's orders."""

    def __init__(self, name: str = "synchronous", **algorithm: Any) -> None:
        super().__init__(name=name, **algorithm)
        self.gradients = 0  # that were computed
        self.poison: set[int] = set()  # those that are not to be finite
        original = self.material.model.functions.gradients

        def gradients(params: Any, x: Any, y: Any, out: Any) -> Any:
            self.gradients += 1
            loss, made = original(params, x, y, out=out)
            if self.gradients in self.poison:
                out["W1"][0, 0] = np.nan
            return loss, made

        functions = self.material.model.functions._replace(gradients=gradients)
        object.__setattr__(self.material.model, "functions", functions)

    def hand_out(
        self,
        number: int,
        start: int = 0,
        stop: int | None = None,
        part: int | None = None,
        **more: Any,
    ) -> None:
        task = pb.Task(id=number, start=start, stop=start + BATCH if stop is None else stop)
        setattr(task, "pass", 1)
        more.setdefault("round", 1)
        self.trainer.obey("work", pb.Work(epoch=1, task=task, part=part, **more))

    def accept(self, number: int, round_: int, part: int) -> None:
        with quiet():
            accept = pb.Accept(epoch=1, task=number, round=round_, part=part)
            self.trainer.obey("accept", accept)

    def late(self, number: int) -> None:
        self.trainer.obey("late", pb.Late(epoch=1, task=number))

    def commit(self, round_: int, parts: int, scale: float = 1.0) -> None:
        for channel in self.channels:
            channel.shard.commit(round_, parts, scale)

    @property
    def claims(self) -> list[int]:
        return [message.claimed.task for message in self.said if message.HasField("claimed")]

    @property
    def contributions(self) -> list[tuple[int, int]]:
        """(round, part) as the first shard got them."""
        return self.channels[0].contributions

    def look(self) -> None:
        """Once at whether the job can begin."""
        self.work(batches=1)

    def close_to(self, expected: Vector) -> bool:
        return bool(np.allclose(self.values(), expected, rtol=1e-5, atol=1e-7))


def after_one_batch_of(size: int) -> Vector:
    """The parameters that one process has after a step with so many examples."""
    run = Rounds()
    run.loop._material = replace(run.material, batch_size=size)
    run.hand_out(1, stop=size, part=0)
    run.work()
    run.commit(1, parts=1)
    return run.values()


def brief(report: pb.Report) -> tuple[int, int, int, int]:
    return report.task, report.done_upto, report.round, report.steps


def test_what_has_a_part_is_contributed_and_reported() -> None:
    run = Rounds()
    run.hand_out(1, part=0)
    assert run.trainer.busy
    run.work()
    assert not run.trainer.busy
    assert run.contributions == [(1, 0)]
    assert [brief(report) for report in run.reports] == [(1, BATCH, 1, 1)]
    assert run.reports[0].examples == run.reports[0].loss_count * BATCH == BATCH
    assert not run.claims
    assert run.close_to(run.expected(0, 0))
    run.commit(1, parts=1)
    assert run.close_to(run.expected(1, 0))


def test_who_must_ask_contributes_only_what_is_accepted() -> None:
    run = Rounds()
    run.hand_out(1)
    run.work()
    assert run.claims == [1]
    assert not run.contributions
    assert not run.reports
    assert not run.trainer.busy
    run.accept(1, round_=1, part=2)
    assert run.contributions == [(1, 2)]
    assert [brief(report) for report in run.reports] == [(1, BATCH, 1, 1)]
    assert run.gradients == 1


def test_who_is_accepted_before_the_batch_is_computed_need_not_ask() -> None:
    run = Rounds()
    run.hand_out(1, round=4)
    run.accept(1, round_=5, part=1)
    run.work()
    assert not run.claims
    assert run.contributions == [(5, 1)]
    assert run.reports[0].round == 5


def test_a_new_round_gets_the_same_gradient_once_more() -> None:
    run = Rounds()
    run.hand_out(1, part=1)
    run.work()
    run.accept(1, round_=2, part=1)
    assert run.contributions == [(1, 1), (2, 1)]
    assert [brief(report) for report in run.reports] == [(1, BATCH, 1, 1), (1, BATCH, 2, 0)]
    assert run.reports[1].examples == 0  # nothing is counted twice
    with pytest.raises(Incomplete):
        run.commit(2, parts=2)
    run.commit(2, parts=1)
    assert run.gradients == 1
    assert run.close_to(run.expected(1, 0))


def test_a_round_that_is_over_is_not_worth_a_word() -> None:
    """The coordinator knows; what comes next is another round, or that it is too late."""
    run = Rounds()
    run.channels[1].shard.contribute(9, 1, 2, 0, 0, np.zeros(run.channels[1].size(0), np.float32))
    run.hand_out(1, part=0)
    run.work()
    assert not run.reports
    run.accept(1, round_=3, part=0)
    assert [brief(report) for report in run.reports] == [(1, BATCH, 3, 1)]
    run.commit(3, parts=1)
    assert run.close_to(run.expected(1, 0))


def test_what_is_late_is_dropped_wherever_it_is() -> None:
    run = Rounds()
    run.hand_out(1)
    run.late(1)
    assert not run.trainer.busy
    for number in range(2, 7):  # claimed, and so on: none keeps its buffer
        run.hand_out(number)
        run.work()
        run.late(number)
        run.accept(number, round_=1, part=0)
        run.late(number)
    assert run.claims == [2, 3, 4, 5, 6]
    assert not run.contributions
    assert len(run.loop._free) == 2
    assert not run.loop._jobs


def test_gradients_that_wait_do_not_share_their_memory() -> None:
    """A worker that stands in for others may have more of a step than there are buffers."""
    run = Rounds()
    for number in (1, 2, 3):
        run.hand_out(number, start=(number - 1) * BATCH)
    run.work()
    assert run.claims == [1, 2, 3]
    for part, number in enumerate((3, 1, 2)):
        run.accept(number, round_=1, part=part)
    run.commit(1, parts=3, scale=1 / 3)
    assert run.close_to(after_one_batch_of(3 * BATCH))


def test_a_smaller_batch_weighs_less() -> None:
    """As many examples, so much weight: the update is the mean over all of them."""
    run = Rounds()
    run.hand_out(1, part=0)
    run.hand_out(2, start=BATCH, stop=BATCH + 8, part=1)
    run.work()
    run.commit(1, parts=2, scale=BATCH / (BATCH + 8))
    assert run.close_to(after_one_batch_of(BATCH + 8))


# ── parameters ─────────────────────────────────────────────────────────────────────────────────


def test_the_next_step_begins_when_every_shard_has_the_update() -> None:
    run = Rounds()
    run.hand_out(1, part=0)
    run.hand_out(2, start=BATCH, round=2, needs=1)
    run.work(batches=1)
    for _ in range(3):
        run.look()
    run.channels[1].shard.commit(1, 1, 1.0)
    run.look()
    assert run.gradients == 1
    assert run.trainer.busy
    run.channels[0].shard.commit(1, 1, 1.0)
    run.work()
    assert run.gradients == 2
    assert run.claims == [2]
    run.accept(2, round_=2, part=0)
    run.commit(2, parts=1)
    assert run.close_to(run.expected(2, 0))


def test_whoever_waits_fetches_each_block_once() -> None:
    run = Rounds()
    run.hand_out(1, part=0)
    run.hand_out(2, start=BATCH, round=2, needs=1, part=0)
    run.work(batches=1)
    run.look()  # what it had two fetches ago it cannot know to be new
    for channel in run.channels:
        channel.fetched.clear()
    for channel in run.channels:
        for _ in range(3):
            run.look()
        channel.shard.commit(1, 1, 1.0)
    run.work()
    for channel in run.channels:
        assert channel.fetched == list(range(channel.shard.blocks))
    run.commit(2, parts=1)
    assert run.close_to(run.expected(2, 0))


def test_a_gradient_is_kept_until_its_step_is_seen_to_be_made() -> None:
    run = Rounds()
    run.hand_out(1, part=0)
    run.hand_out(2, start=BATCH, round=2, needs=1, part=0)
    run.work(batches=1)
    run.look()
    run.accept(1, round_=3, part=0)  # somebody died
    assert run.contributions == [(1, 0), (3, 0)]
    run.commit(3, parts=1)
    run.accept(2, round_=4, part=0)
    run.work()
    assert list(run.loop._jobs) == [2]
    assert run.contributions[2:] == [(4, 0)]
    assert len(run.loop._free) == 1


def test_an_evaluation_leaves_the_parameters_of_the_job_in_hand() -> None:
    run = Rounds()
    run.hand_out(1, part=0)
    run.work()
    run.commit(1, parts=1)
    shown = run.loop._shards.shown.flat.copy()
    run.trainer.evaluate(pb.Evaluate(evaluation=7, best=float("inf")))
    np.testing.assert_array_equal(run.loop._shards.shown.flat, shown)
    run.hand_out(2, start=BATCH, round=2, needs=1, part=0)
    run.look()
    run.trainer.evaluate(pb.Evaluate(evaluation=8, best=float("inf")))
    said = [message.evaluated for message in run.said if message.HasField("evaluated")]
    assert [evaluated.evaluation for evaluated in said] == [7, 8]
    assert said[0].metrics == said[1].metrics  # both saw what the shards have
    run.commit(2, parts=1)
    assert run.close_to(run.expected(2, 0))


def test_a_worker_that_drains_holds_nothing_and_may_be_given_work_again() -> None:
    run = Rounds()
    run.hand_out(1)
    run.hand_out(2, start=BATCH, round=2, needs=1)
    run.work(batches=1)
    run.trainer.drain()
    assert run.said[-1].HasField("drained")
    assert not run.trainer.busy
    run.accept(1, round_=1, part=0)
    run.accept(2, round_=2, part=0)
    assert not run.contributions
    assert not run.reports
    run.hand_out(3, round=3, part=0)
    run.work()
    run.commit(3, parts=1)
    assert run.close_to(run.expected(1, 0))


# ── what is not finite ─────────────────────────────────────────────────────────────────────────


def test_a_batch_that_is_not_finite_is_reported_and_not_contributed() -> None:
    run = Rounds()
    run.poison = {1, 2}
    for number in (1, 2, 3):
        run.hand_out(number, start=(number - 1) * BATCH, part=number - 1)
    run.work()
    assert run.contributions == [(1, 2)]
    assert [report.nonfinite_streak for report in run.reports] == [1, 2, 0]
    assert run.reports[1].nonfinite_where == "W1"
    assert [brief(report)[0] for report in run.reports] == [1, 2, 3]


def test_a_report_speaks_of_its_own_batch_whatever_came_after_it() -> None:
    """The coordinator counts the parts that are in the sum: a wrong word is a part that is not."""
    run = Rounds()
    run.poison = {1, 4}
    for number in (1, 2, 3, 4):
        run.hand_out(number, start=(number - 1) * BATCH, part=number - 1)
    run.work()
    for number in (1, 2, 3, 4):
        run.accept(number, round_=2, part=number - 1)
    again = run.reports[4:]
    assert [report.nonfinite_streak for report in again] == [1, 0, 0, 1]
    assert run.contributions[2:] == [(2, 1), (2, 2)]
    run.commit(2, parts=2, scale=0.5)


# ── portions ───────────────────────────────────────────────────────────────────────────────────


def test_a_portion_is_the_sum_over_its_examples_in_pieces() -> None:
    run = Rounds("sandblaster", rows=50)
    run.hand_out(1, stop=120, part=3, fetch=True)
    run.work()
    assert run.gradients == 3
    assert run.contributions == [(1, 3)]
    (report,) = run.reports
    assert (report.examples, report.loss_count, report.steps) == (120, 120, 0)
    run.commit(1, parts=1)
    data, model = run.material.data, run.material.model
    out = {name: np.zeros(array.shape, np.float32) for name, array in run.initial.items()}
    first = {name: array.astype(np.float32) for name, array in run.initial.items()}
    loss = model.gradients(first, data.x[:120], data.y[:120], out)
    assert report.loss_sum == pytest.approx(120 * loss, rel=1e-5)
    flat = np.concatenate([out[tensor.name].ravel() for tensor in run.layout.tensors])
    moved = (run.expected(0, 0) - run.values()) / RATE
    np.testing.assert_allclose(moved, 120 * flat, rtol=1e-3, atol=1e-4)
    assert not run.loop._jobs
    assert len(run.loop._free) == 2


def test_a_portion_is_called_off_between_two_pieces() -> None:
    run = Rounds("sandblaster", rows=50)
    run.hand_out(1, stop=120, part=0)
    run.hand_out(2, start=120, stop=150, part=1)
    run.work(batches=2)
    run.late(1)
    run.work()
    assert run.gradients == 3
    assert run.contributions == [(1, 1)]
    assert [report.task for report in run.reports] == [2]


def test_parameters_are_fetched_even_if_the_job_that_says_so_is_called_off() -> None:
    """The coordinator says it once a round; the portion after it needs them just as much."""
    run = Rounds("sandblaster", rows=50)
    for channel in run.channels:
        for block in range(channel.shard.blocks):
            channel.shard.assign(block, np.full(channel.size(block), 0.25, np.float32))
    run.hand_out(1, stop=50, part=0, fetch=True)
    run.late(1)
    run.hand_out(2, start=50, stop=100, part=1)
    run.work()
    assert (run.loop._shards.shown.flat == 0.25).all()


def test_a_trial_that_is_not_finite_is_contributed_as_zeros_with_an_infinite_loss() -> None:
    """Every portion must be there for the pass to end; the search sees the loss and turns back."""
    run = Rounds("sandblaster", rows=50)
    run.poison = {3, 4}
    run.hand_out(1, stop=100, part=0)
    run.hand_out(2, start=100, stop=200, part=1)
    run.work()
    assert run.contributions == [(1, 0), (1, 1)]
    assert [math.isinf(report.loss_sum) for report in run.reports] == [False, True]
    assert [report.nonfinite_streak for report in run.reports] == [0, 0]  # no reason to end the run
    run.commit(1, parts=2)
    assert np.isfinite(run.values()).all()


def test_a_sum_that_overflows_is_not_finite() -> None:
    """Each piece is; the shards would refuse the sum."""
    run = Rounds("sandblaster", rows=50)
    original = run.material.model.functions.gradients

    def gradients(params: Any, x: Any, y: Any, out: Any) -> Any:
        loss, made = original(params, x, y, out=out)
        out["W1"][0, 0] = 6e36  # 50 times that is 3e38
        return loss, made

    functions = run.material.model.functions._replace(gradients=gradients)
    object.__setattr__(run.material.model, "functions", functions)
    run.hand_out(1, stop=100, part=0)
    run.work()
    assert run.contributions == [(1, 0)]
    assert math.isinf(run.reports[0].loss_sum)
