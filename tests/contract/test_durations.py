"""Durations: what is clear is read, what is not is refused with a suggestion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.contract.durations import format_duration, parse_duration, parse_every


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15s", 15.0),
        ("10m", 600.0),
        ("1h", 3600.0),
        ("1.5h", 5400.0),
        ("1h30m", 5400.0),
        ("2 d", 172_800.0),
        ("250ms", 0.25),
        ("90", 90.0),
        ("0.5", 0.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("22:30", "write 22m30s, or 22h30m for hours"),
        ("1:02:03", "write 1h2m3s"),
        ("", "write a number with a unit"),
        ("s", "write a number with a unit"),
        ("5x", "write a number with a unit"),
        ("-5s", "write a number with a unit"),
        ("1e3s", "write a number with a unit"),
        ("1s" * 1_000_000, "write a number with a unit"),
    ],
)
def test_what_is_not_a_duration(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        parse_duration(text)
    assert hint in str(caught.value)


@given(st.integers(0, 10**9))
def test_formatting_is_the_inverse(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("1 epoch", (1, "epoch")),
        ("2 epochs", (2, "epoch")),
        ("500steps", (500, "step")),
        ("30s", (30, "s")),
        ("10", (10, "s")),
    ],
)
def test_intervals(text: str, every: tuple[float, str]) -> None:
    assert parse_every(text) == every


@pytest.mark.parametrize("text", ["epoch", "one epoch", "1.5 epochs", "5 batches", ""])
def test_what_is_not_an_interval(text: str) -> None:
    with pytest.raises(ValueError, match="write 1 epoch, 500 steps or 30s"):
        parse_every(text)
