"""Sparse text as SVMlight and LIBSVM have it: `label index:value index:value  # comment`.

What is not written is 0. The arrays are dense, because gradients and parameters are.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import Dataset, class_numbers, hold_out
from dsgd_cli.learning.pixels import Array

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_DENSE_BYTES = 8 << 30
FORM = "a line is `label index:value index:value …`, with ascending indices"


def svmlight(
    path: Path,
    features: int | None = None,
    zero_based: bool | None = None,
    test_fraction: float = 0.2,
) -> Dataset:
    """One example a line. Indices count from 1, or from 0 if `zero_based`; where that is None, from
    0 if an index 0 is found.

    `features` is the number of columns, by default as many as the largest index needs. Labels that
    are whole numbers become class numbers as they are, but for -1 and 1, which become 0 and 1.
    """
    rows = _Rows()
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                _take(rows, line.partition("#")[0].split(), f"{path.name}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserCodeError(
            f"{path.name}: not a readable file of SVMlight's format: {error}", remedy=FORM
        ) from error
    if not rows.labels:
        raise UserCodeError(f"{path.name}: there are no examples", remedy=FORM)
    y = class_numbers(np.array(rows.labels))
    if y.dtype.kind == "i" and np.array_equal(np.unique(y), [-1, 1]):
        y = (y + 1) // 2
    x = _dense(rows, features, zero_based, path.name)
    return hold_out(path.name, x, y, test_fraction)


class _Rows:
    """What was read: of each example how many values, and of each value where it is."""

    def __init__(self) -> None:
        self.labels = array("d")
        self.lengths = array("q")
        self.indices = array("q")
        self.values = array("f")
        self.last = (-1, "")  # the largest index, and where it is
        self.zero = ""  # where the first index 0 is


def _take(rows: _Rows, words: list[str], where: str) -> None:
    if not words:
        return
    rows.labels.append(_number(words[0], "label", where))
    before, length = -1, 0
    for word in words[1:]:
        name, colon, text = word.partition(":")
        if name == "qid" and colon:
            continue  # of a ranking: nothing here ranks
        if not (colon and name.isascii() and name.isdecimal() and len(name) < 10):
            raise UserCodeError(f"{where}: {word[:40]!r} is not index:value", remedy=FORM)
        index = int(name)
        if index <= before:
            raise UserCodeError(
                f"{where}: index {index} comes after {before}; indices must ascend", remedy=FORM
            )
        rows.indices.append(index)
        rows.values.append(_number(text, f"value of index {index}", where))
        before, length = index, length + 1
        if index == 0 and not rows.zero:
            rows.zero = where
    rows.lengths.append(length)
    if before > rows.last[0]:
        rows.last = (before, where)


def _number(text: str, what: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise UserCodeError(
            f"{where}: {what}: {text[:40]!r} is not a number", remedy=FORM
        ) from None
    if not -FLOAT32_MAX <= number <= FLOAT32_MAX:
        raise UserCodeError(f"{where}: {what}: {text[:40]} is not finite as float32")
    return number


def _dense(rows: _Rows, features: int | None, zero_based: bool | None, name: str) -> Array:
    indices = np.array(rows.indices)
    largest, where = rows.last
    if zero_based is False and rows.zero:
        remedy = "remove `zero_based: false`"
        raise UserCodeError(f"{rows.zero}: index 0, but they count from 1", remedy=remedy)
    if zero_based is None:
        zero_based = bool(rows.zero) or not len(indices)
    first = 0 if zero_based else 1
    columns = largest + 1 - first if features is None else features
    if columns <= 0:
        raise UserCodeError(f"{name}: no example has a value", remedy=FORM)
    if largest - first >= columns:
        raise UserCodeError(
            f"{where}: index {largest} is beyond the {columns} features"
            f" (indices count from {first} here)",
            remedy="raise `features`, or leave it out",
        )
    if 4 * len(rows.labels) * columns > MAX_DENSE_BYTES:
        raise UserCodeError(
            f"{name}: {len(rows.labels)} examples of {columns} features are too large as dense"
            f" arrays: more than {MAX_DENSE_BYTES >> 30} GB (index {largest} is at {where})",
            remedy="use fewer features; a data.py of your own can hash or select them",
        )
    x = np.zeros((len(rows.labels), columns), np.float32)
    x[np.repeat(np.arange(len(x)), np.array(rows.lengths)), indices - first] = rows.values
    return x
