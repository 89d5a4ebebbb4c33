"""From the records of a run to numbers over steps, epochs and seconds. Pure.

What is not a finite number in a record is left out, never drawn as zero. A report sums up what a
worker did since its last one, so its amounts are spread evenly over that time: the area below a
rate is the amount that the records have.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsgd_cli.reporting.runs import Record, Run

MAX_POINTS = 240  # of a line: more are means over neighbours
BIN_S = 0.25  # a worker reports at most four times a second
MAX_BINS = 120
NOT_METRICS = frozenset(("kind", "time", "step", "epoch", "frozen", "worker"))
PARTS = ("pull", "compute", "push")


@dataclass(frozen=True, slots=True)
class Sample:
    """A value, and when it was: `epoch` is a fraction, None where no epoch was complete."""

    step: float
    epoch: float | None
    seconds: float
    value: float


@dataclass(frozen=True, slots=True)
class Happening:
    """Something at a moment of the run."""

    seconds: float
    what: str  # joined, lost, hung, evaluated, epoch, …
    said: str


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) is float:  # nearly always, and there are many
        return value if math.isfinite(value) else None
    if type(value) is not int:  # a bool is none
        return None
    try:
        return float(value)
    except OverflowError:
        return None


class Epochs:
    """Seconds -> epochs, as a fraction: between two complete epochs, and on at the same pace."""

    def __init__(self, run: Run) -> None:
        self._seconds, self._epochs = [0.0], [0.0]
        for record in run.of("epoch"):
            seconds, epoch = number(record.get("time")), number(record.get("epoch"))
            if seconds is not None and epoch is not None and seconds >= self._seconds[-1]:
                self._seconds.append(seconds)
                self._epochs.append(epoch)

    def at(self, seconds: float) -> float | None:
        """None where no epoch was ever complete."""
        if len(self._seconds) == 1:
            return None
        place = bisect_right(self._seconds, seconds)
        if place == len(self._seconds):
            return self._beyond(seconds)
        left, right = self._seconds[place - 1], self._seconds[place]
        low, high = self._epochs[place - 1], self._epochs[place]
        return low + (high - low) * (seconds - left) / (right - left)

    def _beyond(self, seconds: float) -> float:
        last_s, last = self._seconds[-1], self._epochs[-1]
        pace = last / last_s if last_s > 0 else 0.0
        return last + min(1.0, pace * (seconds - last_s))


def training_loss(run: Run) -> list[Sample]:
    """The mean training loss of each report, in the middle of what it is about."""
    last: dict[Any, tuple[float, float]] = {}
    epochs, samples = Epochs(run), []
    for record in run.of("report"):
        step, seconds = number(record.get("step")), number(record.get("time"))
        if step is None or seconds is None:
            continue
        step_before, seconds_before = last.get(record.get("worker"), (0.0, 0.0))
        last[record.get("worker")] = step, seconds
        loss = number(record.get("loss"))
        if loss is not None:
            seconds = (seconds_before + seconds) / 2
            samples.append(Sample((step_before + step) / 2, epochs.at(seconds), seconds, loss))
    return _in_order(samples)


def metrics(run: Run) -> dict[str, list[Sample]]:
    """The held-out metrics by name: the loss first, then in the order of appearance."""
    epochs = Epochs(run)
    found: dict[str, list[Sample]] = {"loss": []}
    for record in run.of("evaluate"):
        step, seconds = number(record.get("step")), number(record.get("time"))
        if step is None or seconds is None:
            continue
        epoch = epochs.at(seconds)
        for name, told in record.items():
            if name not in NOT_METRICS and (value := number(told)) is not None:
                found.setdefault(name, []).append(Sample(step, epoch, seconds, value))
    return {name: _in_order(samples) for name, samples in found.items() if samples}


def _in_order(samples: Iterable[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: sample.seconds)


def thin(samples: Sequence[Sample], limit: int = MAX_POINTS) -> list[Sample]:
    """At most `limit` samples: means over neighbours. The last one stays what it is."""
    size = math.ceil((len(samples) - 1) / (limit - 1)) if len(samples) > limit else 1
    if size == 1:
        return list(samples)
    before = samples[:-1]
    parts = [before[at : at + size] for at in range(0, len(before), size)]
    return [*map(_mean, parts), samples[-1]]


def _mean(samples: Sequence[Sample]) -> Sample:
    count = len(samples)
    epochs = [sample.epoch for sample in samples if sample.epoch is not None]
    return Sample(
        sum(sample.step for sample in samples) / count,
        sum(epochs) / len(epochs) if epochs else None,
        sum(sample.seconds for sample in samples) / count,
        sum(sample.value for sample in samples) / count,
    )


def workers(run: Run) -> list[int]:
    """The ranks that reported something."""
    ranks = {record.get("worker") for record in run.of("report")}
    return sorted(rank for rank in ranks if isinstance(rank, int))


def rate(
    run: Run, field: str, worker: int | None = None, place: int | None = None
) -> list[tuple[float, float]]:
    """(seconds, amount of `field` a second) of a worker, or of all of them. `place`: in a list."""
    amounts: list[tuple[float, float, float]] = []  # from, to, how much
    last: dict[Any, float] = {}
    for record in run.of("report"):
        who, seconds = record.get("worker"), number(record.get("time"))
        amount = number(record.get(field) if place is None else _item(record.get(field), place))
        if seconds is None or (worker is not None and who != worker):
            continue
        begun, last[who] = last.get(who, 0.0), seconds
        if amount is not None:
            amounts.append((min(begun, seconds), seconds, amount))
    return _spread(amounts)


def _item(them: Any, place: int) -> Any:
    return them[place] if isinstance(them, list) and place < len(them) else None


def shard_bytes(run: Run) -> list[float]:
    """What each shard moved in all, in bytes; of none where the records do not tell."""
    sums: list[float] = []
    for record in run.of("report"):
        told = record.get("shard_bytes")
        if isinstance(told, list):
            sums += [0.0] * (len(told) - len(sums))
            for place, value in enumerate(told):
                sums[place] += number(value) or 0.0
    return sums


def _spread(amounts: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Amounts over spans of time -> (middle, a second) of equal bins."""
    end = max((until for _, until, _ in amounts), default=0.0)
    if end <= 0:
        return []
    count = max(1, min(MAX_BINS, round(end / BIN_S)))
    width = end / count
    bins = [0.0] * count
    for begun, until, amount in amounts:
        first = min(count - 1, int(begun / width))
        final = min(count - 1, int(until / width))
        for place in range(first, final + 1):
            inside = min(until, (place + 1) * width) - max(begun, place * width)
            part = inside / (until - begun) if until > begun else 1.0 / (final - first + 1)
            bins[place] += amount * max(0.0, part)
    return [((place + 0.5) * width, amount / width) for place, amount in enumerate(bins)]


def spent(run: Run) -> dict[int, tuple[float, float, float]]:
    """Worker -> seconds in pull, compute and push."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0] * len(PARTS))
    for record in run.of("report"):
        who = record.get("worker")
        if isinstance(who, int):
            for place, part in enumerate(PARTS):
                sums[who][place] += number(record.get(f"{part}_s")) or 0.0
    return {who: (parts[0], parts[1], parts[2]) for who, parts in sorted(sums.items())}


def staleness(run: Run) -> dict[int, int]:
    """Staleness -> how many pushes had it, from the summary."""
    about = run.summary.get("staleness")
    histogram = about.get("histogram") if isinstance(about, Mapping) else None
    found = {}
    for value, count in (histogram if isinstance(histogram, Mapping) else {}).items():
        if str(value).isdecimal() and (pushes := number(count)):
            found[int(value)] = int(pushes)
    return dict(sorted(found.items()))


def happenings(run: Run) -> list[Happening]:
    """Everything that has a moment: events, evaluations, epochs."""
    found = []
    for record in run.records:
        seconds, kind = number(record.get("time")), record.get("kind")
        if seconds is None or kind not in ("event", "evaluate", "epoch"):
            continue
        found.append(Happening(seconds, *_told(str(kind), record)))
    return sorted(found, key=lambda each: each.seconds)


def _told(kind: str, record: Record) -> tuple[str, str]:
    if kind == "epoch":
        return "epoch", f"epoch {record.get('epoch')} complete"
    if kind == "evaluate":
        values = [
            f"{n} {v:.4g}" for n in record if n not in NOT_METRICS if (v := _value(record, n))
        ]
        return "evaluation", "evaluated: " + ", ".join(values)
    what = str(record.get("event", "event"))
    more = {key: value for key, value in record.items() if key not in _PLACE}
    process = more.pop("process", "")
    said = ", ".join(f"{key} {value}" for key, value in more.items())
    return what, " ".join(filter(None, (str(process), what, f"({said})" if said else "")))


_PLACE = frozenset(("kind", "time", "step", "event"))


def _value(record: Record, name: str) -> float | None:
    return number(record.get(name))


def duration_s(run: Run) -> float:
    """When the last thing happened."""
    times = (number(record.get("time")) for record in run.records)
    return max((seconds for seconds in times if seconds is not None), default=0.0)


def last_step(run: Run) -> int | None:
    """The newest step that any record knows."""
    steps = [s for record in run.records if (s := number(record.get("step"))) is not None]
    return int(max(steps)) if steps else None
