"""Tries a model on its data before anything is trained: each function once, on one batch.

What it finds is a UserCodeError with the sentence that a person needs; a run that starts after it
fails on user code only for what one batch cannot show. It changes nothing and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import Model
from dsgd_cli.learning.checks import check_gradients
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.evaluate import evaluate


@dataclass(frozen=True, slots=True)
class Probed:
    """What a run with this model and data has."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    examples: int
    loss: float
    metrics: dict[str, float]


def probe(model: Model, data: Dataset, seed: int, dtype: str, batch_size: int) -> Probed:
    """Calls init, gradients, and predict or metrics. `data` is in the run's dtype already."""
    example = data.example(batch_size)
    initial = model.init(np.random.default_rng(seed), example)
    params = {name: array.astype(dtype) for name, array in initial.items()}
    for array in params.values():
        array.flags.writeable = False  # a function that changes them fails on its own line
    out = {name: np.full(array.shape, np.nan, dtype) for name, array in params.items()}
    x, y = data.x[:batch_size], data.y[:batch_size]
    loss = model.gradients(params, x, y, out)
    untouched = [name for name, array in out.items() if array.size and np.isnan(array).all()]
    if untouched and model.takes_out and np.isfinite(loss):
        raise UserCodeError(
            f"{model.name}: gradients(out=) wrote nothing to {', '.join(untouched)}",
            remedy="write every gradient into out[name][...], or do not take out=",
        )
    try:
        check_gradients(params, loss, out)
    except UserCodeError as error:
        raise UserCodeError(f"{model.name}: {error.message}") from error
    metrics = evaluate(model, params, data.x_test[:batch_size], data.y_test[:batch_size])
    tensors = tuple((name, array.shape) for name, array in params.items())
    return Probed(tensors, dtype, data.examples, loss, metrics)
