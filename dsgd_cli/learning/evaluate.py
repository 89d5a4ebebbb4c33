"""The value of a model on the held-out data: what `until` and the summary speak of.

`loss` is always there. A model's own `metrics` sees all examples in one call, so that its numbers
are exactly what the user's function says; without it, loss and accuracy (where the outputs are one
score per class and the labels are class numbers) are means over chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.contract.names import TRAINING_METRIC
from dsgd_cli.learning.adapters import Model
from dsgd_cli.learning.datasets import SPLIT_SEED, Dataset
from dsgd_cli.learning.pixels import Pixels, part_of

Array = NDArray[Any]
CHUNK = 1024  # examples at a time


def evaluate(
    model: Model, params: Mapping[str, Array], x: Array | Pixels, y: Array
) -> dict[str, float]:
    """The metrics of the model on (x, y), with `loss` first; NaN where the model is not finite."""
    if model.has_metrics:
        values = model.metrics(params, x, y)
        loss = values.pop("loss") if "loss" in values else _mean_loss(model, params, x, y)
        return {"loss": loss, **values}
    values = {"loss": _mean_loss(model, params, x, y)}
    accuracy = _accuracy(model, params, x, y)
    return values if accuracy is None else values | {"accuracy": accuracy}


def evaluate_training(model: Model, params: Mapping[str, Array], data: Dataset) -> dict[str, float]:
    """The same metrics of as many training examples as are held out, drawn at random and always
    the same; named `training_loss`, …"""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data.x))
    some = np.sort(order[: len(data.x_test)])  # taken each time, and as contiguous as a batch is
    values = evaluate(model, params, part_of(data.x, some), data.y[some])
    return {TRAINING_METRIC + name: value for name, value in values.items()}


def _mean_loss(model: Model, params: Mapping[str, Array], x: Array | Pixels, y: Array) -> float:
    unused = {name: np.empty_like(array) for name, array in params.items()}
    total = 0.0
    for part in _chunks(len(x)):
        total += model.gradients(params, x[part], y[part], unused) * len(x[part])
    return total / len(x)


def _accuracy(
    model: Model, params: Mapping[str, Array], x: Array | Pixels, y: Array
) -> float | None:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        return None
    right = 0
    for part in _chunks(len(x)):
        scores = model.predict(params, x[part])
        if len(scores) != len(y[part]):
            raise UserCodeError(
                f"{model.name}: predict returned shape {scores.shape} for {len(y[part])} examples"
            )
        if scores.ndim != 2 or scores.shape[1] < 2:
            return None
        right += int(np.count_nonzero(scores.argmax(axis=1) == y[part]))
    return right / len(x)


def _chunks(examples: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, examples, CHUNK)]
