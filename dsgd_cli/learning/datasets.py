"""Data sets: two pairs of arrays, one to train on and one held out.

Invariant: every worker that reads the same source has the same examples in the same order, so a
task can be a range of positions; where a part is held out here, the split does not depend on the
run's seed or on numpy's version (RandomState's stream is frozen). Arrays are read once and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.pixels import Array, Pixels

DIGITS = Path(__file__).parent / "data" / "digits.npz"
DIGITS_HELD_OUT = 360
SPLIT_SEED = 20
PIECE_BYTES = 8 << 20  # of an array that is looked at or converted as a whole


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """x, y: the training set; x_test, y_test: held out. Examples are along the first axis.
    `classes`, `columns`, `label`: what the class numbers mean, the features along x's second axis,
    and the labels, where the source has names for them."""

    name: str
    x: Array | Pixels
    y: Array
    x_test: Array | Pixels
    y_test: Array
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    label: str = ""
    known: str = field(default="", kw_only=True)  # its digest, where nobody has to read everything

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
            made = np.empty(array.shape, dtype)
            for rows in pieces(array):
                with np.errstate(over="ignore"):
                    made[rows] = array[rows]
                if not np.isfinite(made[rows]).all():
                    raise UserCodeError(f"{self.name}: a number is too large for {dtype}")
            return made

        x, x_test = (
            each.astype(dtype) if isinstance(each, Pixels) else cast(each)
            for each in (self.x, self.x_test)
        )
        y, y_test = cast(self.y), cast(self.y_test)
        return replace(self, x=x, y=y, x_test=x_test, y_test=y_test, known="")

    def digest(self) -> str:
        """Equal where shapes, dtypes and every number, or the source of all numbers, are equal."""
        if self.known:
            return self.known
        hashed = hashlib.sha256()
        for array in (self.x, self.y, self.x_test, self.y_test):
            hashed.update(f"{array.dtype.str}{array.shape}".encode())
            if isinstance(array, Pixels) and array.source:
                hashed.update(array.source.encode())
                continue
            numbers = array.raw if isinstance(array, Pixels) else array
            for rows in pieces(numbers):
                hashed.update(np.ascontiguousarray(numbers[rows]).view(np.uint8).data)
        return hashed.hexdigest()


def pieces(array: Array) -> Iterator[slice]:
    """Examples that follow each other, some megabytes at a time; together all of them."""
    each = array.nbytes // max(len(array), 1)
    step = max(PIECE_BYTES // max(each, 1), 1)
    return (slice(start, start + step) for start in range(0, len(array), step))


def digits() -> Dataset:
    """UCI handwritten digits: 1,437 + 360 images of 8x8 grey values from 0 to 1, ten classes."""
    with np.load(DIGITS, allow_pickle=False) as arrays:
        x = arrays["x"].astype(np.float32) / np.float32(16)
        y = arrays["y"].astype(np.int64)
    return _split("digits", x, y, DIGITS_HELD_OUT)


# A factory's keyword arguments (but the path) are the options in the YAML.
DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits}


def hold_out(name: str, x: Array, y: Array, fraction: float) -> Dataset:
    """A data set of which a random part, always the same, is held out. 0: for whoever wants all
    examples as they come; the first stands for a test set, which there must be."""
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise UserCodeError(f"{name}: x has shape {x.shape}, y has shape {y.shape}")
    if fraction == 0:
        return Dataset(name, x, y, x[:1], y[:1])
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


def class_numbers(y: Array) -> Array:
    """Whole numbers as integers; others stay numbers of float32."""
    whole = np.isfinite(y).all() and (y == np.rint(y)).all() and np.abs(y).max() < 2**53
    return y.astype(np.int64) if whole else y.astype(np.float32)
