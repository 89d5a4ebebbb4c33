"""The data sets: the same everywhere, and a sentence for each way a file can be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning import datasets
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.checks import check_dataset
from dsgd_cli.learning.datasets import DIGITS, Dataset, hold_out, pieces

Array = np.ndarray[Any, Any]


def test_digits_are_the_known_ones() -> None:
    data = load_data("builtin", "digits")
    assert (data.x.shape, data.x_test.shape) == ((1437, 64), (360, 64))
    assert (data.x.dtype, data.y.dtype, data.examples) == (np.float32, np.int64, 1437)
    assert (data.x.min(), data.x.max()) == (0, 1)
    everything = np.concatenate([data.y, data.y_test])
    assert np.bincount(everything).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(data.y_test).min() >= 25  # each digit is held out
    # the split and the numbers are the same on every host and in every version of dsgd
    assert data.digest() == "f03b9e3e" + data.digest()[8:]
    assert data.digest() == load_data("builtin", "digits").digest()


def test_digits_are_split_and_not_shared() -> None:
    data = load_data("builtin", "digits")
    with np.load(DIGITS) as raw:
        x = raw["x"]
    rows = sorted(map(bytes, (np.concatenate([data.x, data.x_test]) * 16).astype(np.uint8)))
    assert rows == sorted(map(bytes, x))


def test_digits_come_with_their_attribution() -> None:
    text = DIGITS.with_name("ATTRIBUTION.txt").read_text()
    assert "Alpaydin" in text and "Kaynak" in text and "CC BY 4.0" in text


def test_the_example_shows_every_class() -> None:
    y = np.array([3, 3, 3, 0, 3, 1, 3, 2])
    data = Dataset("d", np.arange(8.0).reshape(8, 1), y, np.ones((1, 1)), np.ones(1, int))
    x, labels = data.example(2)
    assert x[:, 0].tolist() == [0, 1, 3, 5, 7] and labels.tolist() == [3, 3, 0, 1, 2]
    assert len(data.example(100)[0]) == 8
    floats = Dataset("d", data.x, y.astype(float), data.x_test, data.y_test)
    assert len(floats.example(2)[0]) == 2


def test_floats_take_the_dtype_of_the_run_and_integers_stay() -> None:
    x64, y, x8 = np.ones((3, 2)), np.arange(3), np.ones((3, 2), np.uint8)
    data = Dataset("d", x64, y, x8, y).as_dtype("float32")
    assert [a.dtype for a in (data.x, data.y, data.x_test)] == ["float32", "int64", "uint8"]
    assert data.as_dtype("float32").x is data.x and data.y is y


def test_a_number_too_large_for_the_dtype_of_the_run() -> None:
    x, y = np.full((2, 1), 1e99), np.arange(2)
    with pytest.raises(UserCodeError, match="d: a number is too large for float32"):
        Dataset("d", x, y, x, y).as_dtype("float32")


def test_the_digest_sees_numbers_shapes_and_dtypes() -> None:
    x, y = np.zeros((4, 2), np.float32), np.arange(4)
    base = Dataset("a", x, y, x, y)
    assert base.digest() == Dataset("b", x.copy(), y, x, y).digest()
    changed = x.copy()
    changed[3, 1] = 1e-30
    for other in (
        Dataset("a", changed, y, x, y),
        Dataset("a", x.reshape(4, 1, 2), y, x, y),
        Dataset("a", x.astype("float64"), y, x, y),
        Dataset("a", x, y[::-1], x, y),
    ):
        assert other.digest() != base.digest()


def test_too_few_examples_to_hold_any_out() -> None:
    for n, fraction in ((0, 0.2), (1, 0.5), (2, 0.2)):
        with pytest.raises(UserCodeError, match=f"{n} examples are too few to hold out"):
            hold_out("d", np.zeros((n, 1)), np.zeros(n), fraction)


# ---- what every data set must be

X, Y = np.zeros((3, 2)), np.zeros(3, int)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((X[:0], Y[:0], X, Y), "d: x has no examples"),
        ((X, Y, X[:0], Y[:0]), "d: x_test has no examples"),
        ((X, Y[:2], X, Y), "d: 3 examples in x, but 2 in y"),
        ((X, Y, X, Y[:2]), "d: 3 examples in x_test, but 2 in y_test"),
        ((X, Y, X[:, :1], Y), r"an example of x has shape \(2,\), one of x_test \(1,\)"),
        ((X, Y[:, None], X, Y), r"an example of y has shape \(1,\), one of y_test \(\)"),
        ((X.astype(object), Y, X, Y), "x has dtype object, it must hold numbers"),
        ((X.astype(complex), Y, X, Y), "x has dtype complex128, it must hold numbers"),
        ((X, Y.astype("U1"), X, Y), "y has dtype <U1, it must hold numbers"),
        ((X, Y.astype("datetime64[s]"), X, Y), "y has dtype datetime64"),
        ((np.array(1.0), Y, X, Y), "x is a single number"),
        (([[1]], Y, X, Y), "x is a list, it must be an array"),
        ((X + np.inf, Y, X, Y), r"d: x\[0, 0\] is inf \(6 of 6 are not finite\)"),
        ((X[:, :0], Y, X[:, :0], Y), "no numbers"),
    ],
)
def test_a_data_set_that_cannot_be_used(arrays: tuple[Array, ...], message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        check_dataset(Dataset("d", *arrays))


def test_a_good_data_set_passes() -> None:
    data = Dataset("d", X, Y, X[:1], Y[:1])
    assert check_dataset(data) is data


def test_pieces_are_all_examples_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "PIECE_BYTES", 100)
    for array in (np.arange(70.0), np.ones((7, 300)), np.ones((9, 2, 3)), np.ones((70, 0))):
        rows = list(pieces(array))
        np.testing.assert_array_equal(np.concatenate([array[some] for some in rows]), array)
        assert all(len(array[some]) == 1 or array[some].nbytes <= 100 for some in rows)
    assert len(list(pieces(np.arange(70.0)))) == 6


def test_what_is_looked_at_in_pieces_is_seen_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).random((50, 3)), np.arange(50)
    data = Dataset("d", x, y, x[::-2], y[::-2])
    whole = data.digest(), data.as_dtype("float32").x
    monkeypatch.setattr(datasets, "PIECE_BYTES", 100)
    assert (data.digest(), data.as_dtype("float32").x.tolist()) == (whole[0], whole[1].tolist())
    x[40, 1] = 1e99
    with pytest.raises(UserCodeError, match="d: a number is too large for float32"):
        data.as_dtype("float32")
    x[40, 1] = np.nan
    with pytest.raises(UserCodeError, match=r"d: x\[40, 1\] is nan \(1 of 150 are not finite\)"):
        check_dataset(data)
