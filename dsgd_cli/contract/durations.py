"""Durations and counts as people write them: `15s`, `10m`, `1.5h`, `1h30m`, `2 epochs`.

Pure text to numbers and back; a plain number is seconds. What is not clear is refused, never
guessed: `22:30` could be minutes or hours, so neither is taken.
"""

from __future__ import annotations

import re

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Longer names are accepted in `evaluate.every`, where `5 epochs` reads like a sentence.
UNITS = {"epoch": "epoch", "epochs": "epoch", "step": "step", "steps": "step"}
MAX_CHARACTERS = 64
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)\s*")
_COUNT = re.compile(r"([0-9]{1,12})\s*([a-z]+)")


def parse_duration(text: str) -> float:
    """`1h30m` -> 5400.0. Raises ValueError with a suggestion as its text."""
    rest, seconds = text.strip(), 0.0
    if not rest or len(rest) > MAX_CHARACTERS:
        raise ValueError("write a number with a unit, such as 15s, 10m, 1h")
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", rest):
        return float(rest)
    clock = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,2})(:([0-9]{1,2}))?", rest)
    if clock is not None:
        first, second, third = clock[1], clock[2], clock[4]
        if third is not None:
            raise ValueError(f"write {int(first)}h{int(second)}m{int(third)}s")
        raise ValueError(
            f"write {int(first)}m{int(second)}s, or {int(first)}h{int(second)}m for hours"
        )
    while rest:
        part = _PART.match(rest)
        if part is None:
            raise ValueError("write a number with a unit, such as 15s, 10m, 1h")
        seconds += float(part[1]) * SECONDS[part[2]]
        rest = rest[part.end() :]
    return seconds


def format_duration(seconds: float) -> str:
    """5400 -> `1h30m`; the inverse of `parse_duration` to the millisecond."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    parts = []
    for unit in ("d", "h", "m", "s"):
        count, whole = divmod(whole, int(SECONDS[unit]))
        if count:
            parts.append(f"{count}{unit}")
    if milliseconds:
        parts.append(f"{milliseconds}ms")
    return "".join(parts) or "0s"


def parse_every(text: str) -> tuple[float, str]:
    """`1 epoch`, `500 steps`, `30s` -> (1.0, "epoch"), (500.0, "step"), (30.0, "s")."""
    match = _COUNT.fullmatch(text.strip())
    if match is not None and match[2] in UNITS:
        return float(match[1]), UNITS[match[2]]
    try:
        return parse_duration(text), "s"
    except ValueError:
        raise ValueError("write 1 epoch, 500 steps or 30s") from None
