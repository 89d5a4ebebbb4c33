"""The built-in models: gradients against finite differences, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.models import MODELS, Functions, mlp, softmax

Array = np.ndarray[Any, Any]

CASES = [
    softmax(),
    softmax(l2=0.1),
    mlp(hidden=[5]),
    mlp(hidden=[6, 5, 4], l2=0.01),
    mlp(hidden=[]),
]


def batch(n: int = 7, dtype: str = "float64") -> tuple[Array, Array]:
    """Examples of shape (3, 2), labels 0 to 3, each of them there."""
    rng = np.random.default_rng(5)
    return rng.standard_normal((n, 3, 2)).astype(dtype), np.arange(n) % 4


def initial(model: Functions, dtype: str = "float64") -> dict[str, Array]:
    params = model.init(np.random.default_rng(2), batch())
    rng = np.random.default_rng(3)  # biases too: nothing may vanish at zero
    return {k: (v + 0.1 * rng.standard_normal(v.shape)).astype(dtype) for k, v in params.items()}


@pytest.mark.parametrize("model", CASES)
def test_gradients_equal_central_differences(model: Functions) -> None:
    x, y = batch()
    params = initial(model)
    _, grads = model.gradients(params, x, y)
    h = 1e-6
    for name, array in params.items():
        flat, got = array.reshape(-1), grads[name].reshape(-1)
        for i in range(flat.size):
            kept = flat[i]
            flat[i] = kept + h
            up, _ = model.gradients(params, x, y)
            flat[i] = kept - h
            down, _ = model.gradients(params, x, y)
            flat[i] = kept
            assert got[i] == pytest.approx((up - down) / (2 * h), abs=2e-9, rel=1e-6), f"{name} {i}"


@pytest.mark.parametrize("model", CASES)
def test_out_is_overwritten_and_equal(model: Functions) -> None:
    x, y = batch()
    params = initial(model)
    before = {name: array.copy() for name, array in params.items()}
    loss, grads = model.gradients(params, x, y)
    vector = np.full(sum(a.size for a in params.values()), np.nan)
    views, offset = {}, 0
    for name, array in params.items():
        views[name] = vector[offset : offset + array.size].reshape(array.shape)
        offset += array.size
    for _ in range(2):  # the second time over the first
        loss_out, same = model.gradients(params, x, y, out=views)
        assert same is views and loss_out == loss
        for name in params:
            np.testing.assert_array_equal(views[name], grads[name])
    for name, array in params.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("model", CASES)
def test_metrics_agree_with_predict_and_gradients(
    model: Functions, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = batch(23)
    params = initial(model)
    assert model.metrics is not None
    whole = model.metrics(params, x, y)
    probabilities = model.predict(params, x)
    assert probabilities.shape == (23, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert whole["accuracy"] == np.mean(probabilities.argmax(axis=1) == y)
    assert whole["loss"] == pytest.approx(model.gradients(params, x, y)[0])
    monkeypatch.setattr("dsgd_cli.learning.models.EVALUATE_ROWS", 5)
    assert model.metrics(params, x, y) == pytest.approx(whole)


def test_it_computes_in_the_dtype_of_the_parameters() -> None:
    model = mlp(hidden=[5], l2=0.1)
    for dtype in ("float32", "float64"):
        params = initial(model, dtype)
        for x in (batch()[0], batch(dtype="float32")[0], (batch()[0] * 9).astype(np.int8)):
            loss, grads = model.gradients(params, x, batch()[1])
            assert type(loss) is float
            assert {array.dtype for array in grads.values()} == {np.dtype(dtype)}
            assert model.predict(params, x).dtype == dtype


def test_large_logits_do_not_overflow() -> None:
    model = softmax()
    params = {"W1": np.full((6, 4), 1e4, np.float32), "b1": np.arange(4, dtype=np.float32) * 1e4}
    loss, grads = model.gradients(params, np.ones((2, 6), np.float32), np.array([0, 3]))
    assert loss == pytest.approx(1.5e4)
    assert all(np.isfinite(array).all() for array in grads.values())


def test_init_reads_shapes_and_classes_from_the_example() -> None:
    made = mlp(hidden=[5, 3]).init(np.random.default_rng(0), batch())
    assert {name: array.shape for name, array in made.items()} == {
        "W1": (6, 5),
        "b1": (5,),
        "W2": (5, 3),
        "b2": (3,),
        "W3": (3, 4),
        "b3": (4,),
    }
    again = mlp(hidden=[5, 3]).init(np.random.default_rng(0), batch())
    other = mlp(hidden=[5, 3]).init(np.random.default_rng(1), batch())
    assert (made["W1"] == again["W1"]).all() and (made["W1"] != other["W1"]).any()
    wide = mlp(hidden=[4000]).init(np.random.default_rng(0), batch())["W1"]
    assert wide.std() == pytest.approx((2 / 6) ** 0.5, rel=0.05)  # He


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(7), "wants a class number per example; y is float64 of shape"),
        (np.zeros((7, 4), int), r"y is int64 of shape \(7, 4\)"),
        (np.arange(7) - 1, "labels count from 0, and there is a -1"),
        (np.arange(7) + 10**6, "there is a label 1000006, which would make 1000007 classes"),
    ],
)
def test_labels_that_are_not_class_numbers_are_refused(name: str, y: Array, message: str) -> None:
    with pytest.raises(UserCodeError, match=f"{name}.*{message}"):
        MODELS[name]().init(np.random.default_rng(0), (batch()[0], y))


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_that_training_never_saw_is_named(label: int) -> None:
    model = mlp(hidden=[5])
    assert model.metrics is not None
    with pytest.raises(UserCodeError, match=f"a label {label}, the training set has 0 to 3"):
        model.metrics(initial(model), batch(1)[0], np.array([label]))
