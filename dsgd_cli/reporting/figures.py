"""Which charts a report has, and what is in them: runs -> figures. Pure.

One run is shown with its workers, several are laid over each other, each in its colour everywhere.
Those of a sweep are compared along what it varied first: see `sweeps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsgd_cli.contract.names import TRAINING_METRIC
from dsgd_cli.reporting import series
from dsgd_cli.reporting.charts import (
    Axis,
    BarChart,
    Chart,
    Figure,
    Group,
    Key,
    Line,
    LineChart,
    Mark,
    Point,
    RowMark,
    StackedChart,
    Timeline,
    is_empty,
)
from dsgd_cli.reporting.runs import Run
from dsgd_cli.reporting.scale import short, spans_decades
from dsgd_cli.reporting.series import Happening, Sample
from dsgd_cli.reporting.sweeps import sweep_figures

MAX_LINES = 8  # of workers, or of shards: one each
MAX_BARS = 24  # lying ones, and upright ones of a histogram
MAX_LINES_OF_TABLE = 240
MAX_MARKS = 400  # of a kind and run on the time axis
REST = 0.995  # of the pushes are shown one by one, the others in one bar
TRAINING, HELD_OUT = "training", "held out"
SECONDS = Axis("time in s", zero=True)
VIEWS: tuple[tuple[str, Axis, Callable[[Sample], float | None]], ...] = (
    ("step", Axis("step", zero=True), lambda sample: sample.step),
    ("epoch", Axis("epoch", zero=True), lambda sample: sample.epoch),
    ("second", SECONDS, lambda sample: sample.seconds),
)
MANY = ("evaluation", "epoch")
MOST_METRICS = 12  # with a chart each
TROUBLES = ("lost", "hung", "failed")
GREY = 7
MOVED = "Parameters and gradients moved per second"
BYTES = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s"))

Metrics = Mapping[str, list[Sample]]
Curve = tuple[str, str, int, list[Sample]]  # run, training or held out, colour, what to draw
Rate = tuple[str, int, list[tuple[float, float]]]  # label, colour, (seconds, amount a second)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures of a report on these runs; one without anything to show says so itself."""
    measured = [series.metrics(run) for run in runs]
    named = {
        name: None for metrics in measured for name in metrics if not _elsewhere(name, metrics)
    }
    shown, left = list(named)[:MOST_METRICS], len(named) - MOST_METRICS
    note = f"{left} more metrics are in metrics.jsonl." if left > 0 else ""
    return [
        *sweep_figures(runs, measured),
        _loss(runs, measured),
        *(_metric(runs, measured, name, note if name == shown[-1] else "") for name in shown),
        _rate(runs, "examples", "Examples computed per second", ((1.0, "examples/s"),)),
        _rate(runs, "bytes", MOVED, BYTES),
        *_by_shard(runs),
        _spent(runs),
        _staleness(runs),
        _timeline(runs),
    ]


# ── over steps, epochs and seconds ─────────────────────────────────────────────────────────────


def _loss(runs: Sequence[Run], measured: Sequence[Metrics]) -> Figure:
    found = []
    for colour, (run, metrics) in enumerate(zip(runs, measured, strict=True)):
        found.append((run.name, TRAINING, colour, series.training_loss(run)))
        found.append((run.name, HELD_OUT, colour, metrics.get("loss", [])))
    note = "The training loss is the mean of a worker's report, in the middle of its time."
    legend, also = _legend_of_both(runs)
    return _by_sample("loss", "Loss", "loss", found, legend, f"{also}{note}")


def _metric(runs: Sequence[Run], measured: Sequence[Metrics], name: str, note: str) -> Figure:
    """On the held-out examples, and on training examples where those were evaluated, too."""
    found = []
    for colour, (run, metrics) in enumerate(zip(runs, measured, strict=True)):
        if training := metrics.get(TRAINING_METRIC + name):
            found.append((run.name, TRAINING, colour, training))
        found.append((run.name, HELD_OUT, colour, metrics.get(name, [])))
    title, legend = f"{name[:1].upper()}{name[1:]}", _legend(runs)
    if _are_both(found):
        legend, also = _legend_of_both(runs)
        note = f"{also}{note}".strip()
    else:
        title += " on the held-out examples"
    return _by_sample(f"metric-{name}", title, name, found, legend, note)


def _elsewhere(name: str, metrics: Metrics) -> bool:
    """Whether it is drawn in another metric's figure, or by what the workers report."""
    return name == "loss" or name.removeprefix(TRAINING_METRIC) in metrics.keys() - {name}


def _are_both(found: Sequence[Curve]) -> bool:
    return any(which == TRAINING for _, which, *_ in found)


def _legend_of_both(runs: Sequence[Run]) -> tuple[tuple[Key, ...], str]:
    """And what the note has to say of it."""
    if len(runs) > 1:
        return _legend(runs), f"Solid: {TRAINING}; dashed: {HELD_OUT}. "
    return (Key(TRAINING, 0), Key(HELD_OUT, 0, dashed=True)), ""


def _by_sample(
    name: str,
    title: str,
    what: str,
    found: Sequence[Curve],
    legend: tuple[Key, ...],
    note: str = "",
) -> Figure:
    thinned = [(run, which, colour, series.thin(all_)) for run, which, colour, all_ in found]
    values = [sample.value for *_, samples in thinned for sample in samples]
    y = Axis(what, log=what == "loss" and spans_decades(values))
    views: list[tuple[str, Chart]] = []
    for view, axis, place in VIEWS:
        lines = tuple(
            Line(
                f"{run}, {which}",
                colour,
                _points(samples, place, f"{run}: {which} {what}"),
                _are_both(found) and which == HELD_OUT,
            )
            for run, which, colour, samples in thinned
        )
        views.append((view, LineChart(axis, y, lines)))
    rows = [
        (run, which, *_numbers(sample.step, sample.epoch, sample.seconds, sample.value))
        for run, which, _, samples in thinned
        for sample in series.thin(samples, MAX_LINES_OF_TABLE // max(1, len(thinned)))
    ]
    head = ("run", "examples", "step", "epoch", "seconds", what)
    if y.log:
        note = f"{note} Logarithmic.".strip()
    return Figure(name, title, tuple(views), legend, note, head, tuple(rows))


def _points(
    samples: Iterable[Sample], place: Callable[[Sample], float | None], what: str
) -> tuple[Point, ...]:
    points = []
    for sample in samples:
        x = place(sample)
        if x is not None:
            epoch = "" if sample.epoch is None else f", epoch {sample.epoch:.3g}"
            at = f"step {sample.step:.0f}{epoch}, {sample.seconds:.3g} s"
            points.append(Point(x, sample.value, f"{what} {sample.value:.4g}\n{at}"))
    return tuple(points)


# ── over time ──────────────────────────────────────────────────────────────────────────────────


def _rate(
    runs: Sequence[Run], field: str, title: str, units: Sequence[tuple[float, str]]
) -> Figure:
    """Of each worker of one run, or of each of several runs."""
    rates = [
        (label, colour, series.rate(run, field, worker))
        for label, colour, run, worker in _who(runs)
    ]
    return _rates(runs, field, title, units, rates, "run" if len(runs) > 1 else "worker")


def _by_shard(runs: Sequence[Run]) -> list[Figure]:
    """Of one run whose records tell it; several runs are compared by what they move in all."""
    if len(runs) > 1 or not (totals := series.shard_bytes(runs[0])):
        return []
    rates = _shard_rates(runs[0], totals)
    note = "Lines of shards of one size lie on each other." if len(rates) > 1 else ""
    return [_rates(runs, "shards", f"{MOVED}, by shard", BYTES, rates, "server", note)]


def _shard_rates(run: Run, totals: Sequence[float]) -> list[Rate]:
    """A line for each shard; of many the busiest and the least busy, and the mean of all."""
    count = len(totals)

    def of(place: int) -> list[tuple[float, float]]:
        return series.rate(run, "shard_bytes", place=place)

    if count <= MAX_LINES:
        return [(f"server/{place}", place, of(place)) for place in range(count)]
    most, least = totals.index(max(totals)), totals.index(min(totals))
    mean = [(at_s, amount / count) for at_s, amount in series.rate(run, "bytes")]
    return [
        (f"busiest: server/{most}", 0, of(most)),
        (f"mean of {count} servers", 1, mean),
        (f"least busy: server/{least}", 2, of(least)),
    ]


def _rates(
    runs: Sequence[Run],
    name: str,
    title: str,
    units: Sequence[tuple[float, str]],
    rates: Sequence[Rate],
    who: str,
    note: str = "",
) -> Figure:
    """In the largest of the units that the peak reaches, or the smallest."""
    peak = max((amount for *_, rate in rates for _, amount in rate), default=0.0)
    factor, unit = next((each for each in units if peak >= each[0]), units[-1])
    lines = []
    for label, colour, rate in rates:
        points = tuple(
            Point(at_s, amount / factor, f"{label}: {short(amount / factor)} {unit}\n{at_s:.3g} s")
            for at_s, amount in rate
        )
        lines.append(Line(label, colour, points))
    chart = LineChart(SECONDS, Axis(unit, zero=True), tuple(lines), _trouble_marks(runs))
    rows = tuple((line.label, *_numbers(p.x, p.y)) for line in lines for p in line.points)
    if chart.marks:
        note = f"{note} Lost and hung workers are the dashed uprights.".strip()
    return Figure(
        name,
        title,
        (("", chart),),
        _keys(lines),
        note,
        (who, "seconds", unit),
        rows,
    )


def _who(runs: Sequence[Run]) -> list[tuple[str, int, Run, int | None]]:
    """What has a line of its own: (label, colour, run, worker or None for all)."""
    if len(runs) == 1:
        ranks = series.workers(runs[0])
        if len(ranks) <= MAX_LINES:
            return [(f"worker/{rank}", place, runs[0], rank) for place, rank in enumerate(ranks)]
        return [(f"all {len(ranks)} workers", 0, runs[0], None)]
    return [(run.name, colour, run, None) for colour, run in enumerate(runs)]


def _trouble_marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    return tuple(
        Mark(
            each.seconds,
            colour if len(runs) > 1 else GREY,
            f"{run.name}: {each.said}\n{each.seconds:.3g} s",
        )
        for colour, run in enumerate(runs)
        for each in series.happenings(run)
        if each.what in TROUBLES
    )


# ── sums ───────────────────────────────────────────────────────────────────────────────────────


def _spent(runs: Sequence[Run]) -> Figure:
    spent: dict[str, tuple[float, ...]] = {}
    for run in runs:
        by_worker = series.spent(run)
        if len(runs) == 1 and len(by_worker) <= MAX_BARS:
            spent |= {f"worker/{rank}": parts for rank, parts in by_worker.items()}
        elif by_worker:
            label = run.name if len(runs) > 1 else f"all {len(by_worker)} workers"
            spent[label] = tuple(map(sum, zip(*by_worker.values(), strict=True)))
    groups = tuple(
        Group(
            part,
            place,
            tuple(parts[place] for parts in spent.values()),
            tuple(f"{who}: {parts[place]:.3g} s in {part}" for who, parts in spent.items()),
        )
        for place, part in enumerate(series.PARTS)
    )
    chart = StackedChart(
        Axis("seconds, summed over workers" if len(runs) > 1 else "seconds"), tuple(spent), groups
    )
    return Figure(
        "time",
        "Time in pull, compute and push",
        (("", chart),),
        tuple(Key(group.label, group.colour) for group in groups),
        "Exchanges that are hidden behind computation are in none of them.",
        ("run" if len(runs) > 1 else "worker", *(f"{part}, s" for part in series.PARTS)),
        tuple((who, *_numbers(*parts)) for who, parts in spent.items()),
    )


def _staleness(runs: Sequence[Run]) -> Figure:
    histograms = {run.name: series.staleness(run) for run in runs}
    bins = _bins(histograms.values())
    groups = []
    for colour, (name, histogram) in enumerate(histograms.items()):
        if not histogram:
            continue
        counts = bins.counts(histogram)
        shares = tuple(100.0 * count / sum(histogram.values()) for count in counts)
        said = tuple(
            f"{name}: {count} pushes ({share:.3g} %) of staleness {bins.label(place)}"
            for place, (count, share) in enumerate(zip(counts, shares, strict=True))
        )
        groups.append(Group(name, colour, shares, said))
    labels = tuple(bins.label(place) for place in range(bins.count))
    x = Axis("pushes of others between fetch and arrival")
    chart = BarChart(x, Axis("% of the pushes", zero=True), labels, tuple(groups))
    note = "" if groups else "No push was stale in these runs, or none lived to its summary."
    return Figure(
        "staleness",
        "Staleness of the pushes",
        (("", chart),),
        _legend(runs),
        note,
        ("run", "staleness", "% of the pushes"),
        tuple(
            (group.label, label, *_numbers(value))
            for group in groups
            for label, value in zip(labels, group.values, strict=True)
            if value
        ),
    )


@dataclass(frozen=True, slots=True)
class _Bins:
    """Bars of so many values each; the last is all that is above, if there is a rest."""

    width: int
    count: int
    rest: bool

    def counts(self, histogram: Mapping[int, int]) -> list[int]:
        counts = [0] * self.count
        for value, count in histogram.items():
            counts[min(value // self.width, self.count - 1)] += count
        return counts

    def label(self, place: int) -> str:
        """`3`, `4–7`, or `≥8`."""
        first = place * self.width
        if self.rest and place == self.count - 1:
            return f"≥{first}"
        return str(first) if self.width == 1 else f"{first}–{first + self.width - 1}"


def _bins(histograms: Iterable[Mapping[int, int]]) -> _Bins:
    """Narrow ones for nearly all pushes, however stale the stalest are."""
    cut = top = 0
    for histogram in histograms:
        below, total = 0, sum(histogram.values())
        for value, count in histogram.items():
            top = max(top, value)
            if below < REST * total:
                cut = max(cut, value)
            below += count
    width = math.ceil((cut + 1) / MAX_BARS)
    count = cut // width + 1
    rest = top >= count * width
    return _Bins(width, count + rest, rest)


def _timeline(runs: Sequence[Run]) -> Figure:
    told = [(colour, run, each) for colour, run in enumerate(runs) for each in _shown(run)]
    rows = tuple(dict.fromkeys(_row(runs, run, each) for _, run, each in told))
    marks = tuple(
        RowMark(
            rows.index(_row(runs, run, each)),
            each.seconds,
            colour,
            f"{run.name}: {each.said}\n{each.seconds:.4g} s",
        )
        for colour, run, each in told
    )
    table = [
        (run.name, f"{each.seconds:.3f}", each.said)
        for _, run, each in told
        if each.what not in MANY
    ]
    return Figure(
        "events",
        "What happened when",
        (("", Timeline(SECONDS, rows, marks)),),
        _legend(runs),
        "",
        ("run", "seconds", "event"),
        tuple(table[:MAX_LINES_OF_TABLE]),
    )


def _row(runs: Sequence[Run], run: Run, each: Happening) -> str:
    return each.what if len(runs) == 1 else f"{run.name} {each.what}"


def _shown(run: Run) -> list[Happening]:
    """Every event, and of what comes in thousands (epochs, evaluations) an even choice."""
    by_kind: dict[str, list[Happening]] = {}
    for each in series.happenings(run):
        by_kind.setdefault(each.what, []).append(each)
    return [
        each
        for what in sorted(by_kind, key=lambda what: (what in MANY, what))
        for each in by_kind[what][:: math.ceil(len(by_kind[what]) / MAX_MARKS)]
    ]


# ── small things ───────────────────────────────────────────────────────────────────────────────


def _legend(runs: Sequence[Run]) -> tuple[Key, ...]:
    """Which colour is which run; one run needs none."""
    if len(runs) == 1:
        return ()
    return tuple(Key(run.name, colour) for colour, run in enumerate(runs))


def _keys(lines: Sequence[Line]) -> tuple[Key, ...]:
    return tuple(Key(line.label, line.colour) for line in lines)


def _numbers(*values: float | None) -> tuple[str, ...]:
    return tuple("–" if value is None else f"{value:.5g}" for value in values)


def drawn(all_figures: Iterable[Figure]) -> list[Figure]:
    """Those that show something."""
    return [figure for figure in all_figures if not all(is_empty(c) for _, c in figure.views)]
