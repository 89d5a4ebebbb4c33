"""`dsgd bench`: sizes as people write them, and what its sentences say."""

from __future__ import annotations

import pytest

from dsgd_cli.launcher.bench import (
    Gradient,
    Limits,
    Measured,
    Report,
    duration,
    parse_size,
    short,
    size,
)

LIMITS = Limits(socket_s=0.010, memcpy_s=0.004)


def report(step_s: float, compute_s: float, servers: int = 1) -> Report:
    row = Measured("tcp", 44_800_000, 1 << 20, 1, LIMITS, seconds=step_s, per_s=1 / step_s)
    return Report((row,), Gradient(11_200_000, 44_800_000, compute_s), servers, "0 left")


@pytest.mark.parametrize(
    ("text", "number"),
    [("32KB", 32_000), ("1MiB", 1 << 20), ("100 MB", 100_000_000), ("4096", 4096), ("1.5kb", 1500)],
)
def test_sizes_as_people_write_them(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1KB", "1TB", "12 parsecs", "0", "8", "9999GB"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_a_sentence_says_what_the_figures_mean() -> None:
    assert report(0.019, 0.120).meaning() == [
        "with 11.2 M parameters a step costs 19 ms on tcp; computing takes 120 ms: "
        "1 server serves 6 workers"
    ]
    assert report(0.1, 0.120, servers=2).meaning()[0].endswith("2 servers serve 1 worker")
    assert "a larger batch, or push_every, helps" in report(0.2, 0.120).meaning()[0]


def test_figures_are_of_both_directions() -> None:
    said = report(0.040, 0.120).rows[0].as_json()
    assert said["gb_per_s"] == pytest.approx(2 * 44.8e6 / 0.040 / 1e9)
    assert said["of_socket"] == pytest.approx(0.25)
    assert said["of_memcpy"] == pytest.approx(0.1)


def test_a_channel_that_does_not_work_is_a_line_with_a_reason() -> None:
    row = Measured("tcp", 1000, 1 << 20, 1, LIMITS, error="the port is filtered")
    failed = Report((row, row), Gradient(250, 1000, 1.0), 1, "0 left")
    assert failed.failures() == ["tcp: the port is filtered"]
    assert failed.meaning() == []
    assert row.as_json()["error"] == "the port is filtered"
    assert len(row.row()) == len(report(1, 1).rows[0].row())


def test_numbers_are_written_for_people() -> None:
    assert [duration(s) for s in (83e-6, 0.019, 1.4)] == ["83 us", "19 ms", "1.4 s"]
    assert [size(n) for n in (64, 38_440, 100e6)] == ["64 B", "38.4 KB", "100 MB"]
    assert [short(n) for n in (9610, 11.2e6)] == ["9610", "11.2 M"]
