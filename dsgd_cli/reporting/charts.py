"""What can be drawn: values that `figures` makes and that `svg` and `png` draw as they are.

`colour` counts from 0 and means the same run (or worker, shard, part, line of a sweep) in every
chart of a page. The text `said` of a point is its tooltip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Axis:
    """What is along an edge, with its unit."""

    title: str
    log: bool = False
    zero: bool = False  # begins at 0
    whole: bool = False  # of things that are counted: there is nothing between 1 and 2


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    said: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    colour: int
    points: tuple[Point, ...]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment on the x axis."""

    x: float
    colour: int
    said: str


@dataclass(frozen=True, slots=True)
class LineChart:
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """One bar in each category, all of one colour."""

    label: str
    colour: int
    values: tuple[float, ...]
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BarChart:
    """Groups of upright bars beside each other."""

    x: Axis
    y: Axis
    categories: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class StackedChart:
    """A lying bar for each category, made of one piece of each group."""

    x: Axis
    categories: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class RowMark:
    row: int
    x: float
    colour: int
    said: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Moments, in a row for each kind."""

    x: Axis
    rows: tuple[str, ...]
    marks: tuple[RowMark, ...]


Chart: TypeAlias = LineChart | BarChart | StackedChart | Timeline


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend."""

    label: str
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, or the same one over different axes, with what explains it."""

    name: str  # of its file and its anchor
    title: str
    views: tuple[tuple[str, Chart], ...]  # (step | epoch | second, chart); ("", chart): no choice
    legend: tuple[Key, ...]
    note: str = ""
    head: tuple[str, ...] = ()  # of the table of its numbers
    rows: tuple[tuple[str, ...], ...] = ()


def is_empty(chart: Chart) -> bool:
    """Whether there is nothing to be seen in it."""
    match chart:
        case LineChart():
            return not any(line.points for line in chart.lines)
        case Timeline():
            return not chart.marks
        case _:
            return not any(any(group.values) for group in chart.groups)
