"""The data sets: the same everywhere, and a sentence for each way a file can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.checks import check_dataset
from dsgd_cli.learning.datasets import DIGITS, Dataset, hold_out

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


# ---- npz


def test_npz_with_a_test_set(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    np.savez(path, x=x, y=y, x_test=x[:2], y_test=y[:2], more=np.zeros(1))
    data = load_data("npz", path=path)
    np.testing.assert_array_equal(data.x, x)
    np.testing.assert_array_equal(data.y_test, [0, 1])
    assert data.name == "data.npz"


def test_npz_without_a_test_set_holds_the_same_part_out_each_time(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    y = np.arange(20)
    np.savez(path, x=np.c_[y, y], y=y)
    data = load_data("npz", path=path, options={"test_fraction": 0.25})
    assert (len(data.x), len(data.x_test)) == (15, 5)
    assert sorted([*data.y, *data.y_test]) == list(range(20))
    assert (data.x[:, 0] == data.y).all() and (data.x_test[:, 1] == data.y_test).all()
    assert data.y_test.tolist() == np.random.RandomState(20).permutation(20)[:5].tolist()


def test_too_few_examples_to_hold_any_out() -> None:
    for n, fraction in ((0, 0.2), (1, 0.5), (2, 0.2)):
        with pytest.raises(UserCodeError, match=f"{n} examples are too few to hold out"):
            hold_out("d", np.zeros((n, 1)), np.zeros(n), fraction)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 2))}, "data.npz: no array 'y'; it has x"),
        ({"images": np.zeros((2, 2)), "y": np.zeros(2)}, "no array 'x'; it has images, y"),
        (
            {"x": np.zeros((9, 2)), "y": np.zeros(9), "x_test": np.zeros((9, 2))},
            "only one of x_test and y_test",
        ),
        ({"x": np.zeros((9, 2)), "y": np.zeros(8)}, r"x has shape \(9, 2\), y has shape \(8,\)"),
        ({"x": np.array([[1, None]]), "y": np.zeros(1)}, "not a readable .npz file"),
        ({"x": np.array(["a"] * 9), "y": np.zeros(9)}, "x has dtype <U1, it must hold numbers"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserCodeError, match=message) as caught:
        load_data("npz", path=path)
    assert caught.value.exit_code == 6


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    text, npy = tmp_path / "a.npz", tmp_path / "b.npz"
    text.write_text("x,y\n")
    with npy.open("wb") as file:
        np.save(file, np.zeros(3))
    cut = tmp_path / "c.npz"
    np.savez(cut, x=np.zeros(100), y=np.zeros(100))
    cut.write_bytes(cut.read_bytes()[:300])
    for path in (text, npy, cut, tmp_path / "missing.npz"):
        with pytest.raises(UserCodeError, match=f"{path.name}: not a readable .npz file"):
            load_data("npz", path=path)


# ---- csv


def from_csv(tmp_path: Path, text: str, **options: object) -> tuple[Array, Array, Dataset]:
    """All x and y in the file's order (the first column counts the rows), and the data set."""
    path = tmp_path / "table.csv"
    path.write_text(text)
    data = load_data("csv", path=path, options=options)
    x, y = np.concatenate([data.x, data.x_test]), np.concatenate([data.y, data.y_test])
    order = np.argsort(x[:, 0])
    return x[order], y[order], data


ROWS = [f"{i},{i / 4},{i % 3}" for i in range(10)]


def test_csv_without_a_header(tmp_path: Path) -> None:
    x, y, data = from_csv(tmp_path, "\n".join(ROWS))
    assert x.tolist() == [[i, i / 4] for i in range(10)] and x.dtype == np.float32
    assert y.tolist() == [i % 3 for i in range(10)] and y.dtype == np.int64
    assert len(data.x_test) == 2


def test_csv_with_a_header_a_mark_and_empty_lines(tmp_path: Path) -> None:
    text = "\ufeff\r\n" + "\r\n".join(["row,quarter,class", *ROWS, "", ""])
    x, y, _ = from_csv(tmp_path, text)
    assert len(x) == 10 and y.tolist() == [i % 3 for i in range(10)]
    x, y, _ = from_csv(tmp_path, text, label="quarter")
    assert x[:, 1].tolist() == [i % 3 for i in range(10)]
    assert y.tolist() == [i / 4 for i in range(10)] and y.dtype == np.float32
    _, y, _ = from_csv(tmp_path, text, label=1)
    assert y[1] == 0.25


def test_csv_with_labels_of_text(tmp_path: Path) -> None:
    kinds = ["setosa", '"virginica"', " versicolor"]
    rows = [f"{i};{kinds[i % 3]}" for i in range(9)]
    _, y, _ = from_csv(tmp_path, "\n".join(rows), delimiter=";", test_fraction=0.3)
    assert y.tolist() == [0, 2, 1] * 3  # in alphabetical order
    _, y, _ = from_csv(tmp_path, "\n".join(["a;b", *rows]), delimiter=";")
    assert len(y) == 9


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "table.csv: the file is empty"),
        ("a,b\n1,2\n", {"label": "a"}, "1 examples are too few"),
        ("a,b\n\n", {"label": "a"}, "there are no rows below the header"),
        ("\n".join([*ROWS, "1,,2"]), {}, "table.csv:11: could not convert string '' to float64$"),
        ("\n".join(["a,b,c", "", *ROWS, "1,2"]), {}, "table.csv:13: "),
        ("\n".join([*ROWS, "1,2,3,4"]), {}, "table.csv:11: "),
        ("1,2,3\n1,2\n", {}, "the first row has 3 cells, the second 2"),
        ("a,b\n1,2\n", {"label": "c"}, "no column 'c'"),
        ("1,2\n1,2\n", {"label": 2}, "no column 2, it has 2"),
        ("1,2\n1,2\n", {"label": -3}, "no column -3"),
        ("\n".join(["5,1e99,1", *ROWS]), {}, r"x\w*\[\d+, 1\] is inf \(1 of"),
        ("\n".join(["5,nan,1", *ROWS]), {}, r"x\w*\[\d+, 1\] is nan \(1 of"),
        ("\n".join(f"{i}" for i in range(9)), {}, "one column is not enough"),
    ],
)
def test_csv_that_cannot_be_used(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserCodeError, match=message):
        from_csv(tmp_path, text, **options)


def test_csv_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"not a readable \.csv file"):
        load_data("csv", path=tmp_path / "missing.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(UserCodeError, match=r"not a readable \.csv file"):
        load_data("csv", path=binary)


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
