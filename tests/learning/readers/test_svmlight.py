"""SVMlight's format, as scikit-learn writes it and as people do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.readers import svmlight

Array = np.ndarray[Any, Any]


def read(path: Path, **options: object) -> tuple[Array, Array]:
    """All examples in the order of their first column."""
    data = load_data("svmlight", path=path, options=options)
    x, y = np.concatenate([data.x, data.x_test]), np.concatenate([data.y, data.y_test])
    order = np.argsort(x[:, 0])
    return x[order], y[order]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.svm"
    path.write_text(text)
    return path


@pytest.mark.parametrize("zero_based", [True, False])
def test_what_scikit_learn_writes(tmp_path: Path, zero_based: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 7)) * (rng.random((50, 7)) < 0.5)
    x[:, 0] = np.arange(50) + 1
    y = rng.integers(0, 4, 50)
    path = tmp_path / "digits.libsvm"
    dump_svmlight_file(x, y, str(path), zero_based=zero_based, comment="made for a test")
    found, labels = read(path)
    theirs, _ = load_svmlight_file(str(path))
    np.testing.assert_allclose(found, x, rtol=1e-6)
    np.testing.assert_allclose(found, theirs.toarray(), rtol=1e-6)
    assert (found.dtype, labels.dtype) == (np.float32, np.int64)
    assert labels.tolist() == y.tolist()


def test_comments_empty_lines_queries_and_examples_without_values(tmp_path: Path) -> None:
    text = "# by hand\n\n2 1:1 3:.5 # first\n0 qid:7 1:2\n 1\t1:-1 2:1e-3 \r\n-0\n3 1:3 3:0\n"
    x, y = read(written(tmp_path, text))
    assert x.tolist() == [[-1, np.float32(1e-3), 0], [0, 0, 0], [1, 0, 0.5], [2, 0, 0], [3, 0, 0]]
    assert sorted(y) == [0, 0, 1, 2, 3]


def test_the_pair_of_labels_of_two_classes(tmp_path: Path) -> None:
    lines = [f"{'+1' if i % 2 else '-1'} 1:{i}" for i in range(10)]
    _, y = read(written(tmp_path, "\n".join(lines)))
    assert y.tolist() == [0, 1] * 5 and y.dtype == np.int64
    _, y = read(written(tmp_path, "\n".join([*lines, "0.5 1:11"])))
    assert y.dtype == np.float32 and y[0] == -1


def test_columns_as_many_as_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join(f"1 1:{i} 4:1" for i in range(9)))
    assert read(path)[0].shape == (9, 4)
    assert read(path, features=6)[0].shape == (9, 6)
    message = "a.svm:1: index 4 is beyond the 3 features .indices count from 1 here"
    with pytest.raises(UserCodeError, match=message):
        read(path, features=3)


GOOD = "".join(f"1 1:{i}\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.svm: there are no examples"),
        ("# nothing\n\n", "a.svm: there are no examples"),
        ("1\n0\n", "a.svm: no example has a value"),
        (GOOD + "cat 1:2\n", "a.svm:10: label: 'cat' is not a number"),
        (GOOD + "1,3 1:2\n", "a.svm:10: label: '1,3' is not a number"),
        (GOOD + "nan 1:2\n", "a.svm:10: label: nan is not finite"),
        (GOOD + "1 3\n", "a.svm:10: '3' is not index:value"),
        (GOOD + "1 1.5:2\n", "a.svm:10: '1.5:2' is not index:value"),
        (GOOD + "1 -1:2\n", "a.svm:10: '-1:2' is not index:value"),
        (GOOD + "1 99999999999:2\n", "a.svm:10: '99999999999:2' is not index:value"),
        (GOOD + "1 1:\n", "a.svm:10: value of index 1: '' is not a number"),
        (GOOD + "1 1:2:3\n", "a.svm:10: value of index 1: '2:3' is not a number"),
        (GOOD + "1 1:x\n", "a.svm:10: value of index 1: 'x' is not a number"),
        (GOOD + "1 1:inf\n", "a.svm:10: value of index 1: inf is not finite"),
        (GOOD + "1 1:1e39\n", "a.svm:10: value of index 1: 1e39 is not finite as float32"),
        (GOOD + "1 3:1 2:1\n", "a.svm:10: index 2 comes after 3; indices must ascend"),
        (GOOD + "1 3:1 3:1\n", "a.svm:10: index 3 comes after 3"),
        ("1 1:2\n", "a.svm: 1 examples are too few"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        read(written(tmp_path, text))
    assert caught.value.exit_code == 6


def test_what_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svmlight, "MAX_DENSE_BYTES", 1 << 30)
    path = written(tmp_path, GOOD + "1 99999999:1\n")
    with pytest.raises(UserCodeError, match=r"10 examples of 99999999 .* than 1 GB .* a.svm:10"):
        read(path)


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    binary = tmp_path / "b.svm"
    binary.write_bytes(b"\x1f\x8b\x08\x00\xff\xff")
    for path in (binary, tmp_path / "missing.svm"):
        with pytest.raises(UserCodeError, match=f"{path.name}: not a readable file of SVMlight"):
            read(path)


def test_svmlight_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "marked"
    path.write_text("\ufeff1 1:1\n" + "2 1:3\n" * 9)
    assert load_data("svmlight", path=path).examples == 8


def test_where_indices_begin_may_be_said(tmp_path: Path) -> None:
    """A part of a file that counts from 0 may happen to have no index 0."""
    path = tmp_path / "part.svm"
    path.write_text("1 1:5 3:7\n0 2:1\n1 1:2\n0 1:3\n1 2:2\n")
    for zero_based, place in ((True, 1), (False, 0), (None, 0)):
        data = load_data("svmlight", path=path, options={"features": 4, "zero_based": zero_based})
        both = np.concatenate([data.x, data.x_test])
        assert both[both[:, place] == 5].any() and both.shape == (5, 4)
    path.write_text("1 1:5\n0 0:1\n")
    with pytest.raises(UserCodeError, match=r"part\.svm:2: index 0, but they count from 1"):
        load_data("svmlight", path=path, options={"zero_based": False, "test_fraction": 0.5})
