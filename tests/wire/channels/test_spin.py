"""When a waiting end polls before it sleeps, and when it does not."""

from __future__ import annotations

import pytest

from dsgd_cli.wire.channels.spin import LIMIT_S, LOOK_S, Spin, runnable_threads


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


def test_it_sleeps_after_its_limit() -> None:
    scene = Scene()
    began = scene.now
    assert scene.wait(0.01) == "answer"
    assert scene.sleeps == 1
    assert 0 < scene.polls * 10e-6 <= LIMIT_S + 10e-6
    assert scene.now - began < 0.011


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


def test_it_stops_when_polling_is_never_worth_it_and_starts_again_when_it_would_be() -> None:
    scene = Scene()
    for _ in range(30):
        scene.wait(0.005)
    scene.wait(0.005)
    assert scene.polls == 0
    for _ in range(30):
        scene.wait(40e-6)  # sleeps, and learns from being woken so soon
    scene.wait(40e-6)
    assert scene.polls > 0


def test_a_sleep_in_vain_is_no_success() -> None:
    spin = Spin(cores=2, runnable=lambda: 1, clock=lambda: 1.0, limit_s=0)
    for _ in range(50):
        assert spin.wait(lambda: 0, lambda: 0) == 0
    assert spin._short < 0.1


def test_a_limit_of_zero_is_off() -> None:
    spin = Spin(0)
    assert spin.wait(lambda: pytest.fail("polled"), lambda: "slept") == "slept"


def test_this_thread_is_runnable() -> None:
    assert runnable_threads() >= 1
