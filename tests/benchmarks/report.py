"""What a benchmark found, as a table that says for each bar whether it is met.

Every figure is a median with its spread; a bar is part of the row that it judges. The same rows are
written as Markdown and as JSON, with the machine and the date.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must be: at most, or at least."""

    limit: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: the median of `values`, which are kept."""

    what: str
    values: tuple[float, ...]
    unit: str = ""
    bar: Bar | None = None
    detail: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def cells(self) -> tuple[str, ...]:
        unit = f" {self.unit}" if self.unit else ""
        low, high = figure(min(self.values)), figure(max(self.values))
        spread = f"{low} … {high}" if len(self.values) > 1 else ""
        verdict = ""
        if self.bar is not None:
            verdict = "met" if self.bar.met(self.median) else "**not met**"
        bar = f"{self.bar}{unit}" if self.bar is not None else ""
        return self.what, f"{figure(self.median)}{unit}", spread, bar, verdict, self.detail


HEAD = ("what", "median", "spread", "bar", "", "how")


def figure(value: float) -> str:
    """Three digits that count, and no exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with columns that line up; a column that is empty throughout is left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    cells = [[str(row[i]) for i in kept] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(kept))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_bytes / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),  # of everything on the machine, afterwards
    }


def about(facts: dict[str, Any]) -> str:
    return (
        f"{facts['date']}, {facts['cores']} cores of {facts['cpu']}, {facts['memory_gb']} GB, "
        f"Linux {facts['kernel']}, Python {facts['python']}, load {facts['load']}; "
        "medians, with the least and the most."
    )


def publish(name: str, rows: Sequence[Row], more: dict[str, Any] | None = None) -> str:
    """Write results/<name>.md and .json; returns the Markdown."""
    facts = machine()
    text = f"{table(HEAD, [row.cells() for row in rows])}\n{about(facts)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    found = [asdict(row) | {"median": row.median} for row in rows]
    content = {"machine": facts, "rows": found, **(more or {})}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return text
