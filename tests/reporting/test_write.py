"""Where a report goes, and how long it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.reporting.write import write_report
from tests.reporting.runs import folder, usual

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second, and are not there on every machine."""
    monkeypatch.setattr("dsgd_cli.reporting.write.find_spec", lambda name: None)


def test_one_run_has_its_report_beside_its_records(tmp_path: Path) -> None:
    home = folder(tmp_path / "lab-1", usual())
    written = write_report([home])
    assert written.report == home / "report.html"
    assert "lab-1" in written.report.read_text()
    assert written.as_json()["troubles"] == []
    assert not list(home.glob(".*"))


def test_several_runs_have_theirs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [folder(tmp_path / name, usual()) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert write_report(homes).report == Path("report.html")
    assert (tmp_path / "report.html").exists()


def test_a_folder_or_a_file_as_the_target(tmp_path: Path) -> None:
    home = folder(tmp_path / "lab-1", usual())
    assert write_report([home], tmp_path / "new" / "one").report.name == "report.html"
    assert write_report([home], tmp_path / "other.html").report == tmp_path / "other.html"


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    home = folder(tmp_path / "lab-1", usual())
    (tmp_path / "file").write_text("")
    with pytest.raises(DsgdError, match="cannot write the report"):
        write_report([home], tmp_path / "file")


def test_a_report_is_made_in_passing(tmp_path: Path) -> None:
    """At the end of each training: some milliseconds for a short one, and nothing heavy."""
    home = folder(tmp_path / "lab-1", usual())
    took_s = []
    for _ in range(5):
        began = time.process_time()
        write_report([home])
        took_s.append(time.process_time() - began)
    assert min(took_s) < 0.1
    code = (
        "import sys, dsgd_cli.reporting.write\n"
        "from pathlib import Path\n"
        "dsgd_cli.reporting.write.find_spec = lambda name: None\n"
        "dsgd_cli.reporting.write.write_report([Path(sys.argv[1])])\n"
        "print(sorted({'numpy', 'matplotlib', 'yaml', 'pydantic'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pictures_are_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="PNGs need it: pip install 'dsgd[plot]'")
    from dsgd_cli.reporting.figures import drawn, figures
    from dsgd_cli.reporting.png import write_plots
    from dsgd_cli.reporting.runs import read_runs

    runs = read_runs([folder(tmp_path / name, usual()) for name in ("a", "b$x$漢")])
    paths = write_plots(drawn(figures(runs)), tmp_path / "plots")
    assert {path.name for path in paths} >= {"loss-by-step.png", "staleness.png", "events.png"}
    assert len(paths) == 11
    assert all(path.read_bytes().startswith(SIGNATURE) for path in paths)
