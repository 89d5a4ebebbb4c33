"""The page and its SVG: well formed, without a request, safe with hostile names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dsgd_cli.reporting.figures import figures
from dsgd_cli.reporting.page import page, summary_cells
from dsgd_cli.reporting.runs import read_runs
from dsgd_cli.reporting.svg import HEIGHT, WIDTH
from tests.reporting.runs import SUMMARY, evaluate, folder, run, usual

EVIL = "\"><script>alert(1)</script><img src=//evil.example/x>'&"


def pages(tmp_path: Path) -> dict[str, str]:
    """One run, two runs, and what is left of one that died."""
    one = folder(tmp_path / "one", usual())
    two = folder(tmp_path / "two", usual(slower=2))
    died = folder(tmp_path / "died", usual()[:20], summary=None, torn='{"ki')
    return {
        name: page(runs, figures(runs))
        for name, runs in (
            ("one", read_runs([one])),
            ("two", read_runs([one, two])),
            ("died", read_runs([died])),
        )
    }


def svgs(text: str) -> list[ElementTree.Element]:
    """All charts, parsed as XML: that fails where a tag is not closed."""
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_every_chart_has_a_title_a_description_and_points_inside(tmp_path: Path) -> None:
    for name, text in pages(tmp_path).items():
        found = svgs(text)
        assert len(found) == (12 if name == "one" else 11), name
        for svg in found:
            assert svg.findtext("title") and svg.findtext("desc")
            shapes = [*svg.iter("circle"), *svg.iter("rect")]
            assert shapes
            for shape in shapes:
                assert shape.findtext("title"), "a tooltip"
                x = float(shape.get("cx") or shape.get("x") or "nan")
                y = float(shape.get("cy") or shape.get("y") or "nan")
                assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT * 2


def test_ids_are_unique(tmp_path: Path) -> None:
    for text in pages(tmp_path).values():
        ids = re.findall(r' id="([^"]*)"', text)
        assert len(ids) == len(set(ids))


def test_nothing_is_asked_of_anybody(tmp_path: Path) -> None:
    for text in pages(tmp_path).values():
        assert "default-src 'none'" in text
        assert not re.search(r"<(script|link|img|iframe|object)\b|url\(|@import|https?://", text)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    records = [*usual(), evaluate(1.0, 10, **{EVIL: 0.5})]
    summary = {**SUMMARY, "metric": EVIL, "algorithm": EVIL, "outcome": EVIL, "reason": EVIL}
    runs = [run(tmp_path, records, summary=summary)]
    text = page(runs, figures(runs))
    assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;" in text
    assert len(svgs(text)) == 15


def test_a_run_that_died_says_so(tmp_path: Path) -> None:
    text = pages(tmp_path)["died"]
    assert "died has no summary.json: the run, or dsgd, died before its end" in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert "<td>died</td>" in text


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    summary = {**SUMMARY, "outcome": "diverged", "reason": "the loss is not finite"}
    runs = [run(tmp_path, usual(), summary=summary)]
    assert "lab-1 diverged: the loss is not finite" in page(runs, figures(runs))


@pytest.mark.parametrize("outcome", ["converged", "finished"])
def test_a_run_that_ended_well_needs_no_words(tmp_path: Path, outcome: str) -> None:
    runs = [run(tmp_path, usual(), summary={**SUMMARY, "outcome": outcome})]
    assert 'class="notice"' not in page(runs, figures(runs))
    assert outcome in summary_cells(runs[0])


@pytest.mark.parametrize("died", [False, True])
def test_the_table_of_runs(tmp_path: Path, died: bool) -> None:
    cells = summary_cells(run(tmp_path, usual(), summary=None if died else SUMMARY))
    assert cells == (
        ["downpour", "3", "2", "died", "–", "–", "320", "16", "4.01", "–"]
        if died
        else [
            "downpour",
            "2",
            "1",
            "converged",
            *("accuracy 0.9722", "0.0907", "320", "16", "4", "80"),
        ]
    )
