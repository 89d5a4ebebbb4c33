"""Records to numbers: nothing is lost, nothing is invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgd_cli.reporting import series
from dsgd_cli.reporting.series import Epochs, Sample, number, thin
from tests.reporting.runs import epoch, evaluate, event, report, run, usual


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), (None, None), ("1", None), (True, None), (float("nan"), None)],
)
def test_only_finite_numbers_are_numbers(value: object, expected: float | None) -> None:
    assert number(value) == expected
    assert number(10**400) is None


def test_epochs_are_fractions_between_complete_ones(tmp_path: Path) -> None:
    epochs = Epochs(run(tmp_path, [epoch(2.0, 1), epoch(3.0, 2), epoch(3.0, 3)]))
    assert [epochs.at(s) for s in (0, 1, 2, 2.5, 3)] == [0, 0.5, 1, 1.5, 3]
    assert epochs.at(3.5) == 3.5  # at the pace so far
    assert epochs.at(100.0) == 4.0  # the next one was not complete


def test_without_a_complete_epoch_there_are_none(tmp_path: Path) -> None:
    assert Epochs(run(tmp_path, [report(0, 0.5, 10)])).at(0.5) is None


def test_a_loss_is_in_the_middle_of_what_it_is_the_mean_of(tmp_path: Path) -> None:
    records = [report(0, 1.0, 10, loss=3.0), report(1, 1.5, 14), report(0, 2.0, 20, loss=None)]
    found = series.training_loss(run(tmp_path, [*records, report(0, 3.0, 40, loss=1.0)]))
    assert [(s.seconds, s.step, s.value) for s in found if s.value != 1 / 14] == [
        (0.5, 5.0, 3.0),
        (2.5, 30.0, 1.0),
    ]


def test_metrics_are_whatever_the_model_calls_them_the_loss_first(tmp_path: Path) -> None:
    records = [evaluate(1, 1, auc=0.5, loss=1.0), evaluate(2, 2, auc=None, loss=0.5, f1=0.1)]
    found = series.metrics(run(tmp_path, records))
    assert list(found) == ["loss", "auc", "f1"]
    assert [sample.value for sample in found["auc"]] == [0.5]


def test_the_area_below_a_rate_is_what_was_recorded(tmp_path: Path) -> None:
    records = [report(0, 0.3, 10), report(1, 0.5, 20), report(0, 1.7, 30), report(1, 2.0, 40)]
    found = run(tmp_path, [*records, report(0, 2.1, 50, examples=None)])
    everyone = series.rate(found, "examples")
    width = everyone[1][0] - everyone[0][0]
    assert sum(amount for _, amount in everyone) * width == pytest.approx(4 * 320)
    each = [series.rate(found, "examples", rank) for rank in series.workers(found)]
    assert sum(amount * 2 * one[0][0] for one in each for _, amount in one) == pytest.approx(1280)


def test_the_bytes_of_a_shard_are_those_of_all_workers(tmp_path: Path) -> None:
    found = run(tmp_path, [report(0, 1.0, 10), report(1, 1.0, 20)])
    assert series.shard_bytes(found) == [1_500_000, 500_000]
    rates = [series.rate(found, "shard_bytes", place=place) for place in (0, 1)]
    assert [amount for _, amount in rates[0]] == pytest.approx([1_500_000] * 4)
    assert [amount for _, amount in rates[1]] == pytest.approx([500_000] * 4)


@pytest.mark.parametrize("bad", [None, 7, "ab", {}, [], [None, "x"], [float("nan"), True]])
def test_shards_that_are_none(tmp_path: Path, bad: object) -> None:
    found = run(tmp_path, [report(0, 1.0, 10, shard_bytes=bad)])
    assert not any(series.shard_bytes(found))
    assert series.rate(found, "shard_bytes", place=0) == []


def test_a_rate_of_reports_at_time_0_is_none(tmp_path: Path) -> None:
    assert series.rate(run(tmp_path, [report(0, 0.0, 10)]), "examples") == []


def test_seconds_are_summed_per_worker(tmp_path: Path) -> None:
    found = series.spent(run(tmp_path, [report(1, 1, 1), report(0, 1, 2), report(1, 2, 3)]))
    assert found == {
        0: pytest.approx((0.05, 0.1, 0.1)),
        1: pytest.approx((0.1, 0.2, 0.2)),
    }


@pytest.mark.parametrize("bad", [None, {}, {"histogram": None}, {"histogram": {"x": 1, "1": "y"}}])
def test_a_staleness_that_is_none(tmp_path: Path, bad: object) -> None:
    assert series.staleness(run(tmp_path, [], summary={"outcome": "x", "staleness": bad})) == {}


def test_happenings_say_what_and_when(tmp_path: Path) -> None:
    records = [event(2.0, "lost"), evaluate(1.0, 5, accuracy=0.9), {"kind": "event", "time": None}]
    found = series.happenings(
        run(tmp_path, [*records, {"kind": "event", "time": 3, "factor": 0.1}])
    )
    assert [(each.what, each.said) for each in found] == [
        ("evaluation", "evaluated: accuracy 0.9"),
        ("lost", "worker/0 lost"),
        ("event", "event (factor 0.1)"),
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 99, 1000])
def test_thinned_samples_are_few_in_order_and_end_with_the_last(count: int) -> None:
    samples = [Sample(i, None, i, 2.0 * i) for i in range(count)]
    found = thin(samples, 10)
    assert len(found) <= 10
    assert found == sorted(found, key=lambda sample: sample.seconds)
    assert found[-1:] == samples[-1:]
    if count:
        assert found[0].value == pytest.approx(2.0 * found[0].step)


def test_the_last_step_and_second_of_a_run_that_died(tmp_path: Path) -> None:
    found = run(tmp_path, usual(), summary=None)
    assert (series.last_step(found), series.duration_s(found)) == (320, 4.01)
