"""The figures of a report as PNG files, with matplotlib: `pip install dsgd[plot]`.

Draws the same values as `svg`. No pyplot: nothing is global and no display is asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from dsgd_cli.reporting.charts import BarChart, Chart, Figure, LineChart, StackedChart, Timeline
from dsgd_cli.reporting.page import LIGHT, VIEWS
from dsgd_cli.reporting.scale import short

INCHES, DPI = (7.2, 4.0), 130


def write_plots(figures: list[Figure], folder: Path) -> tuple[Path, ...]:
    """One file for each figure and view: `loss-by-step.png`, `staleness.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        for view, chart in figure.views:
            title = f"{figure.title} by {view}" if view in VIEWS else figure.title
            path = folder / f"{_file_name(figure.name)}{f'-by-{view}' if view else ''}.png"
            _write(chart, title, path)
            paths.append(path)
    return tuple(paths)


def _write(chart: Chart, title: str, path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=INCHES, dpi=DPI)
    axes: Any = canvas.add_axes(_room(chart))
    axes.set_title(_plain(title), fontsize=11, y=1.02)  # with y nothing is laid out to find it
    axes.set_xlabel(_plain(chart.x.title))
    axes.grid(True, alpha=0.3)
    match chart:
        case LineChart():
            _lines(axes, chart)
        case BarChart():
            _bars(axes, chart)
        case StackedChart():
            _stacked(axes, chart)
        case Timeline():
            _timeline(axes, chart)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font lacks
        canvas.savefig(path)


def _room(chart: Chart) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes: a layout engine takes longer than the drawing."""
    match chart:
        case StackedChart():
            labels = chart.categories
        case Timeline():
            labels = chart.rows
        case _:
            labels = ()
    left = max(0.11, min(0.4, 0.03 + 0.0115 * max(map(len, labels), default=0)))
    return left, 0.14, 0.97 - left, 0.77


def _lines(axes: Any, chart: LineChart) -> None:
    for line in chart.lines:
        if line.points:
            axes.plot(
                [point.x for point in line.points],
                [point.y for point in line.points],
                "--" if line.dashed else "-",
                color=_colour(line.colour),
                label=_plain(line.label),
                marker="." if len(line.points) <= 40 else None,
            )
    for mark in chart.marks:
        axes.axvline(mark.x, color=_colour(mark.colour), linestyle=":")
    axes.set_ylabel(_plain(chart.y.title))
    if chart.x.log:
        axes.set_xscale("log")
        _ticks(axes.xaxis)
    elif chart.x.whole:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.y.log:
        axes.set_yscale("log")
        _ticks(axes.yaxis)
    elif chart.y.zero:
        axes.set_ylim(bottom=0)


def _ticks(axis: Any) -> None:
    """Of a logarithmic axis, as in the page; not typeset: that is slow."""
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_minor_formatter(lambda value, _: "")


def _bars(axes: Any, chart: BarChart) -> None:
    width = 0.8 / max(1, len(chart.groups))
    for number, group in enumerate(chart.groups):
        places = [p - 0.4 + (number + 0.5) * width for p in range(len(chart.categories))]
        label = _plain(group.label)
        axes.bar(places, group.values, width * 0.94, color=_colour(group.colour), label=label)
    axes.set_xticks(range(len(chart.categories)), chart.categories, fontsize=8)
    axes.set_ylabel(_plain(chart.y.title))


def _stacked(axes: Any, chart: StackedChart) -> None:
    begun = [0.0] * len(chart.categories)
    rows = range(len(chart.categories))
    for group in chart.groups:
        axes.barh(rows, group.values, 0.7, begun, color=_colour(group.colour), label=group.label)
        begun = [at + value for at, value in zip(begun, group.values, strict=True)]
    axes.set_yticks(rows, [_plain(label) for label in chart.categories], fontsize=8)
    axes.invert_yaxis()


def _timeline(axes: Any, chart: Timeline) -> None:
    colours = [_colour(mark.colour) for mark in chart.marks]
    places = [mark.x for mark in chart.marks], [mark.row for mark in chart.marks]
    axes.scatter(*places, s=16, c=colours, alpha=0.75)
    axes.set_yticks(range(len(chart.rows)), [_plain(row) for row in chart.rows], fontsize=8)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)


def _colour(number: int) -> str:
    return LIGHT[number % len(LIGHT)]


def _plain(text: str) -> str:
    """Text in which a dollar sign is one, not the beginning of a formula."""
    return text.replace("$", r"\$")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:100]
