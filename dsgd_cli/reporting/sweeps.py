"""How the runs of a sweep compare along a key that it varied: time to a target, and speed. Pure.

One line for each combination of the other keys. Runs that differ in nothing but their seed are
repetitions: what is drawn is their median.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dsgd_cli.reporting import series
from dsgd_cli.reporting.charts import Axis, Figure, Key, Line, LineChart, Point
from dsgd_cli.reporting.runs import Run
from dsgd_cli.reporting.scale import short, spans_decades
from dsgd_cli.reporting.series import Sample

SEED = "seed"
WORKERS = ("workers", "workers.count")  # so many times as many should be so many times as fast
NO_RESULT = ("diverged", "failed", "timeout")  # outcomes of runs that no level is chosen for
IDEAL, GREY = "ideal", 7

Metrics = Mapping[str, list[Sample]]
Curves = dict[str, dict[float, float]]  # label of a line -> value of the key -> what is drawn there


@dataclass(frozen=True, slots=True)
class Goal:
    """The levels of metrics that runs are timed to, and where they are from, in words."""

    levels: Mapping[str, float]
    note: str

    def reached_s(self, metrics: Metrics) -> float | None:
        """The first evaluation, in seconds, at which all levels held."""
        held = [
            {each.seconds for each in metrics.get(name, ()) if _holds(name, each.value, level)}
            for name, level in self.levels.items()
        ]
        return min(set.intersection(*held), default=None) if held else None

    def __str__(self) -> str:
        return ", ".join(f"{name} {level:.4g}" for name, level in self.levels.items())


def sweep_figures(runs: Sequence[Run], measured: Sequence[Metrics]) -> list[Figure]:
    """Two figures for each key whose values are numbers; none where nothing was varied."""
    goal = the_goal(runs, measured)
    times = [goal.reached_s(metrics) for metrics in measured]
    speeds = [series.number(run.summary.get("examples_per_second")) or None for run in runs]
    return [
        figure
        for key in numeric_keys(runs)
        for figure in (_seconds(runs, key, times, goal), _speed_up(runs, key, speeds))
    ]


def numeric_keys(runs: Sequence[Run]) -> list[str]:
    """Those that were varied over at least two numbers, and over nothing else."""
    found: dict[str, set[float | None]] = {}
    for run in runs:
        for key, value in run.varied.items():
            found.setdefault(key, set()).add(_number(value))
    return [
        key for key, all_ in found.items() if key != SEED and None not in all_ and len(all_) > 1
    ]


def the_goal(runs: Sequence[Run], measured: Sequence[Metrics]) -> Goal:
    """The target, if the runs have one and one of them reached it; else the best level that all
    reached.

    Runs that came to nothing are not asked.
    """
    asked = [
        (_target(run), metrics)
        for run, metrics in zip(runs, measured, strict=True)
        if metrics and run.ended and run.summary["outcome"] not in NO_RESULT
    ]
    if not asked:
        return Goal({}, "")
    target = asked[0][0]
    goal = Goal(target, "To the first evaluation that reached the target.")
    same = all(other == target for other, _ in asked)
    if target and same and any(goal.reached_s(metrics) is not None for _, metrics in asked):
        return goal
    judged = all("accuracy" in metrics for _, metrics in asked)
    name = next(iter(target), "accuracy" if judged else "loss")
    best = [_best(name, metrics[name]) for _, metrics in asked if name in metrics]
    if not best:
        return Goal({}, "")
    why = f" None reached the target, {goal}." if target and same else ""
    level = min(best) if name == "accuracy" else max(best)
    return Goal({name: level}, f"To the first evaluation that reached what all did at best.{why}")


def _target(run: Run) -> dict[str, float]:
    told = run.summary.get("target")
    given = told if isinstance(told, Mapping) else {}
    levels = {name: series.number(given.get(name)) for name in ("accuracy", "loss")}
    return {name: level for name, level in levels.items() if level is not None}


def _best(name: str, samples: Sequence[Sample]) -> float:
    values = [sample.value for sample in samples]
    return max(values) if name == "accuracy" else min(values)


def _holds(name: str, value: float, level: float) -> bool:
    return value >= level if name == "accuracy" else value <= level


# ── the two figures ────────────────────────────────────────────────────────────────────────────


def _seconds(runs: Sequence[Run], key: str, times: Sequence[float | None], goal: Goal) -> Figure:
    curves = _curves(runs, key, times)
    lines = _lines(curves, lambda label, x, y: f"{_at(label, key, x)}: {y:.3g} s")
    log = spans_decades([y for points in curves.values() for y in points.values()])
    unit = f"seconds to {goal}" if goal.levels else "seconds"
    missed = [r.name for r, s in zip(runs, times, strict=True) if s is None and key in r.varied]
    notes = (goal.note, f"Left out: {', '.join(missed)}." if missed else "", _of_seeds(runs))
    return Figure(
        f"seconds-by-{key}",
        f"Seconds to the target by {key}",
        (("", LineChart(_x_axis(key, curves), Axis(unit, log=log, zero=True), lines)),),
        _legend(lines),
        " ".join(filter(None, notes)),
        ("runs", key, unit),
        tuple((label, f"{x:g}", f"{y:.5g}") for label, x, y in _flat(curves)),
    )


def _speed_up(runs: Sequence[Run], key: str, speeds: Sequence[float | None]) -> Figure:
    curves = _curves(runs, key, speeds)
    ratios = {label: _relative(points) for label, points in curves.items()}

    def said(label: str, x: float, times: float) -> str:
        return (
            f"{_at(label, key, x)}: {times:.3g} times as fast\n{short(curves[label][x])} examples/s"
        )

    lines = (*_lines(ratios, said), *_ideal(key, ratios))
    return Figure(
        f"speed-up-by-{key}",
        f"Speed-up by {key}",
        (("", LineChart(_x_axis(key, ratios), Axis("times as fast", zero=True), lines)),),
        _legend(lines),
        f"Examples per second, relative to the first point of each line. {_of_seeds(runs)}".strip(),
        ("runs", key, "examples/s", "times as fast"),
        tuple(
            (label, f"{x:g}", f"{curves[label][x]:.5g}", f"{times:.3g}")
            for label, x, times in _flat(ratios)
        ),
    )


def _curves(runs: Sequence[Run], key: str, values: Sequence[float | None]) -> Curves:
    """The medians, from the smallest value of the key on. A line may be without any point."""
    found: dict[str, dict[float, list[float]]] = {}
    for run, value in zip(runs, values, strict=True):
        x = _number(run.varied.get(key, ""))
        if x is None:
            continue
        others = (f"{k}={v}" for k, v in run.varied.items() if k not in (key, SEED))
        points = found.setdefault(" ".join(others), {})
        if value is not None:
            points.setdefault(x, []).append(value)
    return {
        label: {x: median(all_) for x, all_ in sorted(points.items())}
        for label, points in found.items()
    }


def _relative(points: Mapping[float, float]) -> dict[float, float]:
    """Each as a multiple of the first."""
    return {x: y / next(iter(points.values())) for x, y in points.items()}


def _lines(curves: Curves, said: Callable[[str, float, float], str]) -> tuple[Line, ...]:
    return tuple(
        Line(label, colour, tuple(Point(x, y, said(label, x, y)) for x, y in points.items()))
        for colour, (label, points) in enumerate(curves.items())
    )


def _ideal(key: str, ratios: Curves) -> tuple[Line, ...]:
    """Twice as many workers, twice as fast. Of nothing else is that to be hoped."""
    places = _places(ratios)
    if key not in WORKERS or len(places) < 2 or places[0] <= 0:
        return ()
    points = tuple(Point(x, x / places[0], f"{IDEAL}: {x / places[0]:.3g}") for x in places)
    return (Line(IDEAL, GREY, points, dashed=True),)


def _x_axis(key: str, curves: Curves) -> Axis:
    """From 0 for workers, so that the ideal is a straight line."""
    places = _places(curves)
    log = key not in WORKERS and spans_decades(places)
    return Axis(key, log=log, zero=not log, whole=all(place.is_integer() for place in places))


def _places(curves: Curves) -> list[float]:
    return sorted({x for points in curves.values() for x in points})


def _legend(lines: Sequence[Line]) -> tuple[Key, ...]:
    """A single line needs none."""
    if len(lines) == 1:
        return ()
    return tuple(Key(line.label or "measured", line.colour, line.dashed) for line in lines)


def _flat(curves: Curves) -> list[tuple[str, float, float]]:
    return [(label, x, y) for label, points in curves.items() for x, y in points.items()]


def _at(label: str, key: str, x: float) -> str:
    return f"{label} {key}={x:g}".strip()


def _of_seeds(runs: Sequence[Run]) -> str:
    seeds = {run.varied[SEED] for run in runs if SEED in run.varied}
    return f"Medians over {len(seeds)} seeds." if len(seeds) > 1 else ""


def _number(text: str) -> float | None:
    """The finite number that somebody wrote as a value, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
