"""A grid of trainings: every combination of some fields' values, one after the other.

`workers=1,2,4 algorithm=downpour,synchronous` are six runs of one description. All of them are
checked before the first one starts; each is a training of its own, in a folder named after its
values. A key that means nothing to an algorithm is left out of its runs, which are trained once. A
run that misses its target or diverges is a result; one that fails is noted and the others go on,
unless nothing can go on: Ctrl-C, a cluster that somebody else holds, a teardown that is not
complete. `grid` and `cells` are pure.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from dsgd_cli.contract.errors import (
    ClusterHeld,
    DsgdError,
    Interrupted,
    SpecError,
    TeardownIncomplete,
    UsageError,
)
from dsgd_cli.contract.options import Sandblaster
from dsgd_cli.contract.spec import ClusterSpec, Train
from dsgd_cli.launcher.collect import make_run_dir
from dsgd_cli.launcher.follow import TrainScreen
from dsgd_cli.launcher.load import Loaded
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.remote import Message
from dsgd_cli.launcher.result import Result
from dsgd_cli.launcher.train import Options, train
from dsgd_cli.reporting.write import draw, write_whole

MOST = 1000  # runs; more are a slip
COLUMNS = ("outcome", "value", "loss", "steps", "epochs", "seconds", "examples_per_second")
HEADS = ("OUTCOME", "VALUE", "LOSS", "STEPS", "EPOCHS", "SECONDS", "EXAMPLES/S")
OF_BATCHES = (("train", "optimizer"), ("train", "batch_size"))  # sandblaster has neither

Axis = tuple[str, tuple[str, ...]]  # a key as it was written, and its values
Pairs = tuple[tuple[str, str], ...]  # one value of each
Loader = Callable[[list[str]], Loaded]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the sweep, counted from 1: `values` by key, as they were written."""

    number: int
    values: Pairs
    spec: ClusterSpec
    notes: tuple[str, ...] = ()  # what the reader should know of its description

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values)

    @property
    def folder(self) -> str:
        """The name of its run directory: the number, and the label as far as it goes."""
        words = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.values]
        text = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-.")
        return f"{self.number:02}-{text[:80]}"


@dataclass(slots=True)
class Sweep:
    """What has come of it so far."""

    folder: Path
    cells: Sequence[Cell]
    summaries: list[Message] = field(default_factory=list)  # of the first cells
    errors: list[tuple[Cell, DsgdError]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    broken_off: DsgdError | None = None  # by what

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table: the values of each cell, then what it came to."""
        for cell, summary in zip(self.cells, self.summaries, strict=False):
            cells = [_cell(summary.get(column)) for column in COLUMNS]
            values = dict(cell.values)
            yield (*(values.get(key, "–") for key in self._keys()), *cells)

    def head(self) -> tuple[str, ...]:
        return (*(key.rpartition(".")[2].upper() for key in self._keys()), *HEADS)

    def _keys(self) -> list[str]:
        """All that varies, in the order in which it was given."""
        return max(([key for key, _ in cell.values] for cell in self.cells), key=len)

    def check(self) -> None:
        """Raises what broke the sweep off, else what went wrong first."""
        if self.errors:
            raise self.broken_off or self.errors[0][1]


def grid(expressions: Sequence[str]) -> list[Axis]:
    """`workers=1,2` -> its key and its values. Raises UsageError."""
    axes: list[Axis] = []
    for expression in expressions:
        name, equals, text = expression.partition("=")
        key = name.strip()
        values = tuple(value.strip() for value in _split(text))
        if not equals or not key or not all(values):
            raise UsageError(
                f"{expression}: not a list of values", remedy="write key=value,value: workers=1,2,4"
            )
        known = {full_key(other) for other, _ in axes}
        if full_key(key) in known or len(set(values)) != len(values):
            raise UsageError(f"{expression}: given twice", remedy="name each key and value once")
        axes.append((key, values))
    if not axes:
        raise UsageError("nothing varies", remedy="write key=value,value: workers=1,2,4")
    count = math.prod(len(values) for _, values in axes)
    if count > MOST:
        raise UsageError(f"{count} runs are too many: {MOST} at most")
    return axes


def cells(axes: Sequence[Axis], load: Loader) -> list[Cell]:
    """Every combination, the last key varying fastest; all mistakes at once, each with its cell."""
    made: dict[Pairs, Cell] = {}
    found: list[list[str]] = []  # the lines of each mistake, once
    wrong = 0
    for values in itertools.product(*(values for _, values in axes)):
        pairs = tuple(zip((key for key, _ in axes), values, strict=True))
        try:
            pairs, loaded = _loaded(pairs, load)
        except SpecError as error:
            if not error.details:  # there is no such file
                raise
            wrong += 1
            found += [block for block in _blocks(error.details) if block not in found]
        else:
            made.setdefault(pairs, Cell(len(made) + 1, pairs, loaded.spec, loaded.notes))
    if found:
        details = [line for block in found for line in block]
        count = math.prod(len(values) for _, values in axes)
        raise SpecError(f"{wrong} of {count} runs cannot be", details=details)
    return list(made.values())


def _loaded(pairs: Pairs, load: Loader) -> tuple[Pairs, Loaded]:
    """With the values that mean something to the algorithm: `algorithm=downpour,sandblaster
    optimizer=sgd,adagrad` are three runs, not four of which one is repeated."""
    kept = tuple(pair for pair in pairs if not _is_of_batches(pair[0]))
    if kept and len(kept) < len(pairs):
        with suppress(SpecError):  # below, with the mistakes of the other values
            loaded = load(_overrides(kept))
            if isinstance(loaded.spec.train.algorithm, Sandblaster):
                left_out = " or ".join(key for key, _ in pairs if _is_of_batches(key))
                note = f"sandblaster has no {left_out}: trained once for all of their values"
                return kept, replace(loaded, notes=(*loaded.notes, note))
    return pairs, load(_overrides(pairs))


def _is_of_batches(key: str) -> bool:
    return tuple(full_key(key).split(".")[:2]) in OF_BATCHES


def _overrides(pairs: Pairs) -> list[str]:
    return [f"{full_key(key)}={value}" for key, value in pairs]


def _blocks(lines: Sequence[str]) -> list[list[str]]:
    """Mistakes one by one: what is wrong, then the place, indented."""
    blocks: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and blocks:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def full_key(key: str) -> str:
    """`algorithm` -> `train.algorithm`: fields of a run need no prefix."""
    if "." not in key and key in Train.model_fields and key not in ClusterSpec.model_fields:
        return f"train.{key}"
    return key


def sweep(cells: Sequence[Cell], screen: TrainScreen, options: Options) -> Sweep:
    """Train them one after the other, all within the timeout. What went wrong is in `errors`."""
    name = cells[0].spec.name
    left_s = _countdown(options.timeout_s)
    made = Sweep(make_run_dir(f"{name}-sweep", options.runs), cells)
    for cell in cells:
        screen.note(f"── {cell.number}/{len(cells)}  {cell.label}")
        _write(made.folder, [*made.summaries, _running(made.folder, cell)])
        of_this = replace(options, runs=made.folder, label=cell.folder, timeout_s=left_s())
        result = train(cell.spec, screen, of_this, Phases())
        _add(made, cell, result)
        if _is_the_end(result):
            made.broken_off = result.error
            if left := len(cells) - cell.number:
                made.warnings.append(f"{left} of {len(cells)} runs were not begun")
            break
    made.warnings += draw(made.folder)
    return made


def _countdown(timeout_s: float | None) -> Callable[[], float | None]:
    """What is left of it; never nothing, which would be no timeout."""
    began_s = monotonic()
    if timeout_s is None:
        return lambda: None
    return lambda: max(0.001, timeout_s - (monotonic() - began_s))


def _add(made: Sweep, cell: Cell, result: Result) -> None:
    summary: dict[str, Any] = {**result.summary(), "sweep": dict(cell.values)}
    made.summaries.append(summary)
    made.warnings += [f"{cell.label}: {warning}" for warning in result.warnings]
    if result.error is not None:
        made.errors.append((cell, result.error))
    _write(made.folder, made.summaries)


def _running(folder: Path, cell: Cell) -> Message:
    """In place of a summary: what `dsgd report` has to know while it runs, or if we are killed."""
    run_dir = str(folder / cell.folder)
    return {"outcome": "running", "run_dir": run_dir, "sweep": dict(cell.values)}


def _write(folder: Path, entries: Sequence[Message]) -> None:
    try:
        write_whole(folder / "sweep.json", json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise DsgdError(f"{folder}: {error.strerror}") from None


def _is_the_end(result: Result) -> bool:
    """Whether the next run would only fail the same way, or is not wanted."""
    left = result.receipt is not None and bool(result.receipt.left)
    ends = (Interrupted, ClusterHeld, TeardownIncomplete)
    return left or isinstance(result.error, ends)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket and no quote."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts
