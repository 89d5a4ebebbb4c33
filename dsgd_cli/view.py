"""What a run looks like while it goes on: a few lines, from what the coordinator says of it.

The first line is the run's progress with a sparkline of the training loss; then one line for each
worker: its steps, its speed over the last seconds, how stale its pushes are, where its time goes,
and what it is doing. Pure: no terminal, no clock; `console` draws it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dsgd_cli.contract.durations import format_duration

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 16
SPEED_S = 3.0  # a worker's speed is that of the last seconds
STATES = {"joined": "loading", "lost": "lost", "hung": "hung"}  # after an event of the run

Message = Mapping[str, Any]


@dataclass(slots=True)
class Worker:
    """One worker, over all its incarnations."""

    name: str
    state: str = "loading"
    steps: int = 0
    staleness: float | None = None
    compute: float = 0.0  # the part of its time in which it computes
    recent: deque[tuple[float, int]] = field(default_factory=deque)  # (time, examples), newest last

    def report(self, record: Message) -> None:
        self.state = "training"
        self.steps += int(record["steps"])
        self.staleness = record["staleness"]
        busy_s = record["pull_s"] + record["compute_s"] + record["push_s"]
        self.compute = record["compute_s"] / busy_s if busy_s else 0.0
        self.recent.append((float(record["time"]), int(record["examples"])))
        while self.recent[-1][0] - self.recent[0][0] > SPEED_S:
            self.recent.popleft()

    def speed(self) -> float:
        """Examples per second; the oldest report only says when counting began."""
        if len(self.recent) < 2 or self.state != "training":
            return 0.0
        span_s = self.recent[-1][0] - self.recent[0][0]
        examples = sum(count for _, count in self.recent) - self.recent[0][1]
        return examples / span_s if span_s > 0 else 0.0

    def cells(self) -> tuple[str, ...]:
        if self.state != "training":
            return self.name, f"{self.steps} steps", "", "", "", self.state
        stale = "" if self.staleness is None else f"staleness {self.staleness:.1f}"
        return (
            self.name,
            f"{self.steps} steps",
            f"{short(self.speed())} examples/s",
            stale,
            f"computes {self.compute:.0%}",
            self.state,
        )


@dataclass(slots=True)
class View:
    """The run so far."""

    _progress: Message = field(default_factory=dict)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=4 * SPARK_WIDTH))
    _workers: dict[str, Worker] = field(default_factory=dict)

    def progress(self, message: Message) -> None:
        """A progress message."""
        self._progress = message
        loss = message.get("loss")
        if loss is not None and math.isfinite(loss):
            self._losses.append(float(loss))

    def record(self, record: Message) -> None:
        """A line of metrics.jsonl."""
        if record["kind"] == "report":
            self._worker(f"worker/{record['worker']}").report(record)
        elif record["kind"] == "event" and record["event"] in STATES:
            worker = self._worker(str(record["process"]))
            worker.state = STATES[record["event"]]
            worker.recent.clear()

    def head(self) -> str:
        """The line of the run."""
        return progress_line(self._progress, sparkline(self._losses))

    def lines(self, most: int) -> list[str]:
        """`head`, and as many workers as there is room for, those in trouble first."""
        if not self._progress:
            return []
        room = max(0, most - 1)
        workers = sorted(self._workers.values(), key=_by_trouble)
        shown = workers if len(workers) <= room else workers[: max(0, room - 1)]
        shown = sorted(shown, key=_by_number)
        lines = [self.head(), *aligned([worker.cells() for worker in shown])]
        if len(shown) < len(workers) and room:
            lines.append(f"… and {len(workers) - len(shown)} more workers")
        return lines

    def _worker(self, name: str) -> Worker:
        return self._workers.setdefault(name, Worker(name))


def _by_number(worker: Worker) -> int:
    return int(worker.name.rpartition("/")[2])


def _by_trouble(worker: Worker) -> tuple[bool, int]:
    return worker.state == "training", _by_number(worker)


def sparkline(values: Sequence[float] | deque[float], width: int = SPARK_WIDTH) -> str:
    """Bars from the least to the greatest, on a logarithmic scale where that is possible; many
    values are averaged into `width`."""
    points = list(values)
    if len(points) < 2:
        return ""
    if min(points) > 0:
        points = [math.log(point) for point in points]
    count = min(width, len(points))
    ends = [len(points) * i // count for i in range(count + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; those that are empty throughout are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


def progress_line(message: Message, spark: str = "") -> str:
    """`step 1240  loss 0.113  accuracy 0.958  41.2k examples/s  epoch 12  1.8s`; cut at the end."""
    parts = [f"step {message.get('step', 0)}"]
    if message.get("loss") is not None:
        parts.append(f"loss {float(message['loss']):.4f}" + (f" {spark}" if spark else ""))
    if message.get("value") is not None and message.get("metric") not in (None, "loss"):
        parts.append(f"{message['metric']} {float(message['value']):.4f}")
    parts.append(f"{short(float(message.get('examples_per_s') or 0))} examples/s")
    parts.append(f"epoch {message.get('epoch', 0)}")
    parts.append(f"{float(message.get('elapsed_s') or 0):.1f}s")
    limits = message.get("limits") or {}
    if limits:
        parts.append("until " + ", ".join(_limit(name, value) for name, value in limits.items()))
    return "  ".join(parts)


def _limit(name: str, value: float) -> str:
    """`accuracy 0.97`, `epoch 50`, `10m`."""
    if name == "max_time_s":
        return format_duration(float(value))
    if name.startswith("max_"):
        name = name[len("max_") :].removesuffix("s")
    return f"{name} {value:g}"


def short(number: float) -> str:
    """`41.2k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
