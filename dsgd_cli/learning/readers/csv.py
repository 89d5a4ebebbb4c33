"""Tables of text: one example a row, its label in one of the columns."""

from __future__ import annotations

import csv as csv_format
import itertools
import re
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import Dataset, class_numbers, hold_out
from dsgd_cli.learning.pixels import Array

MOST_OF_NAMES = 1 << 16  # characters of all columns' names
NO_NUMBER = re.compile(r"could not convert string (.*) to float64 at row \d+, column (\d+)", re.S)
OTHER_LENGTH = re.compile(r"the number of columns changed from (\d+) to (\d+)")


Column = str | int  # by its name, or its position, from the end if it is negative


def csv(
    path: Path,
    label: Column = -1,
    ignore: Sequence[Column] = (),
    delimiter: str = ",",
    test_fraction: float = 0.2,
) -> Dataset:
    """One example a row; a first row with text where the others have numbers names the columns.

    `label` is the name or the position of the label's column, by default the last. Labels that are
    whole numbers become class numbers as they are; texts are numbered in alphabetical order; other
    numbers stay as they are. Columns that are to be ignored may hold anything.
    """
    head = _inspect(path, label, ignore, delimiter)
    x, y, classes = _examples(path, head, delimiter)
    found = hold_out(path.name, x, y, test_fraction)
    assert head.label is not None
    label = head.header[head.label] if head.features else ""
    return replace(found, classes=classes, columns=head.features, label=label)


def csv_without_labels(
    path: Path, ignore: Sequence[Column] = (), delimiter: str = ","
) -> tuple[Array, tuple[str, ...]]:
    """x alone, as every column is a feature, and their names."""
    head = _inspect(path, None, ignore, delimiter)
    numbers = _numbers(path, head, _table(path, head, delimiter, None))
    return head.without(numbers), head.features


def csv_names(path: Path, ignore: Sequence[Column] = (), delimiter: str = ",") -> list[str]:
    """What the first row calls the columns; nothing if it does not."""
    positions = [each for each in ignore if isinstance(each, int)]
    return _inspect(path, None, positions, delimiter).header


@dataclass(frozen=True, slots=True)
class _Head:
    """What the first two rows say."""

    line: int  # of the names; 0: there are none
    names: list[str]
    label: int | None  # the column's position; None: no column is the label's
    ignored: frozenset[int]
    texts: bool  # labels are texts

    @property
    def header(self) -> list[str]:
        return self.names if self.line else []

    @property
    def features(self) -> tuple[str, ...]:
        """The names of x's columns; none where they do not tell columns apart, or are more than a
        run should carry along."""
        names = tuple(name for at, name in enumerate(self.header) if at not in self._no_features)
        apart = "" not in names and len(set(names)) == len(names)
        return names if apart and sum(map(len, names)) <= MOST_OF_NAMES else ()

    @property
    def _no_features(self) -> frozenset[int]:
        return self.ignored if self.label is None else self.ignored | {self.label}

    def without(self, numbers: Array) -> Array:
        """x of all columns."""
        others = sorted(self._no_features)
        return np.delete(numbers, others, axis=1) if others else numbers

    def column(self, position: int) -> str:
        name = self.header[position] if position < len(self.header) else ""
        return f"column {name!r}" if name else f"column {position + 1}"


def _inspect(path: Path, label: Column | None, ignore: Sequence[Column], delimiter: str) -> _Head:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.reader(file, delimiter=delimiter)
            rows = (row for row in reader if delimiter.join(row).strip())
            first = next(rows, [])
            line = reader.line_num
            second = next(rows, None)
    except (OSError, UnicodeDecodeError, csv_format.Error) as error:
        raise UserCodeError(f"{path.name}: not a readable .csv file: {error}") from error
    if not first:
        raise UserCodeError(f"{path.name}: the file is empty")
    if len(first) < 2 and label is not None:
        raise UserCodeError(
            f"{path.name}: one column is not enough for examples and labels",
            remedy=f"is {delimiter!r} the delimiter?",
        )
    if second is not None and len(second) != len(first):
        raise UserCodeError(
            f"{path.name}: the first row has {len(first)} cells, the second {len(second)}"
        )
    names = [cell.strip() for cell in first]
    column = None if label is None else _column(path, label, names)
    ignored = frozenset(_column(path, each, names) for each in ignore)
    if column in ignored:
        raise UserCodeError(f"{path.name}: the label's column {label!r} is to be ignored")
    if len(ignored) + (column is not None) == len(names):
        raise UserCodeError(f"{path.name}: no column is left that would be a feature")
    named = any(isinstance(each, str) for each in (label, *ignore))
    header = named or _is_header(first, second, column, ignored)
    texts = column is not None and not _is_number((second or first)[column])
    return _Head(line if header else 0, names, column, ignored, texts)


def _is_header(
    first: Sequence[str],
    second: Sequence[str] | None,
    label: int | None,
    ignored: Collection[int],
) -> bool:
    """Whether it has text where the next one has numbers; if it is alone, where numbers belong."""
    cells = [(at, cell) for at, cell in enumerate(first) if at not in ignored]
    if second is None:
        return any(not _is_number(cell) for at, cell in cells if at != label)
    return any(not _is_number(cell) and _is_number(second[at]) for at, cell in cells)


def _column(path: Path, label: Column, names: list[str]) -> int:
    if isinstance(label, str):
        if label not in names:
            remedy = f"the columns are {', '.join(names)}"
            if all(map(_is_number, names)):
                remedy = "the first row has numbers, no names: give the column's position"
            raise UserCodeError(f"{path.name}: no column {label!r}", remedy=remedy)
        return names.index(label)
    if not -len(names) <= label < len(names):
        raise UserCodeError(f"{path.name}: no column {label}, it has {len(names)}")
    return label % len(names)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _lines(path: Path, head: _Head) -> Generator[tuple[int, str], None, None]:
    """(number, text) of the rows below the header."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if number > head.line and line.strip():
                yield number, line


def _examples(path: Path, head: _Head, delimiter: str) -> tuple[Array, Array, tuple[str, ...]]:
    """x as float32, labels, and what the labels are called, if they are texts."""
    classes: dict[str, int] = {}
    table = _table(path, head, delimiter, classes if head.texts else None)
    numbers = _numbers(path, head, table)
    assert head.label is not None
    y = _labels(table[:, head.label], classes)
    del table  # twice as large as x, of which there will be copies
    return head.without(numbers), y, tuple(sorted(classes))


def _numbers(path: Path, head: _Head, table: Array) -> Array:
    """The table as float32."""
    with np.errstate(over="ignore"):  # infinity, which is refused
        numbers: Array = table.astype(np.float32)
    _check_finite(path, head, numbers, table)
    return numbers


def _table(path: Path, head: _Head, delimiter: str, classes: dict[str, int] | None) -> Array:
    """All rows as float64; with `classes`, texts of the label's column are numbered there."""
    number = 0

    def texts() -> Generator[str, None, None]:
        nonlocal number
        for at, line in _lines(path, head):
            number = at
            yield line

    def numbered(text: str) -> float:
        assert classes is not None
        return classes.setdefault(text.strip(), len(classes))

    converters: dict[int | str, Callable[[str], Any]] = dict.fromkeys(head.ignored, lambda _: 0.0)
    if classes is not None and head.label is not None:
        converters[head.label] = numbered
    rows = texts()
    try:
        if (first := next(rows, None)) is None:
            raise UserCodeError(f"{path.name}: there are no rows below the header")
        return np.loadtxt(
            itertools.chain([first], rows),
            delimiter=delimiter,
            comments=None,
            quotechar='"',
            converters=converters or None,
            encoding=None,
            ndmin=2,
        )
    except UnicodeDecodeError as error:
        raise UserCodeError(f"{path.name}: not a readable .csv file: {error}") from error
    except (OSError, ValueError) as error:  # numpy reads line by line: the last one is the bad one
        what, remedy = _what(str(error), head, number)
        raise UserCodeError(f"{path.name}:{number}: {what}", remedy=remedy) from error
    finally:
        rows.close()


def _what(said: str, head: _Head, number: int) -> tuple[str, str]:
    """numpy's sentence, in the words of the table, and the remedy."""
    remedy = "every cell must be a number"
    if found := NO_NUMBER.match(said):
        at = int(found[2]) - 1
        if number == 1:
            remedy += "; if the first row names the columns, say which is the label: label: NAME"
        elif at != head.label:
            ignore = head.header[at] if at < len(head.header) else at
            remedy += f", or the column left out: ignore: [{ignore}]"
        return f"{head.column(at)}: {found[1]} is not a number", remedy
    if found := OTHER_LENGTH.match(said):
        return f"the row has {found[2]} cells, those above have {found[1]}", remedy
    return said.split(" at row")[0].split(";")[0], remedy


def _check_finite(path: Path, head: _Head, numbers: Array, table: Array) -> None:
    """Names the first cell that is not finite, or not as float32."""
    finite = np.isfinite(numbers)
    if finite.all():
        return
    row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
    line, _ = next(itertools.islice(_lines(path, head), int(row), None))
    raise UserCodeError(
        f"{path.name}:{line}: {head.column(int(column))}: {table[row, column]:g} is not finite"
        " as float32",
        remedy="replace it, or leave the row out",
    )


def _labels(y: Array, classes: dict[str, int]) -> Array:
    """Class numbers: of texts in alphabetical order. Numbers that are not whole stay."""
    if classes:
        places = {number: place for place, (_, number) in enumerate(sorted(classes.items()))}
        return np.array([places[number] for number in range(len(classes))])[y.astype(np.int64)]
    return class_numbers(y)
