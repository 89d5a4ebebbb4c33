"""Bytes that look like numbers from 0 to 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import forget, load_model
from dsgd_cli.learning.checks import check_dataset
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.evaluate import evaluate
from dsgd_cli.learning.pixels import Pixels
from dsgd_cli.learning.probe import probe

RAW = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), np.uint8)
Y = np.arange(30) % 3


def dataset(source: str = "") -> Dataset:
    return Dataset("d", Pixels(RAW, source=source), Y, Pixels(RAW[:9], source=source), Y[:9])


def test_what_is_taken_is_a_float_array_from_0_to_1() -> None:
    raw = np.array([[0, 51, 255]], np.uint8)
    for dtype in ("float32", "float64"):
        pixels = Pixels(raw).astype(dtype)
        for taken in (pixels[0:1], pixels.take(np.array([0])), np.asarray(pixels)):
            assert taken.tolist() == [[0, np.dtype(dtype).type(0.2), 1]] and taken.dtype == dtype
        assert pixels.raw is raw
    assert np.asarray(Pixels(raw), np.float64).dtype == np.float64
    assert (len(Pixels(RAW)), Pixels(RAW).shape, Pixels(RAW).ndim) == (30, (30, 4, 5, 3), 4)


def test_a_data_set_of_pixels_is_one_like_others() -> None:
    data = check_dataset(dataset())
    x, labels = data.example(2)
    np.testing.assert_array_equal(x, RAW[:3] / np.float32(255))
    assert labels.tolist() == [0, 1, 2]
    wide = data.as_dtype("float64")
    assert isinstance(wide.x, Pixels) and wide.x.raw is RAW
    assert wide.x[:1].dtype == wide.x_test[:1].dtype == np.float64
    with pytest.raises(UserCodeError, match="29 examples in x, but 30 in y"):
        check_dataset(replace(data, x=Pixels(RAW[:29])))


def test_the_digest_is_of_the_bytes_or_of_what_they_were_made_from() -> None:
    assert dataset().digest() == dataset().digest()
    assert dataset().digest() != replace(dataset(), x=Pixels(RAW[::-1].copy())).digest()
    other = replace(dataset("files"), x=Pixels(RAW[::-1].copy(), source="files"))
    assert dataset("files").digest() == other.digest()
    assert dataset("files").digest() != dataset("others").digest() != dataset().digest()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_built_in_models_train_on_them(dtype: str) -> None:
    data = dataset().as_dtype(dtype)
    for name in ("softmax", "mlp"):
        made = probe(load_model("builtin", name), data, 0, dtype, 8)
        assert made.tensors[0][1][0] == 60 and set(made.metrics) == {"loss", "accuracy"}


def test_a_model_of_ones_own_sees_arrays(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "import numpy as np\n"
        "def init(rng, example):\n    return {'b': np.zeros(example[0].ndim)}\n"
        "def predict(params, x):\n    return x\n"
        "def gradients(params, x, y):\n"
        "    assert type(x) is np.ndarray\n    return 1.0, {'b': params['b']}\n"
        "def metrics(params, x, y):\n"
        "    assert type(x) is np.ndarray\n    return {'mean': x.mean()}\n"
    )
    data, params = dataset(), {"b": np.zeros(4)}
    values = evaluate(load_model("file", path=path), params, data.x_test, data.y_test)
    forget()
    assert values == {"loss": 1.0, "mean": pytest.approx(RAW[:9].mean() / 255, rel=1e-5)}
