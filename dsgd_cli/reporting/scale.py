"""Where a number is on an axis, which ticks the axis has, and how numbers are written. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEPS = (1, 2, 2.5, 5, 10)
LOG_FROM = 20.0  # a span of values by this factor is shown on a logarithmic axis
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` along 0 to 1."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """0 at `low`, 1 at `high`; what is not on a logarithmic axis is at its foot."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def spans_decades(values: list[float]) -> bool:
    """Whether the values are better shown on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM


def scale(
    values: list[float],
    *,
    log: bool = False,
    zero: bool = False,
    whole: bool = False,
    count: int = 5,
) -> Scale:
    """An axis with round ends on which all values are; `whole`: ticks are whole numbers."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log and low > 1e-300:
        return _log_scale(low, high)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        margin = abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - margin), high + margin
    step = _round_step((high - low) / count, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(_clean(place * step) for place in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], False, ticks)


def tight(values: list[float], *, whole: bool = False, count: int = 6) -> Scale:
    """An axis from 0 (or the least value) to exactly the greatest, with round ticks inside."""
    wide = scale(values, zero=min(values, default=0.0) >= 0, whole=whole, count=count)
    high = max(values, default=1.0)
    if high <= wide.low:
        return wide
    return Scale(wide.low, high, False, tuple(t for t in wide.ticks if t <= high * (1 + 1e-9)))


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    decades = range(first, last + 1, every)
    within = (1, 2, 5) if last - first <= 2 else (1,)
    all_ticks = [_clean(times * 10.0**power) for power in decades for times in within]
    high = max(high, low * 1.1)
    start = max((tick for tick in all_ticks if tick <= low * (1 + 1e-9)), default=10.0**first)
    end = min((tick for tick in all_ticks if tick >= high * (1 - 1e-9)), default=10.0**last)
    return Scale(start, end, True, tuple(t for t in all_ticks if start <= t <= end))


def _round_step(least: float, whole: bool) -> float:
    if whole:
        least = max(least, 1.0)
    power = 10.0 ** math.floor(math.log10(least))
    steps = [times * power for times in STEPS if not whole or (times * power).is_integer()]
    return next(step for step in steps if step >= least * (1 - 1e-9))


def _clean(value: float) -> float:
    """Without the last bits that make 0.30000000000000004 of 0.3."""
    return float(f"{value:.12g}")


def short(value: float) -> str:
    """`41.2k`, `0.0907`, `3`: at most four digits that count."""
    if value == 0:
        return "0"
    size = abs(value)
    for factor, unit in _SIZES:
        if size >= factor and size >= 1e4:
            return f"{value / factor:.4g}{unit}"
    if size < 1e-4:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:.4g}"
