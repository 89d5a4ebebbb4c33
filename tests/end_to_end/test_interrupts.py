"""Ctrl-C, SIGTERM, SIGHUP, timeouts, and a launcher that is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
from safetensors.numpy import load_file

from tests.end_to_end.conftest import User, wait_until

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
        os.kill(pid, signal.SIGSTOP)  # so that a clean stop cannot be quick
    process.send_signal(signal.SIGINT)
    wait_until(lambda: b"Ctrl-C" in os.read(process.stderr.fileno(), 65536), 5, "the note")
    process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=10)
    assert run.code == 131, run.err
    assert run.seconds < 5
    user.assert_nothing_left()


def test_the_timeout_is_124_and_clean(user: User) -> None:
    process = training(user, "--timeout", "4")
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
    assert run.code in (130, -signal.SIGINT), run.err  # before Python has started: the signal's own
    user.assert_nothing_left()
