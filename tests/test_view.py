"""What a run looks like while it goes on."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from dsgd_cli import console as console_module
from dsgd_cli.console import Console
from dsgd_cli.view import View, aligned, sparkline


def report(worker: int, time_s: float, **more: Any) -> dict[str, Any]:
    spent = {"pull_s": 0.1, "compute_s": 0.3, "push_s": 0.1}
    counts = {"steps": 10, "examples": 320, "staleness": 1.25}
    return {"kind": "report", "worker": worker, "time": time_s, **counts, **spent, **more}


def event(what: str, process: str) -> dict[str, Any]:
    return {"kind": "event", "time": 0.0, "event": what, "process": process, "incarnation": 1}


def view_of(*records: dict[str, Any]) -> View:
    view = View()
    view.progress({"step": 20, "loss": 0.5, "examples_per_s": 640.0, "epoch": 1, "elapsed_s": 1.0})
    for record in records:
        view.record(record)
    return view


def test_nothing_is_shown_before_the_first_progress() -> None:
    assert View().lines(20) == []


def test_a_worker_is_loading_then_training_then_lost_then_back() -> None:
    view = view_of(event("joined", "worker/0"))
    assert view.lines(20)[1:] == ["worker/0  0 steps  loading"]
    view.record(report(0, 1.0))
    view.record(report(0, 2.0))
    [line] = view.lines(20)[1:]
    assert line == "worker/0  20 steps  320 examples/s  staleness 1.2  computes 60%  training"
    view.record(event("lost", "worker/0"))
    assert view.lines(20)[1:] == ["worker/0  20 steps  lost"]
    view.record(event("joined", "worker/0"))
    view.record(report(0, 9.0))
    assert view.lines(20)[1:] == [
        "worker/0  30 steps  0 examples/s  staleness 1.2  computes 60%  training"
    ]


def test_the_speed_is_that_of_the_last_seconds() -> None:
    view = view_of(*[report(0, float(t), examples=1000) for t in range(10)])
    for time_s in (11.0, 12.0, 13.0, 14.0):
        view.record(report(0, time_s, examples=100))
    assert "100 examples/s" in view.lines(20)[1]


def test_what_a_worker_does_not_know_is_left_out() -> None:
    view = view_of(report(0, 1.0, staleness=None, pull_s=0.0, compute_s=0.0, push_s=0.0))
    assert view.lines(20)[1] == "worker/0  10 steps  0 examples/s  computes 0%  training"


def test_where_there_is_no_room_those_in_trouble_are_shown() -> None:
    view = view_of(*[report(worker, 1.0) for worker in range(12)], event("lost", "worker/11"))
    lines = view.lines(5)
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[1:4]] == ["worker/0", "worker/1", "worker/11"]
    assert lines[4] == "… and 9 more workers"
    assert len(view.lines(13)) == 13
    assert len(view.lines(1)) == 1


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0, 7.0], "▁▂█"),
        ([1.0, 10.0, 100.0], "▁▅█"),
        ([5.0] * 32 + [1.0] * 32, "████████▁▁▁▁▁▁▁▁"),
    ],
)
def test_sparklines(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_columns_that_are_empty_are_left_out() -> None:
    assert aligned([("a", "", "c"), ("aaa", "", "")]) == ["a    c", "aaa"]


class Terminal(io.StringIO):
    """A terminal that only knows what the console sends it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as they would be seen; `\\x1b[NA` goes up, `\\x1b[J` wipes what is below."""
        lines, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[\d*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if piece == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif piece == "\r":
                column = 0
            elif piece.endswith("A"):
                row -= int(piece[2:-1])
            elif piece == "\x1b[J":
                lines = [*lines[:row], lines[row][:column]]
            elif not piece.startswith("\x1b"):
                lines[row] = lines[row][:column] + piece + lines[row][column + len(piece) :]
                column += len(piece)
        return lines


def test_log_lines_stay_above_the_live_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "REDRAW_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    console = Console(False, io.StringIO(), terminal)
    console.waiting("starting 2 workers")
    assert terminal.screen() == ["starting 2 workers"]
    console.waiting("")
    for step in (1, 2):
        console.progress({"step": step, "loss": 1.0 / step})
        console.record(report(0, float(step)))
        console.log_line("worker/0", "local", f"line {step}")
    assert terminal.screen() == [
        "   worker/0@local | line 1",
        "   worker/0@local | line 2",
        "step 2  loss 0.5000 █▁  0 examples/s  epoch 0  0.0s",
        "worker/0  20 steps  320 examples/s  staleness 1.2  computes 60%  training",
    ]
    console.progress_ends()
    console.note("the end")
    assert terminal.screen()[2:] == [
        "step 2  loss 0.5000 █▁  0 examples/s  epoch 0  0.0s",
        "the end",
        "",
    ]
