"""The run's bookkeeping: totals, and the lines of metrics.jsonl that reports turn into.

Workers report every task, which for a small model is every few milliseconds; here the reports of
one worker are summed into at most one record in WINDOW_S, and `flush` gives what is left. Records
hold plain JSON values: what is not finite becomes None. Decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from dsgd_cli.engine.events import Report
from dsgd_cli.engine.tasks import EpochRecord

WINDOW_S = 0.25
SPEED_WINDOWS = 8  # examples_per_s is over this many progress lines


@dataclass(slots=True)
class _Sums:
    """The reports of one worker since its last record."""

    since_s: float
    epoch: int = 0
    steps: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    shard_bytes: list[int] = field(default_factory=list)
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0

    def add(self, report: Report, epoch: int) -> None:
        self.epoch = max(self.epoch, epoch)
        self.steps += report.steps
        self.examples += report.examples
        self.loss_sum += report.loss_sum
        self.loss_count += report.loss_count
        self.staleness.update(report.staleness)
        self.dropped += report.dropped
        self.shard_bytes = added(self.shard_bytes, report.shard_bytes)
        self.pull_s += report.pull_s
        self.compute_s += report.compute_s
        self.push_s += report.push_s


@dataclass(slots=True)
class Ledger:
    """Totals since the start of training, and the windows that are still open."""

    steps: int = 0
    examples: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    shard_bytes: list[int] = field(default_factory=list)
    _started_s: float | None = None
    _open: dict[int, _Sums] = field(default_factory=dict)
    _epoch_end_s: float = 0.0
    _loss: float | None = None  # training loss, of the last progress line that had reports
    _loss_sum: float = 0.0
    _loss_count: int = 0
    _speed: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=SPEED_WINDOWS + 1)
    )

    def start(self, now_s: float) -> None:
        """Training begins: all times are counted from here."""
        self._started_s = now_s
        self._speed.append((0.0, 0))

    @property
    def started(self) -> bool:
        return self._started_s is not None

    def elapsed_s(self, now_s: float) -> float:
        return 0.0 if self._started_s is None else now_s - self._started_s

    def add(self, report: Report, epoch: int, now_s: float) -> list[dict[str, Any]]:
        """Count a report; gives the worker's record when its window is full. `steps` of the run
        are what its algorithm counts."""
        self.examples += report.examples
        self.staleness.update(report.staleness)
        self.dropped += report.dropped
        self.shard_bytes = added(self.shard_bytes, report.shard_bytes)
        self._loss_sum += report.loss_sum
        self._loss_count += report.loss_count
        sums = self._open.setdefault(report.worker, _Sums(since_s=now_s))
        sums.add(report, epoch)
        if now_s - sums.since_s < WINDOW_S:
            return []
        del self._open[report.worker]
        return [self._report(report.worker, sums, now_s)]

    def flush(self, now_s: float) -> list[dict[str, Any]]:
        """The records of all open windows."""
        left, self._open = self._open, {}
        return [self._report(worker, sums, now_s) for worker, sums in sorted(left.items())]

    def epoch(self, record: EpochRecord, now_s: float) -> dict[str, Any]:
        """`seconds` is the time since the epoch before was complete: they add up to the run's."""
        begun, self._epoch_end_s = self._epoch_end_s, self.elapsed_s(now_s)
        return {
            **self._line("epoch", now_s),
            "epoch": record.epoch,
            "examples": record.examples,
            "distinct": record.distinct,
            "n": record.n,
            "seconds": round(self._epoch_end_s - begun, 6),
        }

    def evaluation(
        self,
        metrics: Mapping[str, float],
        *,
        epoch: int,
        workers: Sequence[int],
        frozen: bool,
        now_s: float,
    ) -> dict[str, Any]:
        return {
            **self._line("evaluate", now_s),
            "epoch": epoch,
            **{name: _finite(value) for name, value in metrics.items()},
            "frozen": frozen,
            "worker": workers[0] if len(workers) == 1 else list(workers),
        }

    def happened(self, what: str, now_s: float, **more: Any) -> dict[str, Any]:
        """An event of the run that a reader of the metrics wants to see in its place."""
        return {**self._line("event", now_s), "event": what, **more}

    def progress(self, now_s: float) -> dict[str, Any]:
        """The part of a progress line that comes from reports."""
        if self._loss_count:
            self._loss = _finite(self._loss_sum / self._loss_count)
            self._loss_sum, self._loss_count = 0.0, 0
        elapsed = self.elapsed_s(now_s)
        self._speed.append((elapsed, self.examples))
        since_s, since = self._speed[0]
        span = elapsed - since_s
        return {
            "step": self.steps,
            "examples": self.examples,
            "examples_per_s": round((self.examples - since) / span, 3) if span > 0 else 0.0,
            "shard_bytes": self.shard_bytes,
            "loss": self._loss,
            "elapsed_s": round(elapsed, 6),
        }

    def _line(self, kind: str, now_s: float) -> dict[str, Any]:
        return {"kind": kind, "time": round(self.elapsed_s(now_s), 6), "step": self.steps}

    def _report(self, worker: int, sums: _Sums, now_s: float) -> dict[str, Any]:
        loss = sums.loss_sum / sums.loss_count if sums.loss_count else None
        return {
            **self._line("report", now_s),
            "epoch": sums.epoch,
            "worker": worker,
            "steps": sums.steps,
            "examples": sums.examples,
            "loss": _finite(loss),
            "staleness": mean(sums.staleness),
            "staleness_max": max(sums.staleness, default=0),
            "dropped": sums.dropped,
            "bytes": sum(sums.shard_bytes),
            "shard_bytes": sums.shard_bytes,
            "pull_s": round(sums.pull_s, 6),
            "compute_s": round(sums.compute_s, 6),
            "push_s": round(sums.push_s, 6),
        }


def added(some: Sequence[int], more: Sequence[int]) -> list[int]:
    """Shard by shard; who has nothing to report may know of no shards."""
    return [one + other for one, other in zip_longest(some, more, fillvalue=0)]


def mean(histogram: Mapping[int, int]) -> float | None:
    """Of value -> how often."""
    count = sum(histogram.values())
    return sum(value * times for value, times in histogram.items()) / count if count else None


def quantile(histogram: Mapping[int, int], part: float) -> int | None:
    """The least value that this part of them does not exceed."""
    least = part * sum(histogram.values())
    below = 0
    for value in sorted(histogram):
        below += histogram[value]
        if below >= least:
            return value
    return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
