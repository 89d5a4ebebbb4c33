"""Tables of text, and a sentence for each way one can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.datasets import Dataset

Array = np.ndarray[Any, Any]


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
    x, y, data = from_csv(tmp_path, text)
    assert len(x) == 10 and y.tolist() == [i % 3 for i in range(10)]
    assert data.columns == ("row", "quarter")
    x, y, data = from_csv(tmp_path, text, label="quarter")
    assert data.columns == ("row", "class")
    assert x[:, 1].tolist() == [i % 3 for i in range(10)]
    assert y.tolist() == [i / 4 for i in range(10)] and y.dtype == np.float32
    _, y, _ = from_csv(tmp_path, text, label=1)
    assert y[1] == 0.25


@pytest.mark.parametrize(
    "head", [[], ["row,row,class"], ["row,,class"], [f"row,{'q' * (1 << 16)},class"]]
)
def test_columns_without_names_of_their_own_have_none(tmp_path: Path, head: list[str]) -> None:
    _, _, data = from_csv(tmp_path, "\n".join([*head, *ROWS]))
    assert data.columns == () and len(data.x) == 8


NAMED = [f"n{i},{i},{kind},{i / 4}" for i, kind in enumerate("abcabcabca")]


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (["id,row,kind,quarter"], {"label": "kind", "ignore": ["id"]}),
        (["id,row,kind,quarter"], {"label": 2, "ignore": [0]}),
        ([], {"label": -2, "ignore": [-4]}),
    ],
)
def test_columns_that_are_ignored_may_hold_anything(
    tmp_path: Path, head: list[str], options: dict[str, Any]
) -> None:
    x, y, data = from_csv(tmp_path, "\n".join([*head, *NAMED]), **options)
    assert x.tolist() == [[i, i / 4] for i in range(10)]
    assert y.tolist() == [0, 1, 2] * 3 + [0] and data.classes == ("a", "b", "c")
    assert data.columns == (("row", "quarter") if head else ())


def test_what_is_ignored_makes_no_header(tmp_path: Path) -> None:
    rows = ["A5,1,0", "113803,2,1", *(f"{i},{i},{i % 2}" for i in range(3, 11))]
    x, _, data = from_csv(tmp_path, "\n".join(rows), ignore=[0])
    assert x[:, 0].tolist() == list(range(1, 11)) and data.columns == ()


@pytest.mark.parametrize(
    ("ignore", "rows", "message"),
    [
        (["name"], [], r"no column 'name'"),
        ([4], [], r"no column 4, it has 4"),
        (["kind"], [], r"the label's column 'kind' is to be ignored"),
        (["id", 1, "quarter"], [], r"no column is left that would be a feature"),
        (["id"], ["n10,10,a"], r"table\.csv:12: the row has 3 cells, those above have 4"),
        (["id"], ["n10,ten,a,2"], r"table\.csv:12: column 'row': 'ten' is not a number"),
    ],
)
def test_columns_that_cannot_be_ignored(
    tmp_path: Path, ignore: list[Any], rows: list[str], message: str
) -> None:
    text = "\n".join(["id,row,kind,quarter", *NAMED, *rows])
    with pytest.raises(UserCodeError, match=message):
        from_csv(tmp_path, text, label="kind", ignore=ignore)


def test_csv_with_labels_of_text(tmp_path: Path) -> None:
    kinds = ["setosa", '"virginica"', " versicolor"]
    rows = [f"{i};{kinds[i % 3]}" for i in range(9)]
    _, y, data = from_csv(tmp_path, "\n".join(rows), delimiter=";", test_fraction=0.3)
    assert y.tolist() == [0, 2, 1] * 3  # in alphabetical order
    assert data.classes == ("setosa", "versicolor", "virginica")
    _, y, _ = from_csv(tmp_path, "\n".join(["a;b", *rows]), delimiter=";")
    assert len(y) == 9


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "table.csv: the file is empty"),
        ("a,b\n1,2\n", {"label": "a"}, "1 examples are too few"),
        ("a,b\n\n", {"label": "a"}, "there are no rows below the header"),
        ("\n".join([*ROWS, "1,,2"]), {}, "table.csv:11: column 2: '' is not a number$"),
        (
            "\n".join(["row,age,class", *ROWS, "1,abc,2"]),
            {},
            "table.csv:12: column 'age': 'abc' is not a number$",
        ),
        (
            "\n".join(["age,kind", "1,a", "2,b", "", "x,a"]),
            {},
            "table.csv:5: column 'age': 'x' is not a number$",
        ),
        (
            "\n".join(["a,b,c", "", *ROWS, "1,2"]),
            {},
            "table.csv:13: the row has 2 cells, those above",
        ),
        (
            "\n".join([*ROWS, "1,2,3,4"]),
            {},
            "table.csv:11: the row has 4 cells, those above have 3",
        ),
        ("1,2,3\n1,2\n", {}, "the first row has 3 cells, the second 2"),
        ("a,b\n1,2\n", {"label": "c"}, "no column 'c'"),
        ("1,2\n1,2\n", {"label": 2}, "no column 2, it has 2"),
        ("1,2\n1,2\n", {"label": -3}, "no column -3"),
        ("\n".join([*ROWS, "", "5,1e99,1"]), {}, r"table.csv:12: column 2: 1e\+99 is not finite"),
        ("\n".join(["a,b,c", "5,nan,1", *ROWS]), {}, "table.csv:2: column 'b': nan is not finite"),
        ("\n".join([*ROWS, "5,1,inf"]), {}, "table.csv:11: column 3: inf is not finite"),
        ("\n".join(f"{i}" for i in range(9)), {}, "one column is not enough"),
    ],
)
def test_csv_that_cannot_be_used(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserCodeError, match=message):
        from_csv(tmp_path, text, **options)


@pytest.mark.parametrize(("head", "ignore"), [(["row,id,kind"], "id"), ([], "1")])
def test_a_text_that_is_no_number_can_be_left_out(
    tmp_path: Path, head: list[str], ignore: str
) -> None:
    rows = [f"{i},{i},{i % 2}" for i in range(9)]
    with pytest.raises(UserCodeError, match="'n9' is not a number") as caught:
        from_csv(tmp_path, "\n".join([*head, *rows, "9,n9,1"]))
    assert caught.value.remedy.endswith(f"or the column left out: ignore: [{ignore}]")


def test_csv_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"not a readable \.csv file"):
        load_data("csv", path=tmp_path / "missing.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(UserCodeError, match=r"not a readable \.csv file"):
        load_data("csv", path=binary)


def test_csv_that_begins_with_lines_of_spaces(tmp_path: Path) -> None:
    x, _, _ = from_csv(tmp_path, "  \n" + ROWS[0] + "\n \n" + "\n".join(ROWS[1:]))
    assert x.tolist() == [[i, i / 4] for i in range(10)]


def test_csv_that_is_no_text_further_down(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"1,2\n" * 10_000 + b"1,\xe4\n")
    with pytest.raises(UserCodeError, match=r"table\.csv: not a readable \.csv file"):
        load_data("csv", path=path)
