"""One worker is five times slower: who is held up by it, and who is not.

Gradients sleep, so that the cores that the slow worker leaves idle make nobody else faster, and so
that what the machine does besides hardly counts. Rates are taken from metrics.jsonl between the
first and the last record, so that the start and the end of a run do not count either.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.conftest import Run, User

pytestmark = pytest.mark.slow  # and alone on the machine: these are about time

MODEL = """
import sys, time
import numpy as np

SLEEP_S = {sleep_s} * ({factor} if sys.argv[1] == "worker/0" else 1)

def init(rng, example): return {{"W": np.zeros((64, 10))}}
def predict(params, x): return x @ params["W"]

def gradients(params, x, y):
    time.sleep(SLEEP_S)
    z = predict(params, x)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    p[np.arange(len(y)), y] -= 1
    return loss, {{"W": x.T @ p / len(y)}}
"""

CLUSTER = """
name: NAME
servers: 2
workers: {workers}
train:
  model: model.py
  algorithm: {algorithm}
  evaluate: {{every: 1000 epochs}}
  until: {{{until}}}
"""

Records = list[dict[str, Any]]


def train(
    user: User, algorithm: str, until: str, factor: float, workers: int = 3, sleep_s: float = 0.05
) -> tuple[Run, Records]:
    """A run in which worker/0 takes `factor` times as long, and its records."""
    user.write(MODEL.format(sleep_s=sleep_s, factor=factor), "model.py")
    user.write(CLUSTER.format(workers=workers, algorithm=algorithm, until=until))
    run = user.dsgd("train", "cluster.yaml", "--json", "--allow-unconverged")
    assert run.code == 0, run.err
    user.assert_nothing_left()
    return run, user.metrics(run.summary["run_dir"])


def of(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def steps_per_s(reports: Records) -> float:
    """Of the workers that these reports come from, after their first one."""
    first, last = reports[0]["time"], reports[-1]["time"]
    return float(sum(report["steps"] for report in reports[1:]) / (last - first))


def batches_of(reports: Records, worker: int) -> int:
    return sum(report["steps"] for report in reports if report["worker"] == worker)


def test_a_synchronous_step_does_not_wait_for_a_backup(user: User) -> None:
    algorithm, until = "{synchronous: {backup_workers: 1}}", "max_steps: 100"
    usual = of(train(user, algorithm, until, factor=1)[1], "report")
    slow = of(train(user, algorithm, until, factor=5)[1], "report")
    assert steps_per_s(slow) >= steps_per_s(usual) / 1.15
    assert sum(batches_of(slow, worker) for worker in range(3)) == 100
    assert batches_of(slow, 0) < 100 / 5  # it was too late for most steps


def test_downpour_goes_on_as_if_nobody_were_slow(user: User) -> None:
    until = "max_time: 10s"  # a record may lag by a fifth of a second
    usual = of(train(user, "downpour", until, factor=1)[1], "report")
    slow = of(train(user, "downpour", until, factor=5)[1], "report")
    for worker in (1, 2):
        mine, before = ([r for r in run if r["worker"] == worker] for run in (slow, usual))
        assert steps_per_s(mine) >= steps_per_s(before) / 1.1
    assert batches_of(slow, 0) < batches_of(slow, 1) / 3


def test_stale_synchronous_workers_wait_within_their_bound(user: User) -> None:
    algorithm = "{stale_synchronous: {bound: 2}}"
    reports = of(train(user, algorithm, "max_time: 4s", factor=5)[1], "report")
    batches = [batches_of(reports, worker) for worker in range(3)]
    assert batches[0] >= 5
    assert max(batches) - batches[0] <= 2 + 1 + 1  # the bound, and what is under way


def test_a_sandblaster_iteration_does_not_wait_for_the_slowest_portion(user: User) -> None:
    algorithm = "{sandblaster: {portions: 10, method: gradient_descent}}"
    seconds = []
    for factor in (1, 5):
        run, records = train(
            user, algorithm, "max_epochs: 8", factor=factor, workers=4, sleep_s=0.02
        )
        epochs = of(records, "epoch")
        assert [record["distinct"] for record in epochs] == [1437] * 8
        seconds.append(sorted(record["seconds"] for record in epochs[1:])[len(epochs) // 2])
        assert run.summary["epochs"] == 8
    # Four workers do the work of 3.2: that alone takes 1.25 times as long.
    usual, slow = seconds
    assert slow <= 1.3 * 1.25 * usual, seconds
