"""When a waiting end polls before it sleeps, and when it does not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dsgd_cli.wire.channels.spin import (
    LEAST_S,
    LOOK_S,
    MAX_REST_S,
    MOST_S,
    REST_S,
    Spin,
    runnable_threads,
)


class Scene:
    """A clock that each poll moves by 10 µs, and an answer that comes at a certain time."""

    def __init__(self, cores: int = 2, runnable: int = 1) -> None:
        self.now = 100.0
        self.runnable = runnable
        self.looks = 0
        self.polls = 0
        self.sleeps = 0
        self.spin = Spin(cores=cores, runnable=self._look, clock=lambda: self.now)

    def wait(self, answer_after_s: float, waking_s: float = 30e-6) -> str:
        due = self.now + answer_after_s
        self.polls = self.sleeps = 0

        def poll() -> str:
            self.polls += 1
            self.now += 10e-6
            return "answer" if self.now >= due else ""

        def sleep() -> str:
            self.sleeps += 1
            self.now = max(self.now, due) + waking_s
            return "answer"

        return self.spin.wait(poll, sleep)

    def _look(self) -> int:
        self.looks += 1
        return self.runnable


def test_an_answer_that_comes_soon_is_met_without_sleeping() -> None:
    scene = Scene()
    assert scene.wait(40e-6) == "answer"
    assert (scene.polls, scene.sleeps) == (4, 0)


def test_it_sleeps_after_its_limit_which_follows_the_waits() -> None:
    scene = Scene()
    assert scene.wait(0.01) == "answer"
    assert scene.sleeps == 1
    assert MOST_S <= scene.polls * 10e-6 <= MOST_S + 20e-6  # nothing is known yet
    for _ in range(60):
        scene.wait(40e-6)
    scene.wait(0.01)
    assert LEAST_S <= scene.polls * 10e-6 <= LEAST_S + 20e-6
    for _ in range(60):
        scene.wait(90e-6)
    scene.wait(0.01)
    assert 160e-6 <= scene.polls * 10e-6 <= 200e-6


@pytest.mark.parametrize(("processes", "polls"), [(1, True), (2, True), (3, False)])
def test_it_is_off_when_the_processes_outnumber_the_cores(processes: int, polls: bool) -> None:
    scene = Scene(cores=2)
    scene.spin.processes = processes
    scene.wait(40e-6)
    assert (scene.polls > 0) is polls


def test_it_is_off_while_the_machine_is_crowded_and_looks_again_later() -> None:
    scene = Scene(cores=2, runnable=3)
    for _ in range(10):
        scene.wait(40e-6)
        assert scene.polls == 0
    assert scene.looks == 1  # a look costs as much as a poll, so it is rare
    scene.runnable = 2
    scene.now += LOOK_S
    scene.wait(40e-6)
    assert scene.polls > 0


def test_it_stops_when_polling_is_never_worth_it_and_tries_again_later_and_later() -> None:
    scene = Scene()
    trials = []
    ends_at = scene.now + 10.0
    polled_s = 0.0
    while scene.now < ends_at:
        scene.wait(0.005)
        polled_s += scene.polls * 10e-6
        if scene.polls:
            trials.append(scene.now)
    rests = [after - before for before, after in pairwise(trials) if after - before > REST_S]
    assert rests == sorted(rests)
    assert max(rests) < MAX_REST_S + 0.01
    assert polled_s < 0.01 * 10.0
    scene.now += MAX_REST_S
    for _ in range(3):
        scene.wait(0.0005)  # longer than what it polls for in the long run
        assert scene.polls > 0
    scene.wait(40e-6)
    assert (scene.polls, scene.sleeps) == (4, 0)


def test_two_ends_that_sleep_find_out_of_it() -> None:
    """Each waits for the other one to wake up, which is longer than what both would poll for."""
    scene = Scene()
    waking_s, work_s = 250e-6, 30e-6
    other = Scene()
    for each in (scene, other):  # both have given up just now
        each.spin._short = 0.0
        each.spin._missed(each.now)
    sleeps = [0, 0]
    for _ in range(4000):
        for index, (end, peer) in enumerate(((scene, other), (other, scene))):
            end.wait(work_s + (waking_s if peer.sleeps else 0.0))
            sleeps[index] = end.sleeps
    assert sleeps == [0, 0]


def test_a_limit_of_zero_is_off() -> None:
    spin = Spin(0)
    assert spin.wait(lambda: pytest.fail("polled"), lambda: "slept") == "slept"


def test_this_thread_is_runnable() -> None:
    assert runnable_threads() >= 1
