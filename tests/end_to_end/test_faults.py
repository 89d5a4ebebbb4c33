"""Processes die; each test asserts that its fault happened."""

from __future__ import annotations

import json
import os
import signal

from tests.end_to_end.conftest import User, wait_until

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
    os.kill(victim, signal.SIGSTOP)
    run = user.finish(process, timeout_s=40)
    assert run.code == 0, run.err
    user.assert_nothing_left()
