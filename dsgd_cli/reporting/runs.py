"""Reading what a run left in its folder, also when the run died in the middle of a line.

A folder is a run's if it has metrics.jsonl or summary.json, and a sweep's, with those of its runs
inside, if it has sweep.json. Nothing else is taken for granted: a record that is no JSON object is
counted and left out, a missing summary is made up for by the resolved cluster.yaml. Raises
UsageError for a folder that is neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsgd_cli.contract.errors import DsgdError, UsageError

Record = Mapping[str, Any]
METRICS, SUMMARY, CLUSTER = "metrics.jsonl", "summary.json", "cluster.yaml"
SWEEP = "sweep.json"


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its files tell it."""

    name: str
    folder: Path
    records: tuple[Record, ...]
    summary: Record  # empty when the run did not live to write it
    unreadable: int = 0  # lines of metrics.jsonl
    varied: Mapping[str, str] = field(default_factory=dict)  # its values, in a sweep's report

    @property
    def ended(self) -> bool:
        """Whether the launcher lived to write the summary."""
        return "outcome" in self.summary

    def of(self, kind: str) -> Iterator[Record]:
        """The records of a kind, in their order."""
        return (record for record in self.records if record.get("kind") == kind)

    @property
    def troubles(self) -> list[str]:
        """What the reader of a report must know before the charts."""
        said = []
        if not self.ended:
            said.append(f"{self.name} has no {SUMMARY}: the run, or dsgd, died before its end")
        if self.unreadable:
            lines = "line" if self.unreadable == 1 else "lines"
            said.append(
                f"{self.name}: {self.unreadable} {lines} of {METRICS} could not be read"
                " (cut off in the middle?)"
            )
        if not self.records:
            said.append(f"{self.name} has no records: it ended before anything was trained")
        return said


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, a sweep's all of them, with names that differ.

    Only a sweep by itself is read as one: what was varied elsewhere has nothing to do with it.
    Raises UsageError.
    """
    found = [each for folder in folders for each in runs_in(folder)]
    if not found:
        raise UsageError(f"{folders[0]}: none of the runs of its {SWEEP} is there")
    runs = [read_run(folder) for folder, _ in found]
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    if len(folders) > 1:
        return runs
    return [replace(run, varied=varied) for run, (_, varied) in zip(runs, found, strict=True)]


def runs_in(folder: Path) -> list[tuple[Path, Mapping[str, str]]]:
    """The folder itself, or those of the runs of its sweep, each with its values by key."""
    if is_run(folder) or not is_sweep(folder):
        return [(folder, {})]
    try:
        entries = _parsed((folder / SWEEP).read_bytes())
    except OSError as error:
        raise DsgdError(f"{error.filename}: {error.strerror}") from error
    return [each for entry in _entries(entries) if is_run((each := _place(folder, entry))[0])]


def _entries(told: Any) -> Iterator[Record]:
    for entry in told if isinstance(told, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("run_dir"), str):
            yield entry


def _place(folder: Path, entry: Record) -> tuple[Path, Mapping[str, str]]:
    """Where a run is, wherever the sweep was moved to, and what it tells of its values."""
    values = entry.get("sweep")
    told = values if isinstance(values, dict) else {}
    return folder / Path(entry["run_dir"]).name, {key: str(value) for key, value in told.items()}


def read_run(folder: Path) -> Run:
    """The run of a folder. Raises UsageError when it is none."""
    _check(folder)
    try:
        records, unreadable = _records(folder / METRICS)
        summary = read_summary(folder)
    except OSError as error:
        raise DsgdError(f"{error.filename}: {error.strerror}") from error
    return Run(folder.resolve().name, folder, records, summary, unreadable)


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / SUMMARY).is_file()


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).is_file()


def _check(folder: Path) -> None:
    if is_run(folder):
        return
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder", remedy="give the folder of a run: runs/NAME")
    if folder.is_file() and (is_run(folder.parent) or is_sweep(folder.parent)):
        raise UsageError(f"{folder} is a file of a run", remedy=f"give its folder: {folder.parent}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="give the folder of a run: runs/NAME")
    inside = [each for each in sorted(folder.iterdir()) if is_run(each) or is_sweep(each)]
    newest = max(inside, key=lambda each: each.stat().st_mtime, default=None)
    raise UsageError(
        f"{folder} is not the folder of a run: it has neither {METRICS} nor {SUMMARY}",
        remedy=f"did you mean {newest}?" if newest else "`dsgd train` says where it puts a run",
    )


def _records(path: Path) -> tuple[tuple[Record, ...], int]:
    """All records that can be read, and how many lines cannot."""
    records: list[Record] = []
    unreadable = 0
    if not path.is_file():
        return (), 0
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line)
            if isinstance(record, dict):
                records.append(record)
            elif line.strip():
                unreadable += 1
    return tuple(records), unreadable


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None


def read_summary(folder: Path) -> Record:
    """What a run's summary.json says, or what can be said without it. Raises OSError."""
    path = folder / SUMMARY
    if path.is_file():
        summary = _parsed(path.read_bytes())
        if isinstance(summary, dict):
            return summary
    return _from_description(folder / CLUSTER)


def _from_description(path: Path) -> Record:
    """What the resolved cluster.yaml can say in place of a summary."""
    import yaml

    try:
        spec = yaml.safe_load(path.read_text())
        algorithm = spec["train"]["algorithm"]
        return {
            "algorithm": algorithm if isinstance(algorithm, str) else next(iter(algorithm)),
            "workers": spec["workers"]["count"],
            "servers": spec["servers"]["count"],
        }
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, StopIteration):
        return {}
