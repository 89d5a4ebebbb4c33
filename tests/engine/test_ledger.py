"""Histograms of staleness, and what was dropped. `test_training` has the records."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.engine import events as e
from dsgd_cli.engine.ledger import WINDOW_S, Ledger, mean, quantile

values = st.lists(st.integers(0, 50), min_size=1, max_size=60)


def test_of_nothing_there_is_neither_mean_nor_quantile() -> None:
    assert mean({}) is None
    assert quantile({}, 0.5) is None


def test_mean_and_quantiles_of_a_histogram() -> None:
    histogram = {7: 1, 0: 5, 2: 4}
    assert mean(histogram) == 1.5
    found = [quantile(histogram, part) for part in (0.0, 0.1, 0.5, 0.51, 0.9, 0.91, 1.0)]
    assert found == [0, 0, 0, 2, 2, 7, 7]


@given(values)
def test_the_mean_is_that_of_the_values(them: list[int]) -> None:
    assert mean(Counter(them)) == pytest.approx(statistics.fmean(them))


@given(values, st.floats(0, 1))
def test_a_quantile_is_the_least_value_with_so_many_up_to_it(them: list[int], part: float) -> None:
    found = quantile(Counter(them), part)
    assert found in them
    assert sum(value <= found for value in them) >= part * len(them)
    assert sum(value < found for value in them) < part * len(them) or found == min(them)


def report(worker: int, dropped: int, staleness: dict[int, int]) -> e.Report:
    return e.Report(worker, 1, 1, 10, steps=1, examples=10, staleness=staleness, dropped=dropped)


def test_what_is_dropped_is_counted_in_all_and_in_each_record() -> None:
    ledger = Ledger()
    ledger.start(0.0)
    assert ledger.add(report(0, 2, {3: 1, 9: 2}), 1, 0.0) == []
    assert ledger.add(report(1, 1, {0: 1}), 1, 0.0) == []
    (line,) = ledger.add(report(0, 4, {3: 1}), 1, WINDOW_S)
    assert (line["dropped"], line["staleness"], line["staleness_max"]) == (6, 6.0, 9)
    (other,) = ledger.flush(WINDOW_S)
    assert (other["worker"], other["dropped"], other["staleness"]) == (1, 1, 0.0)
    assert ledger.dropped == 7
    assert ledger.staleness == {0: 1, 3: 2, 9: 2}


def test_bytes_are_summed_shard_by_shard_in_each_record_and_in_all() -> None:
    ledger = Ledger()
    ledger.start(0.0)
    for worker, moved in ((0, (5, 3)), (1, (50, 30)), (0, ()), (0, (10, 6))):
        told = e.Report(worker, 1, 1, 10, steps=1, examples=10, shard_bytes=moved)
        assert ledger.add(told, 1, 0.0) == []
    assert ledger.progress(0.1)["shard_bytes"] == [65, 39]
    records = ledger.flush(0.1)
    assert [line["shard_bytes"] for line in records] == [[15, 9], [50, 30]]
    assert [line["bytes"] for line in records] == [24, 80]
