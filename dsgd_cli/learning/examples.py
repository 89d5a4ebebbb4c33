"""Which examples `dsgd predict` computes outputs of, and in which order.

Examples may have no labels. A file says so itself where it can: an npz with `x` alone, a table
that lacks the column with the labels' name, a folder of images without folders in it. Of the others
the user says it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.npyio import NpzFile

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.checks import check_finite
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.pixels import Array, Pixels, joined
from dsgd_cli.learning.readers.csv import Column, csv_names, csv_without_labels
from dsgd_cli.learning.readers.idx import has_test_set
from dsgd_cli.learning.readers.images import (
    has_folders,
    image_names,
    images_without_labels,
)

Order = Mapping[str, Any]
HELD_OUT, TRAINING, ALL = "held-out", "training", "all"
NO_LABELS = {  # kind -> what to try where examples with labels cannot be read, or do not fit
    "csv": "if no column is their label: --no-labels",
    "images": "if folders are no classes: --no-labels",
}
MOST_NAMES = 20  # in a message


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What outputs are computed of."""

    name: str
    part: str  # held-out | training | all
    x: Array | Pixels
    y: Array | None = None  # None where nobody knows it
    data: Dataset | None = None  # whole, where it was loaded as such
    files: Sequence[str] = ()  # of each example, where each has one


def examples_of(order: Order) -> Examples:
    """The part that was asked for. By default the held-out one; all of a file that has none.

    `order`: train (as the run's), files ({data: path or None}), own, labels, part, classes,
    columns and label; see `predict`. Raises UserCodeError, SpecError.
    """
    ref, path = order["train"]["data"], order["files"]["data"] and Path(order["files"]["data"])
    kind, other, labels = ref["kind"], not order["own"], order["labels"]
    whole = _is_whole(kind, path)
    part = order["part"] or (ALL if other and (whole or not labels) else HELD_OUT)
    options = ref["options"]
    if kind == "csv" and other and path is not None:
        options = {**options, **_columns_of(path, order, **options)}
    if other and path is not None and kind in UNLABELLED:
        says_so, read = UNLABELLED[kind]
        if not labels or says_so(path, **options):
            if part != ALL:
                what = f"{path.name}: examples without labels have no {part} part"
                raise UserCodeError(what, remedy="leave out --part: all of them are taken")
            x, names = read(path, **options)
            floats = isinstance(x, Pixels) or x.dtype.kind == "f"
            x = x.astype(order["train"]["dtype"]) if floats else x
            if kind == "images":
                return Examples(path.name, part, x, files=names)
            return Examples(path.name, part, _by_name(path.name, x, names, order["columns"]))
    found = _labelled(order, options, part, path, whole)
    return found if labels else replace(found, y=None, data=None)


def _labelled(
    order: Order, options: Mapping[str, Any], part: str, path: Path | None, whole: bool
) -> Examples:
    ref = order["train"]["data"]
    kind = ref["kind"]
    if whole and part == ALL:
        options = {**options, "test_fraction": 0}  # all in the order of the file
    try:
        data = load_data(kind, ref["name"], options, path).as_dtype(order["train"]["dtype"])
    except UserCodeError as error:
        if kind not in NO_LABELS or order["own"]:
            raise
        remedy = "; ".join(filter(None, [error.remedy, NO_LABELS[kind]]))
        raise UserCodeError(error.message, details=error.details, remedy=remedy) from error
    x, x_test = (
        _by_name(data.name, each, data.columns, order["columns"]) for each in (data.x, data.x_test)
    )
    data = replace(data, x=x, x_test=x_test, known="")
    n, n_test = len(data.x), len(data.x_test)
    x, y, rows = data.x, data.y, np.arange(n)
    if part == HELD_OUT:
        x, y, rows = data.x_test, data.y_test, np.arange(n, n + n_test)
    elif part == ALL and not whole:
        x, y = joined(x, data.x_test), np.concatenate([y, data.y_test])
        rows = np.arange(n + n_test)
    files: Sequence[str] = ()
    if kind == "images" and path is not None:
        names = image_names(path, options["test_fraction"])
        files = [names[row] for row in rows]
    if kind == "csv" and not order["own"]:
        _check_names(data, order["classes"])
    return Examples(data.name, part, x, _renumbered(data, y, order["classes"]), data, files)


def _columns_of(
    path: Path,
    order: Order,
    label: Column = -1,
    ignore: Sequence[Column] = (),
    delimiter: str = ",",
    **_: Any,
) -> dict[str, Any]:
    """Options for another table: where both have names for their columns, those say which is which,
    and what the model does not know is ignored."""
    names, known = csv_names(path, ignore, delimiter), order["columns"]
    if not names or not known or not order["label"]:
        found = [each for each in ignore if isinstance(each, int) or each in names]
        if not order["labels"]:
            found = [_without_label(path, each, label) for each in found]
        return {"label": label, "ignore": found}
    times = Counter(names)
    for name in known:
        if times[name] > 1:
            raise UserCodeError(f"{path.name}: column {name!r} is there twice")
        _check_column(path.name, name, names, known)
    if isinstance(label, int):
        label = order["label"]
    wanted = {*known, label} if order["labels"] else set(known)
    wanted -= {each for each in ignore if isinstance(each, str)}
    return {
        "label": label,
        "ignore": [at for at, name in enumerate(names) if name not in wanted],
    }


def _without_label(path: Path, column: Column, label: Column) -> Column:
    """Where an ignored column is in a table that has lost its label's."""
    if isinstance(column, str) or isinstance(label, str):
        return column
    if (column < 0) == (label < 0):
        behind = column < label if column < 0 else column > label
        return column + (1 if column < 0 else -1) * behind
    if label in (0, -1):  # at the other end
        return column
    raise UserCodeError(
        f"{path.name}: without the label's column nobody knows which one is {column}",
        remedy="count `label` and `ignore` from the same end, or name the columns",
    )


def _check_column(data: str, name: str, columns: Sequence[str], known: Sequence[str]) -> None:
    if name not in columns:
        raise UserCodeError(
            f"{data}: no column {name!r}, which the model was trained on",
            remedy=f"it needs {_list(known)}; without a header, columns are taken as they come",
        )


def _by_name(
    data: str, x: Array | Pixels, columns: Sequence[str], known: Sequence[str]
) -> Array | Pixels:
    """x with the run's columns in the run's order, where both have names for them."""
    if not columns or not known or list(columns) == list(known):
        return x
    for name in known:
        _check_column(data, name, columns, known)
    return x[:, [columns.index(name) for name in known]]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + ", …" * (len(names) > MOST_NAMES)


def _check_names(data: Dataset, classes: Sequence[str]) -> None:
    """That texts and numbers as labels are not taken for each other."""
    if classes and not data.classes and data.y.dtype.kind in "iu":
        raise UserCodeError(
            f"{data.name}: its labels are numbers, and the model's classes have names",
            remedy=f"they are {_list(classes)}",
        )
    if data.classes and not classes:
        raise UserCodeError(
            f"{data.name}: its labels are texts, and the run has no names for its classes",
            remedy="number them as those that were trained on, or leave them out: --no-labels",
        )


def _renumbered(data: Dataset, y: Array, classes: Sequence[str]) -> Array:
    """Labels as the run numbers its classes: other data may lack some of them."""
    if not classes or not data.classes:
        return y
    for name in data.classes:
        if name not in classes:
            raise UserCodeError(
                f"{data.name}: {name!r} is none of the classes that the model was trained on",
                remedy=f"they are {_list(classes)}",
            )
    numbers: Array = np.array([classes.index(name) for name in data.classes])
    return numbers[y]


def _is_whole(kind: str, path: Path | None) -> bool:
    """Whether the file or folder has no held-out examples of its own."""
    if kind == "npz" and path is not None:
        return "x_test" not in _names(path)
    if kind == "idx" and path is not None:
        return not has_test_set(path)
    return kind in ("csv", "svmlight", "images")


def _names(path: Path) -> set[str]:
    """The arrays of a file; none of one that cannot be read, which `load_data` will explain."""
    with suppress(Exception):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, NpzFile):
            with arrays:
                return set(arrays.files)
    return set()


# ── without labels ─────────────────────────────────────────────────────────────────────────────


def _npz_lacks_labels(path: Path, **_: Any) -> bool:
    return (names := _names(path)) >= {"x"} and not names & {"y", "x_test", "y_test"}


def _npz(path: Path, **_: Any) -> tuple[Array, Sequence[str]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x: Array = arrays["x"]
            if "x_test" in arrays:
                x = np.concatenate([x, arrays["x_test"]])
    except Exception as error:  # a damaged file makes numpy and zipfile raise almost anything
        raise UserCodeError(f"{path.name}: {error}") from error
    if x.dtype.kind not in "fiub" or x.ndim == 0 or len(x) == 0:
        raise UserCodeError(f"{path.name}: x has dtype {x.dtype} and shape {x.shape}")
    check_finite(path.name, "x", x)
    return x, ()


def _csv_lacks_labels(path: Path, label: Column = -1, delimiter: str = ",", **_: Any) -> bool:
    if isinstance(label, int):
        return False
    names = csv_names(path, (), delimiter)
    return bool(names) and label not in names


def _csv(
    path: Path, ignore: Sequence[Column] = (), delimiter: str = ",", **_: Any
) -> tuple[Array, Sequence[str]]:
    return csv_without_labels(path, ignore, delimiter)


def _images_lack_labels(path: Path, **_: Any) -> bool:
    return not has_folders(path)


def _images(path: Path, size: Sequence[int], grey: bool, **_: Any) -> tuple[Pixels, Sequence[str]]:
    return images_without_labels(path, size, grey)


SaysSo: TypeAlias = Callable[..., bool]
Read: TypeAlias = Callable[..., tuple[Array | Pixels, Sequence[str]]]

# kind -> (whether a file says that it has no labels, what reads it then: x, and names, of columns
# or, of images, of the files)
UNLABELLED: dict[str, tuple[SaysSo, Read]] = {
    "npz": (_npz_lacks_labels, _npz),
    "csv": (_csv_lacks_labels, _csv),
    "images": (_images_lack_labels, _images),
}
