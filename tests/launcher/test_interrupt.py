"""The first signal asks, the second kills."""

from __future__ import annotations

import os
import signal

import pytest

from dsgd_cli.contract.errors import Interrupted
from dsgd_cli.launcher.interrupt import Forced, Interrupts


def send(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_signal_raises_where_the_program_is(number: signal.Signals, code: int) -> None:
    with Interrupts(print) as interrupts, pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.exit_code == interrupts.code == code


def test_the_first_is_delivered_while_somebody_takes_it_and_the_second_forces() -> None:
    got: list[str] = []
    with Interrupts(print) as interrupts:
        interrupts.deliver = got.append
        send()
        assert got == ["Ctrl-C"]
        with pytest.raises(Forced):
            send()
        send()  # the third changes nothing
    assert interrupts.code == 130


def test_a_held_signal_comes_when_the_block_ends() -> None:
    steps: list[str] = []
    with Interrupts(print) as interrupts, pytest.raises(Interrupted):
        with interrupts.held():
            send()
            steps.append("the block goes on")
        steps.append("never")
    assert steps == ["the block goes on"]


def test_a_noted_signal_only_says_so() -> None:
    notes: list[str] = []
    with Interrupts(notes.append) as interrupts:
        with interrupts.noted("finishing"):
            send()
        assert notes == ["Ctrl-C: finishing (again = kill now)"]
        assert interrupts.error().exit_code == 130


def test_signals_while_events_are_read_never_block() -> None:
    """A handler that puts into the queue that its own thread is reading from."""
    import queue

    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    with Interrupts(print) as interrupts:
        for _ in range(500):
            interrupts.deliver = events.put
            interrupts.code = None
            send()
            assert events.get(timeout=1) == "Ctrl-C"


def test_a_timeout_is_the_first_signal_with_its_own_code() -> None:
    with Interrupts(print, timeout_s=0.01) as interrupts, pytest.raises(Interrupted) as caught:
        signal.pause()
    assert caught.value.exit_code == interrupts.code == 124


def test_a_stop_from_the_terminal_is_refused() -> None:
    notes: list[str] = []
    with Interrupts(notes.append):
        send(signal.SIGTSTP)
    assert "refused" in notes[0]


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(print):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
