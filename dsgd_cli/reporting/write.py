"""Writing a report: the page always, pictures where matplotlib is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.reporting.figures import drawn, figures
from dsgd_cli.reporting.page import page
from dsgd_cli.reporting.runs import METRICS, Run, read_runs, runs_in

REPORT = "report.html"
PLOTS = "plots"
MAX_BYTES = 32_000_000  # of metrics.jsonl: what is read in passing, at the end of a training


@dataclass(frozen=True, slots=True)
class Written:
    """What was written where."""

    report: Path
    plots: tuple[Path, ...]
    runs: tuple[Run, ...]

    @property
    def troubles(self) -> list[str]:
        return [trouble for run in self.runs for trouble in run.troubles]

    @property
    def said_of_plots(self) -> str:
        """Where the pictures are, or what it takes to have some."""
        if self.plots:
            return f"{len(self.plots)} plots: {self.plots[0].parent}/"
        return "PNG files besides: pip install 'dsgd[plot]'"

    def as_json(self) -> dict[str, Any]:
        return {
            "type": "report",
            "report": str(self.report),
            "plots": [str(path) for path in self.plots],
            "runs": [run.name for run in self.runs],
            "troubles": self.troubles,
        }


def write_report(folders: Sequence[Path], target: Path | None = None) -> Written:
    """The report on the runs of these folders.

    `target` is a file (*.html) or a folder; by default it is the folder itself, of a run or a
    sweep, or the working folder for several. Raises UsageError for a folder that is neither.
    """
    runs = read_runs(folders)
    found = figures(runs)
    path = _path(folders, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page(runs, found))
        plots: tuple[Path, ...] = ()
        if find_spec("matplotlib") is not None:
            from dsgd_cli.reporting.png import write_plots

            plots = write_plots(drawn(found), path.parent / PLOTS)
    except OSError as error:
        where = error.filename or path
        raise DsgdError(f"{where}: cannot write the report: {error.strerror}") from error
    return Written(path, plots, tuple(runs))


def draw(folder: Path) -> list[str]:
    """The report in passing, at the end of a training or a sweep; why there is none, if there
    could be one.

    Nothing that goes wrong with a picture fails a training.
    """
    by_hand = f"`dsgd report {folder}`"
    try:
        runs = [run for run, _ in runs_in(folder) if _has_records(run)]
        if not runs:
            return []
        if not all(map(is_quick, runs)):
            return [f"many records: {by_hand} draws them"]
        write_report([folder])
    except DsgdError as error:
        return [f"no report: {error.message}", *(f"  {line}" for line in error.details)]
    except Exception as error:
        return [f"no report: a bug of dsgd: {error!r}"]
    except KeyboardInterrupt:  # the pictures were not worth waiting for
        return [f"no report: stopped; {by_hand} writes it"]
    return []


def _has_records(folder: Path) -> bool:
    path = folder / METRICS
    return path.is_file() and path.stat().st_size > 0


def is_quick(folder: Path) -> bool:
    """Whether a report on this run takes less than a second or so."""
    path = folder / METRICS
    return not path.is_file() or path.stat().st_size <= MAX_BYTES


def _path(folders: Sequence[Path], target: Path | None) -> Path:
    if target is None:
        return (folders[0] if len(folders) == 1 else Path()) / REPORT
    return target if target.suffix in (".html", ".htm") else target / REPORT


def write_whole(path: Path, text: str) -> None:
    """The whole file or the one that was there: somebody may be looking at it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
