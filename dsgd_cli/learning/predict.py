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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import DsgdError, UserCodeError
from dsgd_cli.learning.adapters import (
    Model,
    batch_size_of,
    load_model,
    reference,
)
from dsgd_cli.learning.evaluate import CHUNK, evaluate
from dsgd_cli.learning.examples import NO_LABELS, Examples, examples_of
from dsgd_cli.learning.pixels import Pixels
from dsgd_cli.learning.tensors import misfits, read_tensors

Array = NDArray[Any]
Order = Mapping[str, Any]


def predict(order: Order) -> dict[str, Any]:
    """Compute, write the outputs, and say the metrics. Raises UserCodeError and SpecError.

    `order`: model_file, train (as the run's), seed, files ({model, data: path or None}), own
    (whether the data are those of the run), labels (whether they have some), classes, columns and
    label (the names of the run's), part (or None), out (or None).
    """
    train, files = order["train"], order["files"]
    params = read_tensors(Path(order["model_file"]))
    model = load_model(*reference(train["model"]), _path(files["model"]))
    examples = examples_of(order)
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
        write(Path(order["out"]), outputs, classes, order["classes"], examples.files)
    return {
        "data": examples.name,
        "part": examples.part,
        "examples": len(examples.x),
        "outputs": list(outputs.shape),
        "metrics": metrics,
    }


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
        if order["train"]["data"]["kind"] == "csv" and order["labels"]:
            remedy += f"; {NO_LABELS['csv']}"
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


def write(
    path: Path,
    outputs: Array,
    classes: Array | None,
    names: Sequence[str] = (),
    files: Sequence[str] = (),
) -> None:
    """`.npz` with `outputs`, `classes` and, if there are some, `class_names` and `files`; or `.csv`
    with a column for the file, for each output and the class, by its name if it has one."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            named = None if classes is None else [names[i] for i in classes] if names else classes
            _write_csv(part, outputs, named, files)
        else:
            arrays: dict[str, Any] = {"outputs": outputs}
            if classes is not None:
                arrays["classes"] = classes
            if names:
                arrays["class_names"] = np.array(names)
            if files:
                arrays["files"] = np.array(files)
            with part.open("wb") as file:
                np.savez(file, **arrays)
        part.replace(path)
    except OSError as error:
        raise DsgdError(f"{path}: cannot write the outputs: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _write_csv(
    path: Path, outputs: Array, classes: Sequence[Any] | Array | None, files: Sequence[str]
) -> None:
    columns = outputs.reshape(len(outputs), -1)
    head = [f"output_{number}" for number in range(columns.shape[1])]
    rows = columns.tolist()
    if classes is not None:
        head.append("class")
        rows = [[*row, kind] for row, kind in zip(rows, list(classes), strict=True)]
    if files:
        head.insert(0, "file")
        rows = [[file, *row] for file, row in zip(files, rows, strict=True)]
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
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
