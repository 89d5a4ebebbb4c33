"""Runs that never ran: folders with the records that a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsgd_cli.reporting.runs import Run, read_run

DESCRIPTION = """
servers: {count: 2}
workers: {count: 3}
train: {algorithm: {downpour: {push_every: 1}}}
"""


def report(worker: int, time: float, step: int, **more: Any) -> dict[str, Any]:
    """A record as the coordinator writes it."""
    base = {"kind": "report", "time": time, "step": step, "epoch": 1, "worker": worker, "steps": 10}
    moved = {"bytes": 1_000_000, "shard_bytes": [750_000, 250_000]}
    spent = {"pull_s": 0.05, "compute_s": 0.1, "push_s": 0.1}
    return {**base, "examples": 320, "loss": 1.0 / step, **moved, **spent, **more}


def evaluate(time: float, step: int, **metrics: Any) -> dict[str, Any]:
    base = {"kind": "evaluate", "time": time, "step": step, "epoch": 1}
    return {**base, **metrics, "frozen": False, "worker": 0}


def epoch(time: float, number: int) -> dict[str, Any]:
    return {"kind": "epoch", "time": time, "step": 10 * number, "epoch": number, "n": 320}


def event(time: float, what: str, process: str = "worker/0") -> dict[str, Any]:
    return {"kind": "event", "time": time, "step": 1, "event": what, "process": process}


def usual(workers: int = 2, seconds: int = 4, slower: float = 1.0) -> list[dict[str, Any]]:
    """The records of a run without trouble, four reports a second of each worker."""
    records = [event(0.0, "joined", f"worker/{rank}") for rank in range(workers)]
    for tick in range(1, 4 * seconds + 1):
        time = tick * 0.25 * slower
        records += [report(rank, time, 10 * tick * workers) for rank in range(workers)]
        records.append(epoch(time, tick))
        metrics = {"accuracy": 1 - 0.5 / tick, "loss": 2.0 / tick**2}
        records.append(evaluate(time + 0.01, 10 * tick * workers, **metrics))
    return records


SUMMARY: dict[str, Any] = {
    "outcome": "converged",
    "reason": "accuracy >= 0.97",
    "metric": "accuracy",
    "value": 0.9722,
    "loss": 0.0907,
    "steps": 320,
    "epochs": 16,
    "seconds": 4.0,
    "batches_per_second": 80.0,
    "algorithm": "downpour",
    "workers": 2,
    "servers": 1,
    "staleness": {"histogram": {"0": 60, "1": 30, "2": 9, "40": 1}},
}


def folder(
    path: Path, records: Iterable[Any], summary: dict[str, Any] | None = SUMMARY, torn: str = ""
) -> Path:
    """The folder of a run; without a summary it has died."""
    path.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines + torn)
    (path / "cluster.yaml").write_text(DESCRIPTION)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def sweep(path: Path, runs: Iterable[tuple[dict[str, str], Iterable[Any], dict[str, Any]]]) -> Path:
    """The folder of a sweep: of each run its values, its records, and what its summary has more."""
    entries = []
    for number, (values, records, more) in enumerate(runs, 1):
        words = "-".join(f"{key}-{value}" for key, value in values.items())
        home = folder(path / f"{number:02}-{words}", records, {**SUMMARY, **more})
        entries.append({"run_dir": f"elsewhere/{path.name}/{home.name}", "sweep": values})
    (path / "sweep.json").write_text(json.dumps(entries))
    return path


def run(tmp_path: Path, records: Iterable[Any], **more: Any) -> Run:
    return read_run(folder(tmp_path / "lab-1", records, **more))
