"""Training that is exact: what several real processes compute, one process computes, too.

The reference is a loop of a few lines with textbook updates: no shards, no blocks, no rounds. All
is in float64, so that what is left are the last bits of sums that were added in another order. A
batch that is lost, counted twice or swapped with one of another step moves the parameters by 1e-3.
"""

from __future__ import annotations

import functools
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.spec import Train
from dsgd_cli.daemons import material
from dsgd_cli.engine.tasks import order
from tests.daemons import models
from tests.daemons.agent import Cluster, Message, cluster
from tests.daemons.test_runs import EXAMPLES, event, exported, of_worker, written
from tests.freezing import freeze

Vector = np.ndarray[Any, Any]
Update = Callable[[Vector, Vector, int], None]  # parameters, gradient, t = 1, 2, ...

WORKERS = 3
BATCH = 32
STEPS = 100
TOLERANCE = 1e-12  # of the distance, relative to the norm; measured: 3e-16


# ── one process ────────────────────────────────────────────────────────────────────────────────


def sgd(learning_rate: float) -> Update:
    def update(w: Vector, g: Vector, t: int) -> None:
        w -= learning_rate * g

    return update


def momentum(learning_rate: float) -> Update:
    v: Any = 0.0

    def update(w: Vector, g: Vector, t: int) -> None:
        nonlocal v
        v = 0.9 * v + g
        w -= learning_rate * v

    return update


def adagrad(learning_rate: float) -> Update:
    squares: Any = 0.1

    def update(w: Vector, g: Vector, t: int) -> None:
        nonlocal squares
        squares = squares + g**2
        w -= learning_rate * g / (np.sqrt(squares) + 1e-7)

    return update


def adam(learning_rate: float) -> Update:
    m: Any = 0.0
    v: Any = 0.0

    def update(w: Vector, g: Vector, t: int) -> None:
        nonlocal m, v
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        w -= learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    return update


RULES: dict[str, tuple[Callable[[float], Update], float]] = {
    "sgd": (sgd, 0.1),
    "momentum": (momentum, 0.02),
    "adagrad": (adagrad, 0.05),
    "adam": (adam, 0.002),
}


def train_of(
    optimizer: str = "sgd", algorithm: Any = "synchronous", model: str = "mlp", **until: int
) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float64",
        "batch_size": BATCH,
        "algorithm": algorithm,
        "optimizer": {optimizer: {"learning_rate": RULES[optimizer][1]}},
        "until": until,
    }


def batches(examples: int) -> Iterator[Vector]:
    """The examples of each batch, one epoch after the other; an epoch's last may be smaller."""
    for epoch in itertools.count(1):
        rows = order(0, epoch, examples)
        for start in range(0, examples, BATCH):
            yield rows[start : start + BATCH]


@functools.cache
def alone(
    optimizer: str = "sgd",
    at_once: int = WORKERS,
    count: int = STEPS * WORKERS,
    model: str = "mlp",
    clip_norm: float = np.inf,
) -> Vector:
    """What one process learns of `count` batches, if `at_once` of them make one of its own."""
    train = Train.model_validate(train_of(optimizer, model=model)).model_dump(mode="json")
    found = material.load(train, 0, {})
    params = {name: array.copy() for name, array in found.initial().items()}
    make, rate = RULES[optimizer]
    updates = {name: make(rate) for name in params}
    stream = itertools.islice(batches(found.data.examples), count)
    for step in itertools.count(1):
        together = list(itertools.islice(stream, at_once))
        if not together:
            return vector(params)
        rows = np.concatenate(together)
        x, y = found.data.x[rows], found.data.y[rows]
        _, gradient = found.model.functions.gradients(params, x, y)
        scale = min(1.0, clip_norm / float(np.linalg.norm(vector(gradient))))
        for name, update in updates.items():
            update(params[name], gradient[name] * scale, step)
    raise AssertionError


def vector(params: dict[str, Vector]) -> Vector:
    return np.concatenate([params[name].ravel() for name in sorted(params)])


def distance(finished: Message, expected: Vector) -> float:
    found = vector(exported(finished))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ── many ───────────────────────────────────────────────────────────────────────────────────────

CHANNELS: dict[str, dict[str, Any]] = {
    "shm": {"name": "shm", "options": {}},
    "tcp": {"name": "tcp", "options": {"encrypt": True}},
    "tcp-plain": {"name": "tcp", "options": {"encrypt": False}},
    "grpc": {"name": "grpc", "options": {}},
}
SHARDS = (1, 2, 3)
# Each optimizer over two of the channels, each channel with two of the optimizers, and all with one
# of the numbers of shards or another; whatever else can be combined is slow.
QUICK = {
    (SHARDS[(row + 2 * next_to) % len(SHARDS)], optimizer, tuple(CHANNELS)[(row + next_to) % 4])
    for row, optimizer in enumerate(RULES)
    for next_to in (0, 1)
}
ALL = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(SHARDS, RULES, CHANNELS)
]


@pytest.fixture(scope="module")
def formed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A cluster with so many servers, for all the runs that want one."""
    folder = tmp_path_factory.mktemp("exact")
    with cluster(folder, servers=request.param, workers=WORKERS) as made:
        yield made


@pytest.mark.parametrize(("formed", "optimizer", "channel"), ALL, indirect=["formed"])
def test_synchronous_workers_are_one_process_with_a_larger_batch(
    formed: Cluster, optimizer: str, channel: str
) -> None:
    train = train_of(optimizer, max_steps=STEPS * WORKERS)
    finished = formed.finished(formed.run(train, channel=CHANNELS[channel]))
    assert finished["steps"] == STEPS * WORKERS
    assert distance(finished, alone(optimizer)) <= TOLERANCE
    assert distance(finished, alone(optimizer, count=STEPS * WORKERS - 1)) > 1e-5


@pytest.mark.parametrize("formed", [2], indirect=True)
def test_a_clipped_step_is_that_of_one_process(formed: Cluster) -> None:
    """The norm is that of the whole gradient, over all shards, before it is applied."""
    train = train_of(max_steps=STEPS * WORKERS)
    train["optimizer"]["sgd"]["clip_norm"] = 0.5
    finished = formed.finished(formed.run(train))
    assert distance(finished, alone(clip_norm=0.5)) <= TOLERANCE
    assert distance(finished, alone()) > 1e-2


@pytest.mark.parametrize("formed", [2], indirect=True)
def test_in_float32_only_its_rounding_is_left(formed: Cluster) -> None:
    train = train_of("adam", max_steps=STEPS * WORKERS) | {"dtype": "float32"}
    finished = formed.finished(formed.run(train))
    assert distance(finished, alone("adam")) <= 1e-6  # measured: 2.5e-7


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Cluster]:
    """Two workers: an epoch's 45 batches are no whole number of steps."""
    with cluster(tmp_path, servers=2, workers=2) as made:
        yield made


def test_a_step_goes_over_the_end_of_an_epoch_and_the_last_is_of_what_is_left(
    pair: Cluster,
) -> None:
    finished = pair.finished(pair.run(train_of("adam", max_epochs=3)))
    assert finished["steps"] == 3 * 45
    assert distance(finished, alone("adam", at_once=2, count=3 * 45)) <= TOLERANCE
    again = pair.finished(pair.run(train_of("adam", max_steps=31)))
    assert again["steps"] == 31
    assert distance(again, alone("adam", at_once=2, count=31)) <= TOLERANCE


# ── whoever dies ───────────────────────────────────────────────────────────────────────────────


def check_that_nothing_is_lost(made: Cluster, finished: Message, expected: Vector) -> None:
    assert finished["outcome"] == "finished", finished
    assert distance(finished, expected) <= TOLERANCE
    epochs = made.records("epoch")
    assert {(epoch["examples"], epoch["distinct"]) for epoch in epochs} == {(EXAMPLES, EXAMPLES)}


def test_a_worker_killed_in_the_middle_of_a_step_changes_nothing(
    new_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """It dies in its user's function: its batch is accepted, and nobody has its gradient."""
    made = new_cluster(servers=2, workers=WORKERS)
    model = written(tmp_path, "model.py", models.DIES)
    run = made.run(train_of("momentum", model=model, max_steps=STEPS * WORKERS))
    victim = made.children["worker/1"].popen
    assert victim.wait(30) == -signal.SIGKILL
    died_at = int(Path(tmp_path, "died").read_text())
    assert died_at > 10
    assert not made.coordinator.all("finished")
    made.restart(1)
    finished = made.finished(run)
    assert finished["steps"] == STEPS * WORKERS
    check_that_nothing_is_lost(made, finished, alone("momentum", model=model))
    assert [len(of_worker(made, 1, what)) for what in ("lost", "joined")] == [1, 2]
    assert made.children["worker/1"].popen.poll() is None


def test_a_worker_killed_while_a_shard_stands_still_changes_nothing(
    new_cluster: Callable[..., Cluster],
) -> None:
    """So some shards have its gradient, or their commit, and one has not: all or nothing."""
    made = new_cluster(servers=3, workers=WORKERS)
    run = made.run(train_of("adagrad", max_epochs=50))
    made.coordinator.wait_for("progress")
    for victim, still in ((1, 2), (2, 0)):
        server = made.children[f"server/{still}"].popen
        freeze(server.pid)
        time.sleep(0.2)  # whatever was under way waits for that shard now
        made.children[f"worker/{victim}"].kill()
        server.send_signal(signal.SIGCONT)
        assert not made.coordinator.all("finished"), "the kill was to happen mid-run"
        joined(made, victim)
    finished = made.finished(run)
    check_that_nothing_is_lost(made, finished, alone("adagrad", count=50 * 45))
    assert [len(of_worker(made, worker, "lost")) for worker in range(WORKERS)] == [0, 1, 1]


def test_a_portion_counts_once_whoever_dies_over_it(
    new_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """The same steps, line search and all, as if nobody had died."""
    made = new_cluster(servers=2, workers=WORKERS)
    portions = {"sandblaster": {"rows": 64, "portions": 6}}
    train = train_of(algorithm=portions, model=written(tmp_path, "m.py", models.DIES), max_steps=15)
    del train["batch_size"]
    run = made.run(train)
    assert made.children["worker/1"].popen.wait(30) == -signal.SIGKILL
    assert not made.coordinator.all("finished")
    made.restart(1)
    finished = made.finished(run)
    undisturbed = made.finished(made.run(train))
    assert finished["steps"] == undisturbed["steps"] == 15
    assert distance(finished, vector(exported(undisturbed))) <= 1e-10  # measured: 3e-14
    assert finished["loss"] < 0.2


def joined(made: Cluster, worker: int) -> None:
    """Starts it again, and waits until it is in the run."""
    before = len(made.coordinator.messages)
    made.restart(worker)
    made.coordinator.wait_for("record", 20, lambda m: event(m) == "joined", after=before)


@pytest.mark.slow
@pytest.mark.parametrize("channel", CHANNELS)
def test_workers_killed_again_and_again_change_nothing(
    new_cluster: Callable[..., Cluster], tmp_path: Path, channel: str
) -> None:
    """Wherever they are: computing, in the middle of a contribution, between two steps."""
    made = new_cluster(servers=3, workers=WORKERS)
    chance = np.random.default_rng(7)
    epochs = 100
    run = made.run(train_of("adagrad", max_epochs=epochs), channel=CHANNELS[channel])
    made.coordinator.wait_for("progress")
    for _ in range(6):
        victim = int(chance.integers(WORKERS))
        made.children[f"worker/{victim}"].kill()
        assert not made.coordinator.all("finished"), "the kills were to happen mid-run"
        joined(made, victim)
        time.sleep(float(chance.uniform(0.05, 0.4)))
    finished = made.finished(run)
    check_that_nothing_is_lost(made, finished, alone("adagrad", count=epochs * 45))
    assert sum(len(of_worker(made, worker, "lost")) for worker in range(WORKERS)) == 6


# ── one worker ─────────────────────────────────────────────────────────────────────────────────


def test_downpour_with_one_worker_that_waits_is_plain_gradient_descent(
    new_cluster: Callable[..., Cluster],
) -> None:
    """Without overlap, and with a push and a fetch each step, nothing is ever stale."""
    made = new_cluster(servers=2, workers=1)
    waits = {"downpour": {"overlap": False, "push_every": 1, "fetch_every": 1}}
    for optimizer, channel in zip(RULES, CHANNELS.values(), strict=True):
        train = train_of(optimizer, waits, max_steps=STEPS)
        finished = made.finished(made.run(train, channel=channel))
        assert finished["steps"] == STEPS
        assert distance(finished, alone(optimizer, at_once=1, count=STEPS)) <= TOLERANCE
        assert finished["staleness"]["histogram"] == {"0": STEPS}


# ── whoever is late ────────────────────────────────────────────────────────────────────────────


def test_with_a_backup_worker_every_example_still_counts_once(
    new_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """Which batches make a step is open then, but not which make an epoch."""
    made = new_cluster(servers=2, workers=WORKERS)
    backup = {"synchronous": {"backup_workers": 1}}
    train = train_of("momentum", backup, max_epochs=8)
    finished = made.finished(made.run(train))
    assert finished["outcome"] == "finished"
    assert finished["steps"] == 8 * 45
    assert finished["metrics"]["accuracy"] > 0.9
    epochs = made.records("epoch")
    assert {(epoch["examples"], epoch["distinct"]) for epoch in epochs} == {(EXAMPLES, EXAMPLES)}
