"""A sweep's report: what its runs have in common, and what a key changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.errors import UsageError
from dsgd_cli.reporting.charts import Figure, LineChart, is_empty
from dsgd_cli.reporting.figures import figures
from dsgd_cli.reporting.page import page
from dsgd_cli.reporting.runs import Run, read_runs
from dsgd_cli.reporting.write import write_report
from tests.reporting.runs import evaluate, folder, sweep, usual

Cell = tuple[dict[str, str], list[Any], dict[str, Any]]


def cell(
    accuracies: list[float], speed: float = 100.0, target: float | None = 0.9, **values: str
) -> Cell:
    """A run that was evaluated each second."""
    records = [
        evaluate(1.0 * at, 10 * at, accuracy=accuracy, loss=1 - accuracy)
        for at, accuracy in enumerate(accuracies, 1)
    ]
    about = {"examples_per_second": speed, "target": {"accuracy": target} if target else {}}
    return values, records, about


def with_outcome(made: Cell, outcome: str) -> Cell:
    values, records, about = made
    return values, records, {**about, "outcome": outcome}


def drawn(tmp_path: Path, *cells: Cell) -> dict[str, Figure]:
    """By name, those that only sweeps have."""
    found = figures(read_runs([sweep(tmp_path / "lab-sweep", cells)]))
    return {each.name: each for each in found if "-by-" in each.name}


def chart(figure: Figure) -> LineChart:
    ((_, found),) = figure.views
    assert isinstance(found, LineChart)
    return found


def lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    return {
        line.label: [(point.x, pytest.approx(point.y)) for point in line.points]
        for line in chart(figure).lines
    }


def test_seconds_to_the_target_and_speed_by_workers(tmp_path: Path) -> None:
    found = drawn(
        tmp_path,
        cell([0.5, 0.8, 0.9], 100, workers="1", algorithm="downpour"),
        cell([0.5, 0.8, 0.7, 0.95], 50, workers="1", algorithm="synchronous"),
        cell([0.5, 0.9, 0.8], 190, workers="2", algorithm="downpour"),
        cell([0.95], 75, workers="2", algorithm="synchronous"),
        cell([0.5, 0.91], 210, workers="4", algorithm="downpour"),
    )
    seconds, speed = found["seconds-by-workers"], found["speed-up-by-workers"]
    assert list(found) == ["seconds-by-workers", "speed-up-by-workers"]  # algorithms are no numbers
    assert lines(seconds) == {
        "algorithm=downpour": [(1, 3), (2, 2), (4, 2)],
        "algorithm=synchronous": [(1, 4), (2, 1)],
    }
    assert chart(seconds).y.title == "seconds to accuracy 0.9"
    assert seconds.note == "To the first evaluation that reached the target."
    assert lines(speed) == {
        "algorithm=downpour": [(1, 1), (2, 1.9), (4, 2.1)],
        "algorithm=synchronous": [(1, 1), (2, 1.5)],
        "ideal": [(1, 1), (2, 2), (4, 4)],
    }
    assert [line.dashed for line in chart(speed).lines] == [False, False, True]
    assert speed.rows[1] == ("algorithm=downpour", "2", "190", "1.9")
    assert [key.label for key in seconds.legend] == ["algorithm=downpour", "algorithm=synchronous"]


def test_what_is_no_number_or_does_not_vary_has_no_chart(tmp_path: Path) -> None:
    assert drawn(tmp_path, cell([0.9], workers="2", lease="15s"), cell([0.9], lease="20s")) == {}


def test_of_runs_that_are_no_sweep_there_is_none(tmp_path: Path) -> None:
    home = sweep(tmp_path / "lab-sweep", [cell([0.9], workers="1"), cell([0.9], workers="2")])
    other = folder(tmp_path / "other", usual())
    for folders in (sorted(home.glob("0*")), [home, other]):
        runs = read_runs(folders)
        assert len(runs) >= 2
        assert not any("-by-" in figure.name for figure in figures(runs))


def test_a_single_line_needs_no_legend(tmp_path: Path) -> None:
    found = drawn(tmp_path, cell([0.9], workers="1"), cell([0.9], workers="2"))
    assert found["seconds-by-workers"].legend == ()
    assert [key.label for key in found["speed-up-by-workers"].legend] == ["measured", "ideal"]


def test_nothing_is_ideal_but_of_workers(tmp_path: Path) -> None:
    found = drawn(tmp_path, *(cell([0.9], batch_size=str(size)) for size in (16, 64, 512)))
    assert list(lines(found["speed-up-by-batch_size"])) == [""]
    assert chart(found["speed-up-by-batch_size"]).x.log


@pytest.mark.parametrize(
    ("target", "said"), [(0.99, "None reached the target, accuracy 0.99."), (None, "")]
)
def test_without_a_target_that_a_run_reached_it_is_the_best_of_the_worst(
    tmp_path: Path, target: float | None, said: str
) -> None:
    found = drawn(
        tmp_path,
        cell([0.5, 0.7, 0.6], target=target, workers="1"),
        cell([0.6, 0.8, 0.95], target=target, workers="2"),
    )["seconds-by-workers"]
    assert lines(found) == {"": [(1, 2), (2, 2)]}
    assert chart(found).y.title == "seconds to accuracy 0.7"
    at_best = "To the first evaluation that reached what all did at best."
    assert found.note == f"{at_best} {said}".strip()


def test_a_run_that_missed_the_target_is_left_out(tmp_path: Path) -> None:
    found = drawn(
        tmp_path,
        cell([0.5, 0.1], target=0.9, workers="1"),
        cell([0.6, 0.8, 0.95], target=0.9, workers="2"),
    )["seconds-by-workers"]
    assert lines(found) == {"": [(2, pytest.approx(3))]}
    assert chart(found).y.title == "seconds to accuracy 0.9"
    assert found.note == "To the first evaluation that reached the target. Left out: 01-workers-1."


def test_a_run_that_came_to_nothing_is_left_out_and_lowers_no_level(tmp_path: Path) -> None:
    found = drawn(
        tmp_path,
        cell([0.5, 0.9], workers="1"),
        with_outcome(cell([0.1], workers="2"), "diverged"),
        with_outcome(({"workers": "3"}, [], {"examples_per_second": 0.0}), "failed"),
        cell([0.9], workers="4"),
    )
    assert lines(found["seconds-by-workers"]) == {"": [(1, 2), (4, 1)]}
    assert found["seconds-by-workers"].note.endswith("Left out: 02-workers-2, 03-workers-3.")
    assert [x for x, _ in lines(found["speed-up-by-workers"])[""]] == [1, 2, 4]


def test_runs_that_differ_in_their_seed_are_one_point(tmp_path: Path) -> None:
    found = drawn(
        tmp_path,
        *(cell([0.1] * late + [0.9], workers="1", seed=str(late)) for late in (0, 1, 5)),
        *(cell([0.1] * late + [0.9], workers="2", seed=str(late)) for late in (0, 0, 5)),
    )
    assert list(found) == ["seconds-by-workers", "speed-up-by-workers"]
    assert lines(found["seconds-by-workers"]) == {"": [(1, 2), (2, 1)]}
    assert "Medians over 3 seeds." in found["seconds-by-workers"].note


@pytest.mark.parametrize("target", [[], "0.9", {"accuracy": "much"}, {"accuracy": None}, 3])
def test_a_summary_that_says_something_else_is_no_error(tmp_path: Path, target: Any) -> None:
    values, records, about = cell([0.5, 0.9], workers="1")
    odd = {**about, "target": target, "examples_per_second": "many"}
    found = drawn(tmp_path, (values, records, odd), cell([0.4, 0.8], workers="2"))
    assert lines(found["seconds-by-workers"]) == {"": [(1, 2), (2, 2)]}


def test_without_any_evaluation_there_is_nothing_to_see(tmp_path: Path) -> None:
    found = drawn(tmp_path, cell([], workers="1"), cell([], workers="2"))
    assert is_empty(chart(found["seconds-by-workers"]))


# ── the folder of a sweep ──────────────────────────────────────────────────────────────────────


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


def test_a_sweeps_folder_stands_for_its_runs_wherever_it_was_moved(tmp_path: Path) -> None:
    home = sweep(tmp_path / "a", [cell([0.9], workers="1"), cell([0.9], workers="2")])
    moved = home.rename(tmp_path / "b")
    runs = read_runs([moved])
    assert names(runs) == ["01-workers-1", "02-workers-2"]
    assert [run.varied for run in runs] == [{"workers": "1"}, {"workers": "2"}]
    written = write_report([moved])
    assert written.report == moved / "report.html"
    assert "Speed-up by workers" in written.report.read_text()


def test_a_run_that_left_no_folder_is_not_looked_for(tmp_path: Path) -> None:
    home = sweep(tmp_path / "a", [cell([0.9], workers="1"), cell([0.9], workers="2")])
    (home / "02-workers-2").rename(tmp_path / "away")
    assert names(read_runs([home])) == ["01-workers-1"]


@pytest.mark.parametrize(
    "text", ["", "[", "{}", "[3]", '[{"run_dir": 3}]', '[{"run_dir": "x/nothing"}]']
)
def test_a_sweep_without_runs_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UsageError, match=r"none of the runs of its sweep\.json is there"):
        read_runs([tmp_path])


def test_hostile_values_are_text(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script>'&"
    entries = []
    for number in "12":
        folder(tmp_path / number, usual())
        entries.append({"run_dir": number, "sweep": {evil: number, "model": evil}})
    (tmp_path / "sweep.json").write_text(json.dumps(entries))
    runs = read_runs([tmp_path])
    text = page(runs, figures(runs))
    assert "<script" not in text and "Speed-up by &quot;&gt;&lt;script" in text
