"""The value of a model: what the user's function says, or means that chunks do not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning import evaluate as module
from dsgd_cli.learning.adapters import Model, load_data, load_model
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.evaluate import evaluate, evaluate_training
from dsgd_cli.learning.models import Functions, mlp
from dsgd_cli.learning.pixels import Pixels

Array = np.ndarray[Any, Any]


@pytest.fixture
def chunks_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 100)  # 360 held-out digits: the last chunk is shorter


def test_without_metrics_it_equals_the_builtin_metrics(chunks_of_100: None) -> None:
    data = load_data("builtin", "digits")
    full = load_model("builtin", "mlp", {"l2": 0.01})
    bare = Model("bare", full.functions._replace(metrics=None), full.takes_out)
    params = full.init(np.random.default_rng(0), data.example(32))
    expected = evaluate(full, params, data.x_test, data.y_test)
    assert list(expected) == ["loss", "accuracy"]
    assert evaluate(bare, params, data.x_test, data.y_test) == pytest.approx(expected)


def constant(scores: Array, metrics: Any = None) -> Model:
    """Predicts `scores[i]` for the example x[i] = i; its loss is the mean of x."""

    def predict(params: Any, x: Array) -> Array:
        return scores[x[:, 0].astype(int)]

    def gradients(params: Any, x: Array, y: Array) -> Any:
        return x.mean(), {"w": np.zeros(1)}

    return Model("m", Functions(len, predict, gradients, metrics), False)


X = np.arange(250.0).reshape(250, 1)
Y = np.arange(250) % 2
PARAMS = {"w": np.zeros(1)}


def test_accuracy_needs_scores_by_class_and_class_numbers(chunks_of_100: None) -> None:
    right = np.eye(2)[Y]
    assert evaluate(constant(right), PARAMS, X, Y) == {"loss": 124.5, "accuracy": 1.0}
    assert evaluate(constant(right[::-1]), PARAMS, X, Y)["accuracy"] == 0.0
    for scores, y in [
        (right, Y.astype(float)),
        (right[:, :1], Y),
        (right[:, 0], Y),
        (right, Y[:, None]),
    ]:
        assert evaluate(constant(scores), PARAMS, X, y) == {"loss": 124.5}


def test_the_users_metrics_see_all_examples_at_once(chunks_of_100: None) -> None:
    def metrics(params: Any, x: Array, y: Array) -> Any:
        return {"median": np.median(x), "accuracy": np.float32(0.5)}

    found = evaluate(constant(np.eye(2)[Y], metrics), PARAMS, X, Y)
    assert found == {"loss": 124.5, "median": 124.5, "accuracy": 0.5}
    assert next(iter(found)) == "loss" and {type(value) for value in found.values()} == {float}


def test_the_users_own_loss_wins() -> None:
    found = evaluate(constant(X, lambda *_: {"f1": 1, "loss": 7}), PARAMS, X, Y)
    assert found == {"loss": 7.0, "f1": 1.0} and list(found) == ["loss", "f1"]


def test_a_model_that_is_not_finite_has_a_value_that_is_not() -> None:
    data = load_data("builtin", "digits")
    model = Model("mlp", mlp(), True)
    params = model.init(np.random.default_rng(0), data.example(32))
    params["W1"][0, 0] = np.nan
    assert np.isnan(evaluate(model, params, data.x_test, data.y_test)["loss"])


def test_predictions_of_another_length_are_refused() -> None:
    with pytest.raises(UserCodeError, match=r"m: predict returned shape \(1, 2\) for 250 examples"):
        evaluate(
            Model("m", constant(X).functions._replace(predict=lambda p, x: np.ones((1, 2))), False),
            PARAMS,
            X,
            Y,
        )


def test_training_examples_are_as_many_and_from_all_over_the_set() -> None:
    """Whatever the order of the set is: here sorted by class, and class by class in turn."""
    for order in (np.arange(400) // 100, np.arange(400) % 4):
        seen: list[Array] = []

        def metrics(params: Any, x: Array, y: Array, seen: list[Array] = seen) -> Any:
            assert x.flags.c_contiguous and y.flags.c_contiguous
            seen.append(y)
            return {"loss": 1.0, "accuracy": (y == 0).mean()}

        x = np.zeros((400, 2))
        data = Dataset("mine", x, order, x[:200], order[:200])
        found = evaluate_training(constant(x, metrics), PARAMS, data)
        assert found.keys() == {"training_loss", "training_accuracy"}
        assert found["training_accuracy"] == pytest.approx(0.25, abs=0.06) and len(seen[0]) == 200
        assert evaluate_training(constant(x, metrics), PARAMS, data) == found  # always the same
    few = Dataset("mine", x[:100], order[:100], x, order)  # fewer than are held out: all of them
    evaluate_training(constant(x, metrics), PARAMS, few)
    assert len(seen[-1]) == 100


def test_training_examples_that_are_pixels_stay_bytes() -> None:
    raw = np.arange(250, dtype=np.uint8).reshape(250, 1, 1)
    seen: list[Any] = []

    def gradients(params: Any, x: Array, y: Array) -> Any:
        seen.append(x.ravel())
        return x.mean(), {"w": np.zeros(1)}

    model = Model("m", Functions(len, lambda params, x: x[:, 0, 0], gradients, None), False)
    pixels = Pixels(raw), Pixels(raw[:50])
    data = Dataset("photos", pixels[0], Y * 1.0, pixels[1], Y[:50] * 1.0)
    found = evaluate_training(model, PARAMS, data)
    values = np.concatenate(seen)
    assert len(set(values)) == 50 and (np.diff(values) > 0).all()
    assert found == {"training_loss": pytest.approx(values.mean())}
