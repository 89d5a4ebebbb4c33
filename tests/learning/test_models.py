"""The built-in models: gradients against finite differences, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.models import MODELS, Functions, cnn, mlp, softmax

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


# ---- convolutions

SHAPES = [(9,), (3, 4), (4, 5, 2), (5, 5)]  # of an example: flat and square, gray, with channels


def images(shape: tuple[int, ...], n: int = 6) -> tuple[Array, Array]:
    """Images with an empty corner, where all windows are equal."""
    x = np.random.default_rng(7).standard_normal((n, *shape))
    x[:, :2] = 0.0
    return x, np.arange(n) % 3


def numeric(model: Functions, params: dict[str, Array], x: Array, y: Array) -> dict[str, Array]:
    """Gradients by central differences."""
    h, found = 1e-6, {}
    for name, array in params.items():
        found[name] = np.empty_like(array)
        for at in np.ndindex(array.shape):
            kept = array[at]
            array[at] = kept + h
            up, _ = model.gradients(params, x, y)
            array[at] = kept - h
            down, _ = model.gradients(params, x, y)
            array[at] = kept
            found[name][at] = (up - down) / (2 * h)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_gradients_of_a_convolution(shape: tuple[int, ...], kernel: int) -> None:
    model = cnn(filters=[3], kernel=kernel, hidden=[4], l2=0.01)
    x, y = images(shape)
    params = model.init(np.random.default_rng(1), (x, y))
    for array in params.values():
        array += 0.1  # biases too: at 0 the empty corner is where ReLU has no derivative
    _, grads = model.gradients(params, x, y)
    for name, array in numeric(model, params, x, y).items():
        np.testing.assert_allclose(grads[name], array, atol=2e-9, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("hidden", [[], [5]])
def test_gradients_of_two_convolutions(hidden: list[int]) -> None:
    model = cnn(filters=[2, 3], kernel=3, hidden=hidden)
    x, y = images((7, 6, 2))
    params = model.init(np.random.default_rng(1), (x, y))
    for array in params.values():
        array += 0.1
    _, grads = model.gradients(params, x, y)
    for name, array in numeric(model, params, x, y).items():
        np.testing.assert_allclose(grads[name], array, atol=2e-9, rtol=1e-6, err_msg=name)


def test_a_convolution_is_what_its_definition_says() -> None:
    """By hand, window by window: zeros around the image, maxima of 2x2, ReLU, one dense layer."""
    x, y = images((4, 4, 2))
    model = cnn(filters=[3], kernel=3, hidden=[])
    params = model.init(np.random.default_rng(1), (x, y))
    assert {name: array.shape for name, array in params.items()} == {
        "K1": (3, 3, 2, 3),
        "b1": (3,),
        "W2": (2 * 2 * 3, 3),
        "b2": (3,),
    }
    params["b1"][:] = [0.1, -0.2, 0.3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.empty((len(x), 4, 4, 3))
    for i, j in np.ndindex(4, 4):
        window = padded[:, i : i + 3, j : j + 3]
        sums[:, i, j] = np.einsum("nijc,ijcf->nf", window, params["K1"]) + params["b1"]
    rectified = np.maximum(sums, 0).reshape(len(x), 2, 2, 2, 2, 3).max(axis=(2, 4))
    logits = rectified.reshape(len(x), -1) @ params["W2"] + params["b2"]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict(params, x), expected)


def test_a_convolutions_buffers_are_of_no_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other sizes and dtypes, and evaluations, leave nothing behind."""
    model = cnn(filters=[2, 3], hidden=[4], l2=0.1)
    x, y = images((7, 5), 11)
    params = model.init(np.random.default_rng(1), (x, y))
    fresh = {
        n: cnn(filters=[2, 3], hidden=[4], l2=0.1).gradients(params, x[:n], y[:n]) for n in (3, 11)
    }
    small = {name: array.astype("float32") for name, array in params.items()}
    for n in (11, 3, 11):
        loss, grads = model.gradients(params, x[:n], y[:n])
        assert loss == fresh[n][0]
        for name, array in grads.items():
            np.testing.assert_array_equal(array, fresh[n][1][name])
        assert model.gradients(small, x, y)[1]["K1"].dtype == "float32"
    assert model.metrics is not None
    whole = model.metrics(params, x, y)
    assert whole["loss"] == pytest.approx(fresh[11][0])
    monkeypatch.setattr("dsgd_cli.learning.models.EVALUATE_ROWS", 4)
    assert model.metrics(params, x, y) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10,), r"cnn wants images, and an example has shape \(10,\)"),
        ((), r"cnn wants images, and an example has shape \(\)"),
        ((8, 8, 3, 1), r"cnn wants images, and an example has shape \(8, 8, 3, 1\)"),
        ((3, 32, 32), "images of 3x32 cannot be halved 2 times"),
        ((9,), "images of 3x3 cannot be halved 2 times"),
    ],
)
def test_what_is_no_image_for_it_is_named(shape: tuple[int, ...], message: str) -> None:
    x, y = np.zeros((4, *shape)), np.arange(4)
    with pytest.raises(UserCodeError, match=message):
        cnn().init(np.random.default_rng(0), (x, y))


def test_convolutions_learn_the_digits() -> None:
    data = load_data("builtin", "digits").as_dtype("float32")
    model = cnn(filters=[8, 16], hidden=[32])
    rng = np.random.default_rng(0)
    params = {k: v.astype("float32") for k, v in model.init(rng, data.example(32)).items()}
    for _ in range(10):
        for rows in np.array_split(rng.permutation(data.examples), data.examples // 16):
            _, grads = model.gradients(params, data.x[rows], data.y[rows])
            for name, array in params.items():
                array -= 0.1 * grads[name]
    assert model.metrics is not None
    assert model.metrics(params, data.x_test, data.y_test)["accuracy"] > 0.97
