"""Axes: round ticks, all values within."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.reporting.scale import scale, short, spans_decades, tight

FLOATS = st.floats(-1e12, 1e12, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0.0, 4500.0], [0, 1000, 2000, 3000, 4000, 5000]),
        ([0.867, 0.9917], [0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1]),
        ([7.0], [6, 6.5, 7, 7.5, 8]),
        ([0.0], [-1, -0.5, 0, 0.5, 1]),
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round(values: list[float], ticks: list[float]) -> None:
    assert scale(values).ticks == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.012, 0.6], [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        ([1e-5, 3.0], [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10]),
        ([1e-30, 1.0], [1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e-5, 1]),
        ([1.0, 1.0], [1, 2]),
    ],
)
def test_logarithmic_ticks_are_decades_and_few(values: list[float], ticks: list[float]) -> None:
    found = scale(values, log=True)
    assert found.ticks == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        *[(1, [0, 1]), (2, [0, 1, 2]), (4, [0, 1, 2, 3, 4]), (8, [0, 2, 4, 6, 8])],
        *[(15, [0, 5, 10, 15]), (90, [0, 20, 40, 60, 80]), (130, [0, 25, 50, 75, 100, 125])],
    ],
)
def test_what_is_counted_has_whole_ticks(most: int, ticks: list[float]) -> None:
    assert tight([1.0, float(most)], whole=True).ticks == tuple(ticks)


@given(st.lists(FLOATS, min_size=1), st.booleans(), st.booleans())
def test_all_values_are_on_the_axis(values: list[float], zero: bool, log: bool) -> None:
    log = log and min(values) > 0
    for axis in (scale(values, zero=zero, log=log), tight(values)):
        assert axis.low < axis.high
        assert 1 <= len(axis.ticks) <= 12
        for value in values:
            assert -1e-6 <= axis.at(value) <= 1 + 1e-6


def test_a_time_axis_ends_where_the_run_ended() -> None:
    axis = tight([0.1, 1.25])
    assert (axis.low, axis.high) == (0, 1.25)


def test_what_spans_decades() -> None:
    assert spans_decades([0.01, 2.0])
    assert not spans_decades([0.5, 2.0])
    assert not spans_decades([0.0, 2.0])
    assert not spans_decades([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (0.0907, "0.0907"), (4500, "4500"), (41_234, "41.23k"), (2.5e6, "2.5M")],
        *[(1e-5, "1e-5"), (1.5e13, "15T"), (-20_000, "-20k"), (0.30000000000000004, "0.3")],
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
