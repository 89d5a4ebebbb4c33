"""Reading what is left of a run, and saying what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgd_cli.contract.errors import UsageError
from dsgd_cli.reporting.runs import read_run, read_runs
from tests.reporting.runs import SUMMARY, folder, report, run, usual


def test_a_whole_run_has_no_troubles(tmp_path: Path) -> None:
    found = run(tmp_path, usual())
    assert (found.name, found.ended, found.troubles) == ("lab-1", True, [])
    assert len(list(found.of("epoch"))) == 16


def test_a_run_that_died_is_read_up_to_the_torn_line(tmp_path: Path) -> None:
    records = [report(0, 0.25, 10), report(0, 0.5, 20)]
    found = run(tmp_path, records, summary=None, torn='{"kind": "rep')
    assert len(found.records) == 2
    assert not found.ended
    assert "no summary.json" in found.troubles[0]
    assert "1 line of metrics.jsonl could not be read" in found.troubles[1]
    assert found.summary == {"algorithm": "downpour", "workers": 3, "servers": 2}


@pytest.mark.parametrize("line", ["[]", "7", "null", "\x00\x00", "[" * 100_000])
def test_what_is_no_record_is_counted_and_left_out(tmp_path: Path, line: str) -> None:
    found = run(tmp_path, [report(0, 0.25, 10)], torn=f"{line}\n")
    assert (len(found.records), found.unreadable) == (1, 1)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "train: 3", "a: &b [*b]", "{train: {algorithm: }}"]
)
def test_a_description_that_says_nothing_is_no_error(tmp_path: Path, text: str) -> None:
    home = folder(tmp_path / "lab-1", [], summary=None)
    (home / "cluster.yaml").write_text(text)
    found = read_run(home)
    assert found.summary == {}
    assert "no records" in found.troubles[1]


def test_what_is_no_run_is_an_error_that_helps(tmp_path: Path) -> None:
    folder(tmp_path / "runs" / "lab-1", usual())
    with pytest.raises(UsageError, match="not the folder of a run") as caught:
        read_run(tmp_path / "runs")
    assert caught.value.remedy == f"did you mean {tmp_path / 'runs' / 'lab-1'}?"
    with pytest.raises(UsageError, match="no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is a file of a run") as caught:
        read_run(tmp_path / "runs" / "lab-1" / "summary.json")
    assert caught.value.remedy.endswith("lab-1")
    with pytest.raises(UsageError, match="is not a folder"):
        read_run(Path(__file__))
    assert caught.value.exit_code == 2


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    homes = [folder(tmp_path / each / "lab-1", usual(), SUMMARY) for each in "ab"]
    assert [each.name for each in read_runs(homes)] == [str(home) for home in homes]
