"""The task queue: nothing lost, nothing twice while nobody dies, and tasks of a fair size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import (
    EPOCHS_AHEAD,
    FIRST_BATCHES,
    TASK_S,
    EpochRecord,
    Remainder,
    Task,
    TaskQueue,
    order,
)


def queue_of(examples: int, batch_size: int, workers: int, **more: int) -> TaskQueue:
    queue = TaskQueue(Partitions.whole(examples), batch_size, **more)
    for worker in range(workers):
        queue.join(worker)
    return queue


def must_lease(queue: TaskQueue, worker: int) -> Task:
    task = queue.lease(worker)
    assert task is not None
    return task


def end(queue: TaskQueue, worker: int, task: Task, rate: float = 0.0) -> list[EpochRecord]:
    """The worker did all of it, at `rate` examples per second (0: says nothing about it)."""
    size = task.stop - task.start
    return queue.report(worker, task.id, task.stop, size, size / rate if rate else 0.0)


# ── the order ──────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    assert sorted(order(3, 1, 1000)) == list(range(1000))
    assert np.array_equal(order(3, 1, 1000), order(3, 1, 1000))
    assert not np.array_equal(order(3, 1, 1000), order(3, 2, 1000))
    assert not np.array_equal(order(3, 1, 1000), order(4, 1, 1000))
    assert not np.array_equal(order(1, 2, 1000), order(2, 1, 1000))


def test_an_order_exists_for_any_seed_and_for_one_example() -> None:
    assert list(order(-1, 1, 1)) == [0]
    assert sorted(order(-1, 1, 9)) == sorted(order(1 << 80, 1, 9))


# ── any schedule ───────────────────────────────────────────────────────────────────────────────

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["lease", "lease", "report", "report", "end", "end", "drain", "die"]),
        st.integers(0, 3),  # worker
        st.integers(0, 60),  # how far, of what is left; or how long until the fence
        st.floats(0.0, 0.5),  # busy seconds
    ),
    max_size=150,
)


class Model:
    """What was acknowledged, and what the queue said about it."""

    def __init__(self, examples: int, batch_size: int, max_epochs: int) -> None:
        self.n = examples
        self.queue = queue_of(examples, batch_size, 4, max_epochs=max_epochs)
        self.held: dict[int, dict[Task, int]] = {worker: {} for worker in range(4)}
        self.acknowledged: Counter[tuple[int, int]] = Counter()
        self.records: list[EpochRecord] = []
        self.unfenced: list[tuple[Remainder, ...]] = []
        self.stale: list[tuple[int, Task]] = []
        self.deaths = 0

    def act(self, action: str, worker: int, much: int, busy_s: float) -> None:
        if action == "lease":
            self.lease(worker)
        elif action in ("report", "end"):
            for task in list(self.held[worker])[:1]:
                self.report(worker, task, self.n if action == "end" else much, busy_s)
        elif action == "drain":
            self.held[worker].clear()
            self.queue.put_back(self.queue.withdraw(worker))
        else:
            self.die(worker)

    def lease(self, worker: int) -> Task | None:
        task = self.queue.lease(worker)
        if task is not None:
            for other in [task for held in self.held.values() for task in held]:
                apart = task.epoch != other.epoch or task.stop <= other.start
                assert apart or other.stop <= task.start
            self.held[worker][task] = task.start
        return task

    def report(self, worker: int, task: Task, much: int, busy_s: float) -> None:
        done = self.held[worker][task]
        upto = min(task.stop, done + much)
        self.acknowledged.update((task.epoch, i) for i in range(done, upto))
        self.held[worker][task] = upto
        if upto == task.stop:
            del self.held[worker][task]
        self.records += self.queue.report(worker, task.id, upto, upto - done, busy_s)

    def die(self, worker: int) -> None:
        """Its remainder comes back later; a new incarnation takes its place at once."""
        self.deaths += 1
        self.stale += [(worker, task) for task in self.held[worker]]
        self.held[worker].clear()
        self.unfenced.append(self.queue.leave(worker))
        self.queue.join(worker)
        if len(self.unfenced) > 2:
            self.queue.put_back(self.unfenced.pop(0))

    def finish(self) -> None:
        """Everybody who is left ends everything."""
        for remainders in self.unfenced:
            self.queue.put_back(remainders)
        while any(self.lease(worker) for worker in range(4)) or any(self.held.values()):
            for worker in range(4):
                for task in list(self.held[worker]):
                    self.report(worker, task, self.n, 0.01)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), ACTIONS)
def test_whatever_happens_each_position_is_acknowledged_once(
    examples: int, batch_size: int, epochs: int, actions: list[tuple[str, int, int, float]]
) -> None:
    model = Model(examples, batch_size, epochs)
    for action in actions:
        model.act(*action)
        assert model.queue.complete == len(model.records)
    for worker, task in model.stale:  # what the dead still say changes nothing
        assert model.queue.report(worker, task.id, task.stop, 5, 0.1) == []
    model.finish()
    assert [record.epoch for record in model.records] == list(range(1, epochs + 1))
    assert all(r.distinct == r.n == r.examples == examples for r in model.records)
    wanted = {(epoch, i) for epoch in range(1, epochs + 1) for i in range(examples)}
    assert set(model.acknowledged) == wanted
    assert set(model.acknowledged.values()) == {1}


def test_examples_count_what_was_computed_in_vain() -> None:
    queue = queue_of(20, 10, 1, max_epochs=1)
    task = must_lease(queue, 0)
    assert queue.report(0, task.id, 10, 20, 0.0) == []
    left = queue.leave(0)
    assert left == (Remainder(1, 10, 20),)
    queue.join(1)
    assert queue.lease(1, 0) is None
    queue.put_back(left)
    again = must_lease(queue, 1)
    assert (again.start, again.stop) == (10, 20)
    assert end(queue, 1, again) == [EpochRecord(1, examples=30, distinct=20, n=20)]


def test_a_report_that_goes_back_or_too_far_is_bounded() -> None:
    queue = queue_of(40, 10, 2)
    task = must_lease(queue, 0)
    queue.report(0, task.id, 10, 10, 0.0)
    queue.report(0, task.id, 0, 0, 0.0)
    assert queue.withdraw(0) == (Remainder(1, 10, 20),)
    queue.put_back([Remainder(1, 10, 20)])
    task = must_lease(queue, 0)
    queue.report(0, task.id, 99, 10, 0.0)
    assert queue.held(0) == 0
    assert queue.report(0, task.id, 99, 10, 0.0) == []


# ── what may be leased when ────────────────────────────────────────────────────────────────────


def test_the_next_epochs_are_leased_while_the_last_tasks_run_but_not_all() -> None:
    queue = queue_of(10, 10, 2)
    first = must_lease(queue, 0)
    tasks = [must_lease(queue, 1) for _ in range(EPOCHS_AHEAD)]
    assert [task.epoch for task in tasks] == [2, 3]
    assert queue.lease(1) is None
    assert end(queue, 1, tasks[0]) == []  # complete, but not its turn
    assert queue.lease(1) is None
    assert [record.epoch for record in end(queue, 0, first)] == [1, 2]
    assert must_lease(queue, 1).epoch == 4


def test_nothing_is_leased_beyond_the_last_epoch() -> None:
    queue = queue_of(10, 10, 1, max_epochs=1)
    task = must_lease(queue, 0)
    assert queue.lease(0) is None
    end(queue, 0, task)
    assert queue.lease(0) is None
    assert queue.complete == 1


def test_a_bound_in_batches_cuts_the_task() -> None:
    queue = queue_of(100, 10, 1)
    task = queue.lease(0, 3)
    assert task is not None
    assert task.stop - task.start == 30
    assert queue.outstanding_batches() == 3
    queue.report(0, task.id, 15, 15, 0.0)
    assert queue.outstanding_batches() == 2


# ── how much ───────────────────────────────────────────────────────────────────────────────────


def size(task: Task) -> int:
    return task.stop - task.start


def test_a_first_task_is_small_and_later_ones_cover_the_promised_work() -> None:
    queue = queue_of(1_000_000, 32, 2)
    first = must_lease(queue, 0)
    assert size(first) == FIRST_BATCHES * 32
    end(queue, 0, first, rate=10_000)
    second = must_lease(queue, 0)
    assert size(second) % 32 == 0
    assert TASK_S * 10_000 <= size(second) <= TASK_S * 10_000 + 32


def test_a_batch_that_takes_long_is_a_task() -> None:
    queue = queue_of(1000, 10, 2)
    end(queue, 0, must_lease(queue, 0), rate=1.0)
    assert size(must_lease(queue, 0)) == 10


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_a_short_epoch_is_shared_fairly(workers: int) -> None:
    queue = queue_of(1437, 1, workers, max_epochs=2)
    for worker in range(workers):
        end(queue, worker, must_lease(queue, worker), rate=1e6)
    rest = [must_lease(queue, worker) for worker in range(workers)]
    assert max(size(task) for task in rest) <= -(-1437 // workers) * 1.25


def test_a_slow_worker_gets_less_of_a_short_epoch() -> None:
    queue = queue_of(3000, 10, 2)
    for worker, rate in ((0, 100_000), (1, 200_000)):
        end(queue, worker, must_lease(queue, worker), rate=rate)
    while (task := must_lease(queue, 0)).epoch == 1:
        end(queue, 0, task, rate=100_000)
    other = must_lease(queue, 1)
    assert task.epoch == other.epoch == 2
    assert (size(task), size(other)) == (1000, 2000)


def test_tasks_get_smaller_at_the_end_of_a_long_epoch() -> None:
    queue = queue_of(1 << 17, 8, 2, max_epochs=1)
    for worker in (0, 1):
        end(queue, worker, must_lease(queue, worker), rate=8192)
    sizes: list[int] = []
    while (task := queue.lease(len(sizes) % 2)) is not None:
        end(queue, len(sizes) % 2, task, rate=8192)
        sizes.append(size(task))
    assert sizes[0] == 2048
    assert sizes == sorted(sizes, reverse=True)
    assert 512 / 4 <= sizes[-1] <= 512 * 1.25  # a quarter of a task; less is left for the last
    assert sum(sizes) + 2 * FIRST_BATCHES * 8 == 1 << 17


def test_speed_forgets_the_past() -> None:
    queue = queue_of(10_000_000, 10, 1)
    for _ in range(5):
        end(queue, 0, must_lease(queue, 0), rate=100)
    for _ in range(60):
        end(queue, 0, must_lease(queue, 0), rate=10_000)
    assert size(must_lease(queue, 0)) == pytest.approx(TASK_S * 10_000, rel=0.1)


def test_a_batch_takes_what_it_took_or_what_it_takes_the_slowest() -> None:
    queue = queue_of(1000, 10, 3)
    assert queue.batch_s(0) is None
    end(queue, 0, must_lease(queue, 0), rate=100.0)
    end(queue, 1, must_lease(queue, 1), rate=20.0)
    assert [queue.batch_s(worker) for worker in range(4)] == [0.1, 0.5, 0.5, 0.5]
    queue.leave(1)  # and comes back
    assert queue.batch_s(1) == 0.5


# ── partitions ─────────────────────────────────────────────────────────────────────────────────


def two_partitions() -> TaskQueue:
    """Workers 0 and 1 have 100 examples, worker 2 has 30 others."""
    queue = TaskQueue(Partitions((100, 30), (0, 0, 1)), 10)
    for worker in range(3):
        queue.join(worker)
    return queue


def test_a_worker_gets_what_its_host_has() -> None:
    queue = two_partitions()
    tasks = {worker: must_lease(queue, worker) for worker in range(3)}
    assert [(task.partition, task.start) for task in tasks.values()] == [(0, 0), (0, 40), (1, 0)]
    assert tasks[2].stop == 30
    assert end(queue, 2, tasks[2]) == []  # the others are not through
    assert must_lease(queue, 2).epoch == 2
    assert [must_lease(queue, 0).partition for _ in range(2)] == [0, 0]


def test_an_epoch_is_complete_when_all_partitions_are() -> None:
    queue = two_partitions()
    for _ in range(EPOCHS_AHEAD + 1):
        assert end(queue, 2, must_lease(queue, 2)) == []
    assert queue.lease(2) is None  # two epochs ahead of the others
    while not (complete := end(queue, 0, must_lease(queue, 0))):
        pass
    assert complete == [EpochRecord(1, 130, 130, 130)]
    assert must_lease(queue, 2).epoch == EPOCHS_AHEAD + 2


def test_what_a_lost_worker_had_goes_back_to_its_partition() -> None:
    queue = two_partitions()
    task = must_lease(queue, 2)
    queue.report(2, task.id, 10, 10, 0.0)
    (left,) = queue.leave(2)
    assert left == Remainder(1, 10, 30, 1)
    queue.put_back([left])
    while (other := queue.lease(0)) is not None and other.epoch == 1:
        assert other.partition == 0
    queue.join(2)
    assert must_lease(queue, 2) == Task(queue._last_id, 1, 10, 30, 1)


def test_a_share_is_one_of_those_who_have_the_same() -> None:
    """Whatever others do elsewhere, the only worker of a partition takes all of a short epoch."""
    queue = two_partitions()
    for worker in range(3):
        end(queue, worker, must_lease(queue, worker), rate=10_000.0)
    task = must_lease(queue, 2)
    assert (task.start, task.stop) == (0, 30)
