"""The outputs of a trained model: `python -m dsgd_cli.learning.predict`, started by `dsgd predict`.

An order comes as JSON on stdin, the answer is one JSON line on stdout; what user code prints goes
to stderr. The metrics are computed as in a run, by the same function. A process of its own, since
the launcher has neither numpy nor a place for user code.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from dsgd_cli.contract.errors import DsgdError, UserCodeError
from dsgd_cli.learning.adapters import (
    Model,
    batch_size_of,
    load_data,
    load_model,
    reference,
)
from dsgd_cli.learning.datasets import Dataset, hold_out
from dsgd_cli.learning.evaluate import CHUNK, evaluate
from dsgd_cli.learning.pixels import Pixels, joined
from dsgd_cli.learning.readers.idx import has_test_set
from dsgd_cli.learning.readers.images import split
from dsgd_cli.learning.tensors import misfits, read_tensors

Array = NDArray[Any]
Order = Mapping[str, Any]
HELD_OUT, TRAINING, ALL = "held-out", "training", "all"
MOST_NAMES = 20  # of classes in a message
WHOLE_FRACTION = 0.5  # of another file, which is put together again: two rows are enough


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What outputs are computed for; `y` is None where nobody knows it."""

    name: str
    part: str
    x: Array | Pixels
    y: Array | None
    data: Dataset | None  # whole, where it was loaded as such


def predict(order: Order) -> dict[str, Any]:
    """Compute, write the outputs, and say the metrics. Raises UserCodeError and SpecError.

    `order`: model_file, train (as the run's), seed, files ({model, data: path or None}), own
    (whether the data are those of the run), classes (the names of the run's), part (or None), out
    (or None).
    """
    train, files = order["train"], order["files"]
    params = read_tensors(Path(order["model_file"]))
    model = load_model(*reference(train["model"]), _path(files["model"]))
    examples = _examples(order)
    with np.errstate(all="ignore"):
        unfit = _unfit(order, model, params, examples)
        if unfit and order["own"]:
            raise _misfit(order, examples, unfit)
        try:
            outputs = _outputs(model, params, examples.x)
            metrics = None
            if examples.y is not None:
                metrics = evaluate(model, params, examples.x, examples.y)
        except UserCodeError as error:
            if not unfit:
                raise
            raise _misfit(order, examples, [*unfit, error.message]) from error
    classes = _classes(outputs, examples.y)
    if order["out"]:
        write(Path(order["out"]), outputs, classes, order["classes"])
    return {
        "data": examples.name,
        "part": examples.part,
        "examples": len(examples.x),
        "outputs": list(outputs.shape),
        "metrics": metrics,
    }


# ── the examples ───────────────────────────────────────────────────────────────────────────────


def _examples(order: Order) -> Examples:
    """The part that was asked for. By default the held-out one; all of a file that has none."""
    ref, path = order["train"]["data"], _path(order["files"]["data"])
    part, dtype = order["part"], order["train"]["dtype"]
    whole = _is_whole(ref["kind"], path)
    if part is None:
        part = ALL if whole and not order["own"] else HELD_OUT
    if ref["kind"] == "npz" and part == ALL and path is not None:
        unlabelled = _unlabelled(path, dtype)
        if unlabelled is not None:
            return Examples(path.name, part, unlabelled, None, None)
    options = ref["options"]
    if whole and part == ALL and not order["own"]:
        options = {**options, "test_fraction": WHOLE_FRACTION}
    data = load_data(ref["kind"], ref["name"], options, path).as_dtype(dtype)
    x, y = data.x, data.y
    if part == HELD_OUT:
        x, y = data.x_test, data.y_test
    elif part == ALL:
        x, y = joined(x, data.x_test), np.concatenate([y, data.y_test])
        if whole:
            rows = _order_of_file(ref["kind"], y, options["test_fraction"])
            x, y = Pixels(x.raw[rows], x.dtype) if isinstance(x, Pixels) else x[rows], y[rows]
    return Examples(data.name, part, x, _renumbered(data, y, order["classes"]), data)


def _renumbered(data: Dataset, y: Array, classes: Sequence[str]) -> Array:
    """Labels as the run numbers its classes: other data may lack some of them."""
    if not classes or not data.classes:
        return y
    for name in data.classes:
        if name not in classes:
            known = ", ".join(classes[:MOST_NAMES]) + ", …" * (len(classes) > MOST_NAMES)
            raise UserCodeError(
                f"{data.name}: {name!r} is none of the classes that the model was trained on",
                remedy=f"they are {known}",
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


def _unlabelled(path: Path, dtype: str) -> Array | None:
    """`x` of a file that has nothing else; None for any other."""
    if "x" not in (names := _names(path)) or names & {"y", "x_test", "y_test"}:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x: Array = arrays["x"]
    except Exception as error:  # a damaged file makes numpy and zipfile raise almost anything
        raise UserCodeError(f"{path.name}: {error}") from error
    if x.dtype.kind not in "fiub" or x.ndim == 0 or len(x) == 0:
        raise UserCodeError(f"{path.name}: x has dtype {x.dtype} and shape {x.shape}")
    return x.astype(dtype) if x.dtype.kind == "f" else x


def _names(path: Path) -> set[str]:
    """The arrays of a file; none of one that cannot be read, which `load_data` will explain."""
    with suppress(Exception):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, NpzFile):
            with arrays:
                return set(arrays.files)
    return set()


def _order_of_file(kind: str, y: Array, fraction: float) -> Array:
    """Undoes the shuffle of what is held out: it is the same for as many examples, of images for as
    many of each class, which are listed class by class."""
    if kind == "images":
        return np.argsort(np.concatenate(split(np.sort(y), fraction)))
    numbers = np.arange(len(y))
    shuffled = hold_out("", numbers, numbers, fraction)
    return np.argsort(np.concatenate([shuffled.x, shuffled.x_test]))


# ── the model ──────────────────────────────────────────────────────────────────────────────────


def _unfit(
    order: Order, model: Model, params: Mapping[str, Array], examples: Examples
) -> list[str]:
    """How the file differs from what `init` makes of these data.

    Of other data than the run's that may be right all the same: there may be fewer classes.
    """
    train = order["train"]
    size = batch_size_of(train)
    rng = np.random.default_rng(order["seed"])
    if examples.data is None:  # a module of torch's is made there, all the same
        unknown = np.zeros(len(examples.x[:size]), np.int64)
        with suppress(UserCodeError):
            model.init(rng, (examples.x[:size], unknown))
        return []
    try:
        return misfits(params, model.init(rng, examples.data.example(size)))
    except UserCodeError as error:
        if order["own"]:
            raise
        return [error.message]


def _misfit(order: Order, examples: Examples, found: list[str]) -> UserCodeError:
    if order["own"]:
        what, remedy = "the model", "is the model's code still what was trained?"
    else:
        what, remedy = examples.name, "examples must have the form of those that were trained on"
    return UserCodeError(f"{order['model_file']} does not fit {what}", details=found, remedy=remedy)


def _outputs(model: Model, params: Mapping[str, Array], x: Array | Pixels) -> Array:
    """One row for each example."""
    parts = []
    for start in range(0, len(x), CHUNK):
        some = x[start : start + CHUNK]
        part = model.predict(params, some)
        if part.ndim == 0 or len(part) != len(some):
            raise UserCodeError(
                f"{model.name}: predict returned shape {part.shape} for {len(some)} examples"
            )
        parts.append(part)
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise UserCodeError(f"{model.name}: predict's outputs differ in shape: {error}") from error


def _classes(outputs: Array, y: Array | None) -> Array | None:
    """The class with the highest score, where outputs are one score per class."""
    labels = y is None or (y.ndim == 1 and y.dtype.kind in "iu")
    return outputs.argmax(axis=1) if labels and outputs.ndim == 2 and outputs.shape[1] > 1 else None


# ── the file ───────────────────────────────────────────────────────────────────────────────────


def write(path: Path, outputs: Array, classes: Array | None, names: Sequence[str] = ()) -> None:
    """`.npz` with `outputs`, `classes` and, if they have any, `class_names`; or `.csv` with a
    column for each output and the class, by its name if it has one."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            named = None if classes is None else [names[i] for i in classes] if names else classes
            _write_csv(part, outputs, named)
        else:
            arrays: dict[str, Any] = {"outputs": outputs}
            if classes is not None:
                arrays["classes"] = classes
            if names:
                arrays["class_names"] = np.array(names)
            with part.open("wb") as file:
                np.savez(file, **arrays)
        part.replace(path)
    except OSError as error:
        raise DsgdError(f"{path}: cannot write the outputs: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _write_csv(path: Path, outputs: Array, classes: Sequence[Any] | Array | None) -> None:
    columns = outputs.reshape(len(outputs), -1)
    head = [f"output_{number}" for number in range(columns.shape[1])]
    rows = columns.tolist()
    if classes is not None:
        head.append("class")
        rows = [[*row, kind] for row, kind in zip(rows, list(classes), strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


# ── the process ────────────────────────────────────────────────────────────────────────────────


def _path(path: str | None) -> Path | None:
    return None if path is None else Path(path)


def main() -> None:
    """One order, one answer."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what user code prints is no answer
    order = json.load(sys.stdin)
    said: dict[str, Any]
    try:
        said = {"type": "predicted", **predict(order)}
    except DsgdError as error:
        said = {
            "type": "failed",
            "error": type(error).__name__,
            "message": error.message,
            "details": error.details,
            "remedy": error.remedy,
        }
    except Exception as error:
        details = traceback.format_exc().splitlines()
        said = {"type": "failed", "error": "", "message": repr(error), "details": details}
    answer.write(json.dumps(said) + "\n")
    answer.close()


if __name__ == "__main__":
    main()
