"""Charts as SVG text. Pure: the same chart gives the same text.

Colours are classes (`c0`, `c1`, …) that the page defines, for light and dark. Each chart has a
title and a description, each point a tooltip; a line of many points shows them under the pointer.
All text that came from a run goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsgd_cli.reporting.charts import (
    BarChart,
    Chart,
    Group,
    Line,
    LineChart,
    StackedChart,
    Timeline,
    is_empty,
)
from dsgd_cli.reporting.scale import Scale, scale, short, tight

COLOURS = 12
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 68, 18, 14, 46
ROW = 26  # of lying bars and of timelines
LETTER = 6.3  # about how wide one is at 11 px
MAX_LABEL = 32  # letters of a row's label
SHOWN_POINTS = 40  # a line of more shows them under the pointer only


def svg(chart: Chart, name: str, title: str) -> str:
    """The <svg> element; `name` is unique in the page."""
    if is_empty(chart):
        return '<p class="empty">Nothing was recorded.</p>'
    match chart:
        case LineChart():
            return _lines(chart, name, title)
        case BarChart():
            return _bars(chart, name, title)
        case StackedChart():
            return _stacked(chart, name, title)
        case Timeline():
            return _timeline(chart, name, title)


def _lines(chart: LineChart, name: str, title: str) -> str:
    points = [point for line in chart.lines for point in line.points]
    places = [point.x for point in points] + [mark.x for mark in chart.marks]
    frame = Frame(
        scale(places, log=True) if chart.x.log else tight(places, whole=chart.x.whole),
        scale([point.y for point in points], log=chart.y.log, zero=chart.y.zero),
    )
    body = [frame.grid_y(), frame.ticks_x(), frame.titles(chart.x.title, chart.y.title)]
    for mark in chart.marks:
        x = frame.x(mark.x)
        body.append(
            f'<line class="mark c{mark.colour % COLOURS}" x1="{x}" x2="{x}" y1="{TOP}"'
            f' y2="{frame.foot}">{_said(mark.said)}</line>'
        )
    body += [_line(frame, line) for line in chart.lines if line.points]
    about = f"{len(chart.lines)} lines: {chart.y.title} by {chart.x.title}."
    return _svg(name, title, about, frame.height, body)


def _line(frame: Frame, line: Line) -> str:
    places = [(frame.x(point.x), frame.y(point.y)) for point in line.points]
    colour = f"c{line.colour % COLOURS}"
    dashed = " dashed" if line.dashed else ""
    path = " ".join(f"{x},{y}" for x, y in places)
    shown = "" if len(places) <= SHOWN_POINTS else " quiet"
    radius = 2.6 if not shown else 5
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="{radius}">{_said(point.said)}</circle>'
        for (x, y), point in zip(places, line.points, strict=True)
    )
    return (
        f'<polyline class="line {colour}{dashed}" points="{path}"/>'
        f'<g class="dots {colour}{shown}">{dots}</g>'
    )


def _bars(chart: BarChart, name: str, title: str) -> str:
    values = [value for group in chart.groups for value in group.values]
    frame = Frame(Scale(0, len(chart.categories), False, ()), scale(values, zero=True))
    slot = (frame.width - LEFT - RIGHT) / len(chart.categories)
    width = slot * 0.8 / max(1, len(chart.groups))
    body = [frame.grid_y(), frame.titles(chart.x.title, chart.y.title)]
    every = _every(chart.categories, slot)
    for place, label in enumerate(chart.categories):
        if place % every == 0:
            middle = _r(LEFT + (place + 0.5) * slot)
            body.append(_text(middle, frame.foot + 16, label, "middle"))
    for number, group in enumerate(chart.groups):
        body.append(f'<g class="bar c{group.colour % COLOURS}">')
        for place, (value, said) in enumerate(zip(group.values, group.said, strict=True)):
            x = LEFT + place * slot + slot * 0.1 + number * width
            y = frame.y(value)
            if value:
                body.append(_rect(x, y, width * 0.94, frame.foot - y, said))
        body.append("</g>")
    about = f"{len(chart.categories)} bars: {chart.y.title} by {chart.x.title}."
    return _svg(name, title, about, frame.height, body)


def _every(labels: Sequence[str], slot: float) -> int:
    """So many bars share one label, so that labels do not touch."""
    widest = max(len(label) for label in labels) * LETTER + 6
    return max(1, -int(-widest // slot))


def _stacked(chart: StackedChart, name: str, title: str) -> str:
    totals = _totals(chart.groups, len(chart.categories))
    frame = _row_frame(chart.categories, scale(totals, zero=True))
    body = [frame.ticks_x(grid=True), frame.titles(chart.x.title, ""), frame.rows(chart.categories)]
    begun = [0.0] * len(chart.categories)
    for group in chart.groups:
        body.append(f'<g class="bar c{group.colour % COLOURS}">')
        for row, (value, said) in enumerate(zip(group.values, group.said, strict=True)):
            x = frame.x(begun[row])
            begun[row] += value
            if value:
                body.append(_rect(x, TOP + row * ROW + 4, frame.x(begun[row]) - x, ROW - 8, said))
        body.append("</g>")
    about = f"{len(chart.categories)} bars: {chart.x.title}."
    return _svg(name, title, about, frame.height, body)


def _totals(groups: Sequence[Group], count: int) -> list[float]:
    return [sum(group.values[row] for group in groups) for row in range(count)]


def _timeline(chart: Timeline, name: str, title: str) -> str:
    frame = _row_frame(chart.rows, tight([mark.x for mark in chart.marks]))
    body = [frame.ticks_x(grid=True), frame.titles(chart.x.title, ""), frame.rows(chart.rows)]
    for mark in chart.marks:
        x, y = frame.x(mark.x), TOP + mark.row * ROW + ROW // 2
        body.append(
            f'<circle class="dot c{mark.colour % COLOURS}" cx="{x}" cy="{y}" r="4">'
            f"{_said(mark.said)}</circle>"
        )
    about = f"{len(chart.marks)} moments in {len(chart.rows)} rows: {', '.join(chart.rows)}."
    return _svg(name, title, about, frame.height, body)


def _row_frame(labels: Sequence[str], x: Scale) -> Frame:
    widest = min(MAX_LABEL, max((len(label) for label in labels), default=0))
    left = max(LEFT, int(widest * LETTER) + 16)
    return Frame(x, scale([]), left=left, height=TOP + BOTTOM + ROW * len(labels))


class Frame:
    """Where things are in a chart: pixels from values."""

    def __init__(self, x: Scale, y: Scale, left: int = LEFT, height: int = HEIGHT) -> None:
        self._x, self._y, self._left = x, y, left
        self.width, self.height = WIDTH, height
        self.foot = height - BOTTOM

    def x(self, value: float) -> float:
        return _r(self._left + self._x.at(value) * (WIDTH - RIGHT - self._left))

    def y(self, value: float) -> float:
        return _r(self.foot - self._y.at(value) * (self.foot - TOP))

    def grid_y(self) -> str:
        parts = []
        for tick in self._y.ticks:
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{self._left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            )
            parts.append(_text(self._left - 8, y + 4, short(tick), "end"))
        return "".join(parts)

    def ticks_x(self, *, grid: bool = False) -> str:
        top, parts = TOP if grid else self.foot, []
        for tick in self._x.ticks:
            x = self.x(tick)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{self.foot + 4}"/>')
            parts.append(_text(x, self.foot + 18, short(tick), "middle"))
        return "".join(parts)

    def titles(self, x: str, y: str) -> str:
        """Below and, turned, on the left; and the line at the foot."""
        middle = (self._left + WIDTH - RIGHT) / 2
        foot = (
            f'<line class="axis" x1="{self._left}" x2="{WIDTH - RIGHT}" y1="{self.foot}"'
            f' y2="{self.foot}"/>'
        )
        below = _text(_r(middle), self.height - 8, x, "middle", "title")
        if not y:
            return foot + below
        height = _r((TOP + self.foot) / 2)
        return (
            f'{foot}{below}<text class="title" text-anchor="middle"'
            f' transform="translate(14 {height}) rotate(-90)">{escape(y)}</text>'
        )

    def rows(self, labels: Sequence[str]) -> str:
        parts = []
        for row, label in enumerate(labels):
            shown = label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}"
            parts.append(_text(self._left - 8, TOP + row * ROW + ROW // 2 + 4, shown, "end"))
        return "".join(parts)


def _svg(name: str, title: str, about: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(about)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, said: str) -> str:
    return (
        f'<rect x="{_r(x)}" y="{_r(y)}" width="{_r(max(0.5, width))}"'
        f' height="{_r(max(0.5, height))}">{_said(said)}</rect>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _said(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _r(value: float) -> float:
    return round(value, 1)
