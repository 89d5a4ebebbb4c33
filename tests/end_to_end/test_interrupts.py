"""Ctrl-C, SIGTERM, SIGHUP, timeouts, and a launcher that is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
from safetensors.numpy import load_file

from tests.end_to_end.conftest import User, wait_until
from tests.freezing import freeze

ENDLESS = """
name: NAME
servers: 2
workers: 2
lease: 2s
train:
  until: {accuracy: 1.0, loss: 0.0, max_epochs: 1000000}
"""


def training(user: User, *arguments: str):  # type: ignore[no-untyped-def]
    """An endless training that has made progress."""
    user.write(ENDLESS)
    process = user.start("train", "cluster.yaml", "--json", *arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if '"progress"' in line:
            return process
    pytest.fail(process.communicate()[1])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_signal_stops_cleanly_and_the_model_comes_home(
    user: User, number: signal.Signals, code: int
) -> None:
    process = training(user)
    process.send_signal(number)
    run = user.finish(process, timeout_s=15)
    assert run.code == code, run.err
    assert run.summary["outcome"] == "stopped"
    assert run.summary["left"] == 0
    assert load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    user.assert_nothing_left()


def test_a_second_ctrl_c_kills(user: User) -> None:
    process = training(user)
    workers = [m.pid for m in user.members() if m.process.startswith(("worker", "server"))]
    for pid in workers:
        freeze(pid)  # so that a clean stop cannot be quick
    process.send_signal(signal.SIGINT)
    wait_until(lambda: b"Ctrl-C" in os.read(process.stderr.fileno(), 65536), 5, "the note")
    process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=10)
    assert run.code == 131, run.err
    assert run.seconds < 5
    user.assert_nothing_left()


def test_the_timeout_is_124_and_clean(user: User) -> None:
    process = training(user, "--timeout", "4s")
    run = user.finish(process, timeout_s=30)
    assert (run.code, run.summary["outcome"]) == (124, "timeout")
    user.assert_nothing_left()


def test_kill_9_of_the_launcher_leaves_nothing_within_the_lease(user: User) -> None:
    process = training(user)
    assert len(user.members()) == 6
    process.kill()
    killed_at = time.monotonic()
    wait_until(lambda: not user.members(), 2 + 5, "everything ends by itself")
    assert time.monotonic() - killed_at > 0.5  # the lease was respected, not the pipe's end
    wait_until(lambda: not user.files_left(), 1, "no run directory")


@pytest.mark.parametrize("delay_s", [0.05, 0.3, 0.5, 0.7, 0.9, 1.2])
def test_ctrl_c_at_any_moment_of_the_start_leaves_nothing(user: User, delay_s: float) -> None:
    user.write(ENDLESS)
    process = user.start("train", "cluster.yaml", "--json")
    time.sleep(delay_s)  # the moment is the point: there is no condition to wait for
    process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=20)
    # before our first line the answer is Python's: the signal's code, or a traceback of its start
    before_us = run.err.rstrip().endswith("KeyboardInterrupt") and "dsgd_cli" not in run.err
    assert run.code in (130, -signal.SIGINT) or before_us, run.err
    user.assert_nothing_left()


STUBBORN = """
import subprocess, sys
import numpy as np

ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignore])

def init(rng, example): return {"w": np.zeros((64, 10))}
def predict(params, x): return x.reshape(len(x), -1) @ params["w"]
def gradients(params, x, y): return 0.5, {"w": np.zeros((64, 10))}
"""


def finishing(user: User):  # type: ignore[no-untyped-def]
    """A training that has ended, whose teardown takes some seconds: a child ignores SIGTERM."""
    text = ENDLESS.replace("max_epochs: 1000000", "max_steps: 50").replace("lease: 2s", "lease: 9s")
    user.write(text.replace("servers: 2", "servers: 1"))
    user.write(STUBBORN, "model.py")
    settings = ("--set", "train.model=model.py", "--allow-unconverged", "--json")
    process = user.start("train", *settings)
    wait_until(lambda: user.pid_of("worker/1"), 20, "the start")
    wait_until(lambda: user.pid_of("coordinator/0") is None, 30, "the teardown's beginning")
    assert process.poll() is None
    return process


def test_ctrl_c_while_it_finishes_changes_nothing_but_the_exit_code(user: User) -> None:
    process = finishing(user)
    process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=30)
    assert run.code == 130, run.err
    assert "Ctrl-C: finishing" in run.err
    assert run.lines[-1]["type"] == "summary"
    assert load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    user.assert_nothing_left()


def test_three_ctrl_c_still_leave_nothing(user: User) -> None:
    process = finishing(user)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)  # the kernel merges signals that are pending at once
    run = user.finish(process, timeout_s=30)
    assert run.code == 131, run.err
    assert run.lines[-1]["type"] == "summary"
    user.assert_nothing_left()


def test_a_launcher_that_fails_before_it_holds_the_cluster_touches_nothing(user: User) -> None:
    process = training(user)
    before = {(m.pid, m.process) for m in user.members()}
    for timeout in ("0.1", "0.15", "0.2", "0.3"):
        other = user.dsgd("up", "--timeout", timeout)
        assert other.code in (8, 124), other.err
        assert "stopped" not in other.err.replace("stopped by --timeout", "")
    assert {(m.pid, m.process) for m in user.members()} == before
    process.send_signal(signal.SIGINT)
    assert user.finish(process, timeout_s=20).code == 130
    user.assert_nothing_left()


def test_ctrl_c_of_an_up_that_repairs_leaves_the_cluster_as_it_was(user: User) -> None:
    user.write(ENDLESS)
    assert user.dsgd("up").code == 0
    before = {(m.pid, m.process) for m in user.members()}
    assert len(before) == 6
    for delay_s in (0.1, 0.2, 0.3, 0.4):
        process = user.start("up")
        time.sleep(delay_s)  # the moment is the point
        process.send_signal(signal.SIGINT)
        assert user.finish(process, timeout_s=10).code in (0, 130, -signal.SIGINT)
    assert {(m.pid, m.process) for m in user.members()} == before
    assert user.dsgd("down").code == 0
    user.assert_nothing_left()


SLEEPER = """
import time
import numpy as np

def init(rng, example): return {"w": np.zeros((64, 10))}
def predict(params, x): return np.zeros((len(x), 10))
calls = 0
def gradients(params, x, y):
    global calls
    calls += 1
    if calls > 20:
        open(ASLEEP, "w").close()
        time.sleep(600)
    return 0.5, {"w": np.zeros((64, 10))}
"""


@pytest.mark.parametrize("limit", ["max_time: 4s", "max_epochs: 1000000"])
def test_a_gradient_that_sleeps_for_ever_does_not_hold_up_the_end(user: User, limit: str) -> None:
    user.write(ENDLESS.replace("max_epochs: 1000000", limit).replace("servers: 2", "servers: 1"))
    asleep = user.folder / "asleep"
    user.write(SLEEPER.replace("ASLEEP", repr(str(asleep))), "model.py")
    settings = ("--set", "train.model=model.py", "--allow-unconverged", "--json")
    process = user.start("train", *settings)
    if limit.startswith("max_epochs"):
        wait_until(asleep.exists, 20, "a worker to sleep")
        process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=40)
    assert run.code == (130 if limit.startswith("max_epochs") else 0), run.err
    assert run.summary["outcome"] == "stopped"
    assert load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    user.assert_nothing_left()
