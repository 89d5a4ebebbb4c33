"""Processes die; each test asserts that its fault happened."""

from __future__ import annotations

import json
import os
import signal

from tests.end_to_end.conftest import User, wait_until
from tests.freezing import freeze

LONG = """
name: NAME
servers: 2
workers: 2
lease: 5s
train:
  until: {accuracy: 1.0, loss: 0.0, max_epochs: 150}
"""


def begin(user: User, text: str = LONG):  # type: ignore[no-untyped-def]
    """A training that has made progress."""
    user.write(text)
    process = user.start("train", "cluster.yaml", "--json", "--allow-unconverged")
    assert process.stdout is not None
    for line in process.stdout:
        if '"progress"' in line and json.loads(line)["step"] > 0:
            return process
    raise AssertionError(process.communicate()[1])


def test_a_killed_worker_is_restarted_and_no_example_is_lost(user: User) -> None:
    process = begin(user)
    victim = user.pid_of("worker/1")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    again = wait_until(lambda: (pid := user.pid_of("worker/1")) != victim and pid, 10, "a restart")
    assert again != victim
    run = user.finish(process)
    assert run.code == 0, run.err
    records = user.metrics(run.summary["run_dir"])
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert len(epochs) == 150
    assert all(r["distinct"] == r["n"] == 1437 for r in epochs)
    joined = [r for r in records if r["kind"] == "event" and r["event"] == "joined"]
    assert max(r["incarnation"] for r in joined if r["process"] == "worker/1") >= 2
    assert "worker/1@local" in run.err
    assert "killed by SIGKILL" in run.err
    user.assert_nothing_left()


def test_a_dead_server_ends_the_run_with_its_cause(user: User) -> None:
    process = begin(user)
    victim = user.pid_of("server/1")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    run = user.finish(process, timeout_s=20)
    assert run.code == 6, run.err
    assert run.summary["outcome"] == "failed"
    assert f"error: server/1@local (pid {victim}) failed: killed by SIGKILL" in run.err
    user.assert_nothing_left()


def test_a_dead_coordinator_ends_the_run_with_its_cause(user: User) -> None:
    process = begin(user)
    victim = user.pid_of("coordinator/0")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    run = user.finish(process, timeout_s=20)
    assert run.code == 6, run.err
    assert f"coordinator/0@local (pid {victim}) failed: killed by SIGKILL" in run.err
    user.assert_nothing_left()


def test_a_killed_agent_takes_its_processes_along_and_the_launcher_says_so(user: User) -> None:
    process = begin(user)
    agent = user.pid_of("agent")
    daemons = {m.pid for m in user.members()} - {agent}
    assert agent is not None
    assert len(daemons) == 5
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: not daemons & {m.pid for m in user.members()}, 3, "the daemons' end")
    run = user.finish(process, timeout_s=20)
    assert run.code == 6, run.err
    user.assert_nothing_left()


def test_a_frozen_worker_is_killed_at_the_end(user: User) -> None:
    process = begin(user, LONG.replace("max_epochs: 150", "max_time: 3s"))
    victim = user.pid_of("worker/0")
    assert victim is not None
    freeze(victim)
    run = user.finish(process, timeout_s=40)
    assert run.code == 0, run.err
    user.assert_nothing_left()


LEAVES = """
import os
import numpy as np

calls = 0
def init(rng, example): return {"w": np.zeros((64, 10))}
def predict(params, x): return np.zeros((len(x), 10))
def gradients(params, x, y):
    global calls
    calls += 1
    if calls > 20:
        os._exit(0)
    return 0.5, {"w": np.zeros((64, 10))}
"""


def test_a_worker_that_leaves_with_status_0_is_not_taken_for_done(user: User) -> None:
    process = begin(user, LONG.replace("max_epochs: 150", "max_time: 3s"))
    user.finish(process)
    user.write(LEAVES, "model.py")
    run = user.dsgd("train", "--allow-unconverged", "--set", "train.model=model.py", timeout_s=90)
    assert "exit status 0; its agent restarts it" in run.err
    user.assert_nothing_left()


SPOILS = """
import numpy as np

def init(rng, example): return {"w": np.zeros((64, 10))}
def predict(params, x):
    x /= 16
    return x.reshape(len(x), -1) @ params["w"]
def gradients(params, x, y): return 0.5, {"w": np.zeros((64, 10))}
"""


def test_a_model_that_changes_the_held_out_examples_fails_on_its_own_line(user: User) -> None:
    user.write(LONG)
    user.write(SPOILS, "model.py")
    run = user.dsgd("train", "--set", "train.model=model.py")
    assert run.code == 6
    assert "x /= 16" in run.err
    assert "read-only" in run.err.splitlines()[-1]
    user.assert_nothing_left()


def test_keep_keeps_the_cluster_when_the_model_fails_and_its_parameters_come_home(
    user: User,
) -> None:
    user.write(LONG)
    assert user.dsgd("up").code == 0
    before = {(m.pid, m.process) for m in user.members()}
    user.write(LEAVES.replace("os._exit(0)", "raise ValueError('late')"), "model.py")
    run = user.dsgd("train", "--keep", "--json", "--set", "train.model=model.py")
    assert (run.code, run.summary["outcome"]) == (6, "failed"), run.err
    assert "ValueError: late" in run.err
    assert run.summary["model"] is not None
    assert {(m.pid, m.process) for m in user.members()} == before
    assert user.dsgd("train", "--json", "--allow-unconverged").code == 0
    user.assert_nothing_left()
