"""What is shown, and how hostile output is tamed."""

from __future__ import annotations

import io
import json

import pytest

from dsgd_cli.console import Console, printable, summary_line
from dsgd_cli.contract.errors import HostError, SpecError
from dsgd_cli.view import progress_line


def consoles(as_json: bool = False) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(as_json, out, err), out, err


@pytest.mark.parametrize(
    "evil",
    ["\x1b]52;c;ZXZpbA==\x07", "\x1b[2J\x1b[1;1H", "a\rb", "\x9b31m", "\x08\x08", "\u202e\u2028"],
)
def test_no_control_character_of_a_log_line_reaches_the_terminal(evil: str) -> None:
    console, _, err = consoles()
    console.log_line("worker/3", "gpu2", f"before{evil}after")
    shown = err.getvalue().removesuffix("\n")
    assert shown.isprintable()
    assert shown.startswith("    worker/3@gpu2 | before")
    assert shown.endswith("after")


def test_tabs_and_letters_pass() -> None:
    assert printable("a\tb ü 漢") == "a\tb ü 漢"


def test_an_error_gives_evidence_and_remedy_last() -> None:
    console, out, err = consoles()
    console.error(HostError("gpu1", "no answer", details=["tried twice"], remedy="switch it on"))
    assert err.getvalue() == "error: gpu1: no answer\ntried twice\nfix: switch it on\n"
    assert out.getvalue() == ""


def test_mistakes_come_first_and_their_count_last() -> None:
    console, _, err = consoles()
    console.error(SpecError("1 error in c.yaml", details=["c.yaml:1:1  what", "    1 | x"]))
    assert err.getvalue() == "c.yaml:1:1  what\n    1 | x\n1 error in c.yaml\n"


def test_json_lines_begin_with_the_version_and_carry_errors() -> None:
    console, out, _ = consoles(as_json=True)
    console.log_line("worker/0", "local", "hello")
    console.error(HostError("gpu1", "no answer"))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[0] == {"type": "version", "schema": "dsgd/1"}
    log = {"type": "log", "process": "worker/0", "host": "local", "stream": "stdout"}
    assert lines[1] == {**log, "line": "hello"}
    assert (lines[2]["type"], lines[2]["exit_code"]) == ("error", 4)


def test_without_a_terminal_progress_is_a_plain_line_now_and_then() -> None:
    console, _, err = consoles()
    for step in range(100):
        console.progress({"step": step, "epoch": 1})
    assert err.getvalue().count("\n") == 1
    assert "\x1b" not in err.getvalue()


def test_a_progress_line_says_what_users_ask() -> None:
    message = {
        "step": 1240,
        "epoch": 12,
        "examples_per_s": 41234.0,
        "loss": 0.11345,
        "metric": "accuracy",
        "value": 0.958,
        "elapsed_s": 1.83,
        "limits": {"accuracy": 0.97, "max_epochs": 50, "max_time_s": 600.0},
    }
    assert progress_line(message) == (
        "step 1240  loss 0.1134  accuracy 0.9580  41.2k examples/s  epoch 12  1.8s"
        "  until accuracy 0.97, epoch 50, 10m"
    )


def test_a_terminal_that_went_away_is_not_an_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    Console(False, Gone(), Gone()).note("nobody reads this")


SUMMARY = {
    "outcome": "converged",
    "reason": "accuracy 0.97 >= 0.97",
    "metric": "accuracy",
    "value": 0.97,
    "loss": 0.1,
    "steps": 900,
    "seconds": 1.5,
    "algorithm": "downpour",
    "workers": 2,
    "servers": 1,
    "batches_per_second": 600.0,
}


@pytest.mark.parametrize(
    ("outcome", "reason", "begins"),
    [
        ("converged", "loss 0.1 <= 0.1", "converged  accuracy 0.9700  loss 0.1000  at step 900"),
        ("finished", "max_epochs 5 reached", "finished (max_epochs 5 reached)  accuracy"),
        ("finished", "no gradient is larger", "finished (no gradient is larger)  accuracy"),
        ("stopped", "max_epochs 5 reached: loss 1 > 0.1", "stopped  accuracy"),
    ],
)
def test_a_summary_says_how_a_run_ended(outcome: str, reason: str, begins: str) -> None:
    line = summary_line({**SUMMARY, "outcome": outcome, "reason": reason})
    assert line.startswith(begins)
    assert "2 workers, 1 server  600 batches/s" in line


def test_what_never_began_has_no_figures() -> None:
    failed = {**SUMMARY, "outcome": "failed", "reason": "no", "steps": 0, "value": None}
    assert summary_line(failed) == "failed before the first step"
