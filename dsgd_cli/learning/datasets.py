"""Data sets: two pairs of arrays, one to train on and one held out.

Invariant: every worker that reads the same source has the same examples in the same order, so a
task can be a range of positions; where a part is held out here, the split does not depend on the
run's seed or on numpy's version (RandomState's stream is frozen). Arrays are read once and kept.
"""

from __future__ import annotations

import csv as csv_format
import hashlib
import itertools
import zipfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError

Array: TypeAlias = NDArray[Any]

DIGITS = Path(__file__).parent / "data" / "digits.npz"
DIGITS_HELD_OUT = 360
SPLIT_SEED = 20


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """x, y: the training set; x_test, y_test: held out. Examples are along the first axis."""

    name: str
    x: Array
    y: Array
    x_test: Array
    y_test: Array

    @property
    def examples(self) -> int:
        return len(self.x)

    def example(self, size: int) -> tuple[Array, Array]:
        """The batch for `init`: the first examples, and each integer label at least once."""
        rows = np.arange(min(size, self.examples))
        if self.y.ndim == 1 and self.y.dtype.kind in "iu":
            _, firsts = np.unique(self.y, return_index=True)
            rows = np.unique(np.concatenate([rows, firsts]))
        return self.x[rows], self.y[rows]

    def as_dtype(self, dtype: str) -> Dataset:
        """Floats in the run's dtype; integers and booleans stay. Copies only what it must."""

        def cast(array: Array) -> Array:
            if array.dtype.kind != "f" or array.dtype == dtype:
                return array
            with np.errstate(over="ignore"):
                made = array.astype(dtype)
            if not np.isfinite(made).all():
                raise UserCodeError(f"{self.name}: a number is too large for {dtype}")
            return made

        return replace(
            self,
            x=cast(self.x),
            y=cast(self.y),
            x_test=cast(self.x_test),
            y_test=cast(self.y_test),
        )

    def digest(self) -> str:
        """Equal where shapes, dtypes and every number are equal."""
        hashed = hashlib.sha256()
        for array in (self.x, self.y, self.x_test, self.y_test):
            hashed.update(f"{array.dtype.str}{array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).view(np.uint8).data)
        return hashed.hexdigest()


def digits() -> Dataset:
    """UCI handwritten digits: 1,437 + 360 images of 8x8 grey values from 0 to 1, ten classes."""
    with np.load(DIGITS, allow_pickle=False) as arrays:
        x = arrays["x"].astype(np.float32) / np.float32(16)
        y = arrays["y"].astype(np.int64)
    return _split("digits", x, y, DIGITS_HELD_OUT)


def npz(path: Path, test_fraction: float = 0.2) -> Dataset:
    """Arrays x and y, and x_test and y_test; without them `test_fraction` of x is held out."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise ValueError("it holds one array without a name")
            found = {name: arrays[name] for name in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserCodeError(
            f"{path.name}: not a readable .npz file: {error}",
            remedy="write it with numpy.savez(path, x=..., y=...); numbers only, no objects",
        ) from error
    for name in ("x", "y"):
        if name not in found:
            raise UserCodeError(
                f"{path.name}: no array {name!r}; it has {', '.join(found) or 'none'}",
                remedy="write it with numpy.savez(path, x=..., y=...)",
            )
    if ("x_test" in found) != ("y_test" in found):
        raise UserCodeError(f"{path.name}: only one of x_test and y_test is there")
    if "x_test" in found:
        return Dataset(path.name, found["x"], found["y"], found["x_test"], found["y_test"])
    return hold_out(path.name, found["x"], found["y"], test_fraction)


def csv(
    path: Path, label: str | int = -1, delimiter: str = ",", test_fraction: float = 0.2
) -> Dataset:
    """One example a row; a first row with text where the others have numbers names the columns.

    `label` is the name or the position of the label's column, by default the last. Labels that are
    whole numbers become class numbers as they are; texts are numbered in alphabetical order; other
    numbers stay as they are.
    """
    header, column, texts = _inspect(path, label, delimiter)
    classes: dict[str, int] = {}
    table = _table(path, header, delimiter, column, classes if texts else None)
    with np.errstate(over="ignore"):  # infinity, which is refused
        x = np.delete(table, column, axis=1).astype(np.float32)
    y = _labels(table[:, column], classes)
    return hold_out(path.name, x, y, test_fraction)


# A factory's keyword arguments (but the path) are the options in the YAML.
DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits}
READERS: dict[str, Callable[..., Dataset]] = {"npz": npz, "csv": csv}


def hold_out(name: str, x: Array, y: Array, fraction: float) -> Dataset:
    """A data set of which a random part, always the same, is held out."""
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise UserCodeError(f"{name}: x has shape {x.shape}, y has shape {y.shape}")
    held_out = round(len(x) * fraction)
    if not 0 < held_out < len(x):
        raise UserCodeError(
            f"{name}: {len(x)} examples are too few to hold out {fraction:g} of them",
            remedy="give x_test and y_test, or another test_fraction",
        )
    return _split(name, x, y, held_out)


def _split(name: str, x: Array, y: Array, held_out: int) -> Dataset:
    order = np.random.RandomState(SPLIT_SEED).permutation(len(x))
    train, test = order[held_out:], order[:held_out]
    return Dataset(name, x[train], y[train], x[test], y[test])


def _inspect(path: Path, label: str | int, delimiter: str) -> tuple[int, int, bool]:
    """(the header's line or 0, the label's column, labels are texts), from the first two rows."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.reader(file, delimiter=delimiter)
            rows = (row for row in reader if row)
            first = next(rows, [])
            line = reader.line_num
            second = next(rows, first)
    except (OSError, UnicodeDecodeError, csv_format.Error) as error:
        raise UserCodeError(f"{path.name}: not a readable .csv file: {error}") from error
    if not first:
        raise UserCodeError(f"{path.name}: the file is empty")
    if len(first) < 2:
        raise UserCodeError(f"{path.name}: one column is not enough for examples and labels")
    if len(second) != len(first):
        raise UserCodeError(
            f"{path.name}: the first row has {len(first)} cells, the second {len(second)}"
        )
    column = _column(path, label, [cell.strip() for cell in first])
    texts = not _is_number(second[column])
    header = isinstance(label, str) or (not texts and not _is_number(first[column]))
    header = header or any(not _is_number(cell) for cell in _without(first, column))
    return (line if header else 0), column, texts


def _column(path: Path, label: str | int, names: list[str]) -> int:
    if isinstance(label, str):
        if label not in names:
            raise UserCodeError(
                f"{path.name}: no column {label!r}", remedy=f"the columns are {', '.join(names)}"
            )
        return names.index(label)
    if not -len(names) <= label < len(names):
        raise UserCodeError(f"{path.name}: no column {label}, it has {len(names)}")
    return label % len(names)


def _without(row: list[str], column: int) -> list[str]:
    return row[:column] + row[column + 1 :]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _table(
    path: Path, header: int, delimiter: str, column: int, classes: dict[str, int] | None
) -> Array:
    """All rows as float64; with `classes`, texts of the label's column are numbered there."""
    number = 0

    def lines() -> Generator[str, None, None]:
        nonlocal number
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if number > header and line.strip():
                    yield line

    def numbered(text: str) -> float:
        assert classes is not None
        return classes.setdefault(text.strip(), len(classes))

    rows = lines()
    try:
        if (first := next(rows, None)) is None:
            raise UserCodeError(f"{path.name}: there are no rows below the header")
        return np.loadtxt(
            itertools.chain([first], rows),
            delimiter=delimiter,
            comments=None,
            quotechar='"',
            converters=None if classes is None else {column: numbered},
            encoding=None,
            ndmin=2,
        )
    except (OSError, ValueError) as error:  # numpy reads line by line: the last one is the bad one
        what = str(error).split(" at row")[0].split(";")[0]
        raise UserCodeError(
            f"{path.name}:{number}: {what}", remedy="every cell must be a number"
        ) from error
    finally:
        rows.close()


def _labels(y: Array, classes: dict[str, int]) -> Array:
    """Class numbers: of texts in alphabetical order. Numbers that are not whole stay."""
    if classes:
        places = {number: place for place, (_, number) in enumerate(sorted(classes.items()))}
        return np.array([places[number] for number in range(len(classes))])[y.astype(np.int64)]
    whole = np.isfinite(y).all() and (y == np.rint(y)).all() and np.abs(y).max() < 2**53
    return y.astype(np.int64) if whole else y.astype(np.float32)
