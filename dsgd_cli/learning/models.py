"""The built-in models, in the contract that users write: plain functions over named arrays.

    init(rng, example) -> params                   example: an (x, y) batch that shows every class
    predict(params, x) -> outputs                  (n, classes) probabilities
    gradients(params, x, y, out) -> (loss, out)    mean over the batch; `out` is overwritten
    metrics(params, x, y) -> {"loss", "accuracy"}

An example may have any shape: it is flattened, but `cnn` takes it as an image. Labels are a vector
of class numbers from 0. The functions compute in the parameters' dtype and keep no state; `cnn` has
buffers, which are of no consequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.convolutions import Body, Convolutions, Flat

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = Mapping[str, Array]

MAX_CLASSES = 1_000_000
EVALUATE_ROWS = 4096  # examples at a time, to bound the memory of an evaluation


class Functions(NamedTuple):
    """What a model is: `metrics` may be None."""

    init: Callable[..., Any]
    predict: Callable[..., Any]
    gradients: Callable[..., Any]
    metrics: Callable[..., Any] | None = None


def softmax(l2: float = 0.0) -> Functions:
    """Softmax regression: one linear layer. The loss has l2 / 2 times the squared weights."""
    return _network("softmax", Flat(), (), l2)


def mlp(hidden: Sequence[int] = (128,), l2: float = 0.0) -> Functions:
    """Layers of `hidden` rectified linear units, then softmax.

    Initial weights: He et al., "Delving Deep into Rectifiers", 2015. The loss has l2 / 2 times the
    squared weights.
    """
    return _network("mlp", Flat(), tuple(hidden), l2)


def cnn(
    filters: Sequence[int] = (16, 32),
    kernel: int = 3,
    hidden: Sequence[int] = (64,),
    l2: float = 0.0,
) -> Functions:
    """Convolutions with ReLU, each followed by max-pooling in 2x2; then as `mlp`.

    Images are (h, w), (h, w, channels), or flat and square. A convolution keeps their size
    (they are padded with zeros), pooling halves it.
    """
    return _network("cnn", Convolutions(tuple(filters), kernel), tuple(hidden), l2)


# A factory's keyword arguments are the model's options in the YAML.
MODELS: dict[str, Callable[..., Functions]] = {"mlp": mlp, "softmax": softmax, "cnn": cnn}


def _network(model: str, body: Body, hidden: tuple[int, ...], l2: float) -> Functions:
    first = len(body.weights) + 1
    layers = [(f"W{i}", f"b{i}") for i in range(first, first + len(hidden) + 1)]
    penalised = [*body.weights, *(weights for weights, _ in layers)]

    def init(rng: np.random.Generator, example: tuple[Array, Array]) -> dict[str, Array]:
        x, y = example
        classes = _classes(model, y)
        params = body.init(rng, x)
        features = body.forward(params, x[:1], float).shape[1]
        widths = [features, *hidden, classes]
        for (weights, bias), inputs, outputs in zip(layers, widths[:-1], widths[1:], strict=True):
            scale = np.sqrt(2.0 / inputs)
            params[weights] = rng.standard_normal((inputs, outputs)) * scale  # (inputs, outputs)
            params[bias] = np.zeros(outputs)
        return params

    def forward(params: Params, x: Array) -> list[Array]:
        """Each layer's input, and the logits (n, classes) at the end."""
        values = [body.forward(params, x, params[layers[0][0]].dtype)]
        for i, (weights, bias) in enumerate(layers):
            value = values[i] @ params[weights]
            value += params[bias]
            if i < len(hidden):
                np.maximum(value, 0.0, out=value)
            values.append(value)
        return values

    def predict(params: Params, x: Array) -> Array:
        logits = forward(params, x)[-1]
        _shift(logits)
        _normalise(logits)
        return logits

    def gradients(
        params: Params, x: Array, y: Array, out: dict[str, Array] | None = None
    ) -> tuple[float, dict[str, Array]]:
        if out is None:
            out = {name: np.empty_like(array) for name, array in params.items()}
        *inputs, delta = forward(params, x)
        loss = _cross_entropy(delta, y) / len(y)
        delta[np.arange(len(y)), y] -= 1.0
        delta *= 1.0 / len(y)  # now (n, outputs): the loss's derivative by the layer's outputs
        for i in range(len(layers) - 1, -1, -1):
            weights, bias = layers[i]
            np.matmul(inputs[i].T, delta, out=out[weights])
            np.add.reduce(delta, axis=0, out=out[bias])
            if i or body.weights:
                delta = delta @ params[weights].T
                delta *= inputs[i] > 0  # a third of the time of a masked copy
        body.backward(params, delta, out)
        if l2:
            loss += penalty(params)
            for weights in penalised:
                out[weights] += l2 * params[weights]
        return loss, out

    def penalty(params: Params) -> float:
        return 0.5 * l2 * sum(float(np.vdot(params[each], params[each])) for each in penalised)

    def metrics(params: Params, x: Array, y: Array) -> dict[str, float]:
        loss, right = 0.0, 0
        classes = params[layers[-1][1]].size
        if y.min() < 0 or y.max() >= classes:
            bad = y.min() if y.min() < 0 else y.max()
            raise UserCodeError(
                f"{model}: there is a label {bad}, the training set has 0 to {classes - 1}"
            )
        rows = min(EVALUATE_ROWS, body.most_rows)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = forward(params, x[part])[-1]
            right += int(np.count_nonzero(logits.argmax(axis=1) == y[part]))
            loss += _cross_entropy(logits, y[part])
        return {"loss": loss / len(x) + penalty(params), "accuracy": right / len(x)}

    return Functions(init, predict, gradients, metrics)


def _classes(model: str, y: Array) -> int:
    """The number of classes, from a batch that shows all of them."""
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise UserCodeError(
            f"{model} wants a class number per example; y is {y.dtype} of shape {y.shape}",
            remedy="give y as a vector of integers from 0",
        )
    if y.min() < 0:
        raise UserCodeError(f"{model}: labels count from 0, and there is a {y.min()}")
    if y.max() >= MAX_CLASSES:
        raise UserCodeError(
            f"{model}: there is a label {y.max()}, which would make {int(y.max()) + 1} classes",
            remedy="number the classes from 0; is that column the label?",
        )
    return int(y.max()) + 1


def _shift(logits: Array) -> None:
    """Subtracts each row's maximum, so that exp cannot overflow; the probabilities stay."""
    logits -= np.maximum.reduce(logits, axis=1, keepdims=True)


def _normalise(logits: Array) -> Array:
    """Shifted logits to probabilities, in place; returns log(sum(exp(logit))) of each row."""
    np.exp(logits, out=logits)
    sums = np.add.reduce(logits, axis=1, keepdims=True)
    logits /= sums
    return np.log(sums)


def _cross_entropy(logits: Array, y: Array) -> float:
    """The summed loss; turns the logits into probabilities."""
    _shift(logits)
    chosen = logits[np.arange(len(y)), y]
    return float(_normalise(logits).sum() - chosen.sum())
