"""Which charts there are, and what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgd_cli.reporting.charts import (
    BarChart,
    Chart,
    Figure,
    LineChart,
    StackedChart,
    Timeline,
    is_empty,
)
from dsgd_cli.reporting.figures import MAX_BARS, drawn, figures
from dsgd_cli.reporting.runs import Run, read_run, read_runs
from tests.reporting.runs import SUMMARY, evaluate, event, folder, report, run, usual


def named(runs: list[Run], name: str) -> Figure:
    return next(figure for figure in figures(runs) if figure.name == name)


def only(figure: Figure) -> Chart:
    ((_, chart),) = figure.views
    return chart


def test_a_run_has_all_charts(tmp_path: Path) -> None:
    found = figures([run(tmp_path, usual())])
    assert [figure.name for figure in found] == [
        *("loss", "metric-accuracy", "examples", "bytes", "shards"),
        *("time", "staleness", "events"),
    ]
    assert drawn(found) == found
    assert all(figure.rows for figure in found)


def test_losses_are_over_steps_epochs_and_seconds_and_logarithmic(tmp_path: Path) -> None:
    figure = named([run(tmp_path, usual())], "loss")
    assert [view for view, _ in figure.views] == ["step", "epoch", "second"]
    for _, chart in figure.views:
        assert isinstance(chart, LineChart)
        assert chart.y.log
        training, held_out = chart.lines
        assert (training.dashed, held_out.dashed) == (False, True)
        assert len(training.points) == 32 and len(held_out.points) == 16
        assert "loss" in training.points[0].said and "epoch" in training.points[0].said
    by_epoch = figure.views[1][1]
    assert isinstance(by_epoch, LineChart)
    assert by_epoch.lines[1].points[-1].x == pytest.approx(16, abs=0.1)


def test_runs_are_laid_over_each_other_each_in_its_colour(tmp_path: Path) -> None:
    homes = [folder(tmp_path / name, usual(slower=slower)) for name, slower in (("a", 1), ("b", 2))]
    runs = read_runs(homes)
    for figure in figures(runs):
        if figure.name != "time":
            assert [(key.label, key.colour) for key in figure.legend] == [("a", 0), ("b", 1)]
    examples = only(named(runs, "examples"))
    assert isinstance(examples, LineChart)
    assert [line.points[-1].x for line in examples.lines] == pytest.approx([4, 8], abs=0.3)
    time = only(named(runs, "time"))
    assert isinstance(time, StackedChart)
    assert time.categories == ("a", "b")


def test_one_run_shows_its_workers_and_who_was_lost(tmp_path: Path) -> None:
    runs = [run(tmp_path, [*usual(), event(1.0, "lost", "worker/1")])]
    chart = only(named(runs, "bytes"))
    assert isinstance(chart, LineChart)
    assert [line.label for line in chart.lines] == ["worker/0", "worker/1"]
    assert chart.y.title == "MB/s"
    assert chart.lines[0].points[3].y == pytest.approx(4.0)
    assert [mark.x for mark in chart.marks] == [1.0]
    events = only(named(runs, "events"))
    assert isinstance(events, Timeline)
    assert events.rows == ("joined", "lost", "epoch", "evaluation")
    assert len(events.marks) == 2 + 1 + 16 + 16


def test_many_workers_are_summed(tmp_path: Path) -> None:
    runs = [run(tmp_path, [report(rank, 1.0, 10) for rank in range(30)])]
    examples, time = only(named(runs, "examples")), only(named(runs, "time"))
    assert isinstance(examples, LineChart) and isinstance(time, StackedChart)
    assert [line.label for line in examples.lines] == ["all 30 workers"]
    assert time.categories == ("all 30 workers",)
    assert time.groups[0].values == pytest.approx((30 * 0.05,))


def test_one_run_shows_what_each_shard_moved(tmp_path: Path) -> None:
    figure = named([run(tmp_path, usual())], "shards")
    chart = only(figure)
    assert isinstance(chart, LineChart)
    assert [line.label for line in chart.lines] == ["server/0", "server/1"]
    assert chart.y.title == "MB/s"
    assert [line.points[3].y for line in chart.lines] == pytest.approx([6.0, 2.0])  # two workers
    assert figure.head == ("server", "seconds", "MB/s")


def test_of_many_shards_the_extremes_and_the_mean_are_shown(tmp_path: Path) -> None:
    shares = [10_000] * 20
    shares[3], shares[7] = 90_000, 5_000
    moved = {"bytes": sum(shares), "shard_bytes": shares}
    chart = only(named([run(tmp_path, [report(0, 1.0, 10, **moved)])], "shards"))
    assert isinstance(chart, LineChart)
    assert {line.label: line.points[0].y for line in chart.lines} == pytest.approx(
        {"busiest: server/3": 90.0, "mean of 20 servers": 13.75, "least busy: server/7": 5.0}
    )


def test_without_shares_of_shards_and_for_several_runs_there_is_the_total(tmp_path: Path) -> None:
    old = [{k: v for k, v in each.items() if k != "shard_bytes"} for each in usual()]
    runs = read_runs([folder(tmp_path / "old", old), folder(tmp_path / "new", usual())])
    for some in (runs[:1], runs):
        names = [figure.name for figure in figures(some)]
        assert "bytes" in names and "shards" not in names
        assert not is_empty(only(named(some, "bytes")))


@pytest.mark.parametrize(
    ("histogram", "labels"),
    [
        ({"0": 990, "1": 8, "70": 2}, ("0", "1", "≥2")),
        ({"0": 1}, ("0",)),
        ({"2": 5}, ("0", "1", "2")),
        ({str(value): 1 for value in range(100)}, ("0–4", "5–9")),
    ],
)
def test_the_staleness_is_in_bars_with_the_rare_in_the_last(
    tmp_path: Path, histogram: dict[str, int], labels: tuple[str, ...]
) -> None:
    summary = {**SUMMARY, "staleness": {"histogram": histogram}}
    chart = only(named([run(tmp_path, [], summary=summary)], "staleness"))
    assert isinstance(chart, BarChart)
    assert chart.categories[: len(labels)] == labels
    assert len(chart.categories) <= MAX_BARS + 1
    assert sum(chart.groups[0].values) == pytest.approx(100)


def test_metrics_of_training_examples_are_in_the_figures_of_the_held_out_ones(
    tmp_path: Path,
) -> None:
    metrics = {"loss": 1.0, "accuracy": 0.5, "training_loss": 0.5, "training_accuracy": 0.75}
    records = [evaluate(float(time), time, **metrics) for time in range(1, 4)]
    other = [evaluate(1.0, 5, accuracy=0.25, training_day=3.0)]  # somebody's own: of nothing else
    homes = [folder(tmp_path / "a", records), folder(tmp_path / "b", other)]
    one, both = figures([read_run(homes[0])]), figures(read_runs(homes))
    assert [f.name for f in one if f.name.startswith("metric-")] == ["metric-accuracy"]
    figure = next(figure for figure in one if figure.name == "metric-accuracy")
    assert figure.title == "Accuracy"
    assert [(key.label, key.dashed) for key in figure.legend] == [
        ("training", False),
        ("held out", True),
    ]
    names = [figure.name for figure in both if figure.name.startswith("metric-")]
    assert names == ["metric-accuracy", "metric-training_day"]
    figure = next(figure for figure in both if figure.name == "metric-accuracy")
    assert figure.note == "Solid: training; dashed: held out."
    chart = figure.views[0][1]
    assert isinstance(chart, LineChart)
    lines = [(line.colour, line.dashed, line.points[-1].y) for line in chart.lines]
    assert lines == [(0, False, 0.75), (0, True, 0.5), (1, True, 0.25)]


def test_of_thousands_of_metrics_the_first_have_a_chart_and_the_rest_are_counted(
    tmp_path: Path,
) -> None:
    metrics = {f"m{number}": 1.0 for number in range(3000)}
    found = figures([run(tmp_path, [evaluate(1.0, 5, **metrics)])])
    shown = [figure for figure in found if figure.name.startswith("metric-")]
    assert [figure.name for figure in shown] == [f"metric-m{number}" for number in range(12)]
    assert [figure.note for figure in shown[:-1]] == [""] * 11
    assert shown[-1].note == "2988 more metrics are in metrics.jsonl."


def test_without_records_every_chart_is_empty_and_nothing_fails(tmp_path: Path) -> None:
    found = figures([run(tmp_path, [], summary={"outcome": "failed"})])
    assert drawn(found) == []
    assert all(is_empty(chart) for figure in found for _, chart in figure.views)
