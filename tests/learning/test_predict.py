"""Outputs of a trained model: of which examples, in which order, and what does not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dsgd_cli.contract.errors import DsgdError, UserCodeError
from dsgd_cli.learning.adapters import forget, load_data
from dsgd_cli.learning.models import softmax
from dsgd_cli.learning.predict import predict
from dsgd_cli.learning.tensors import read_tensors

Array = np.ndarray[Any, Any]
DIGITS = {"kind": "builtin", "name": "digits", "options": {}}
SOFTMAX = {"kind": "builtin", "name": "softmax", "options": {"l2": 0.0}}


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """Some softmax regression of the digits."""
    rng = np.random.default_rng(3)
    path = tmp_path / "model.safetensors"
    params = {"W1": rng.standard_normal((64, 10)), "b1": rng.standard_normal(10)}
    save_file({name: array.astype(np.float32) for name, array in params.items()}, path)
    return path


def order(model_file: Path, **more: Any) -> dict[str, Any]:
    data, path = more.pop("data", DIGITS), more.pop("path", None)
    return {
        "model_file": str(model_file),
        "train": {
            "model": more.pop("model", SOFTMAX),
            "data": data,
            "dtype": "float32",
            "batch_size": 32,
            "algorithm": {"name": "downpour"},
        },
        "seed": 0,
        "files": {"model": more.pop("model_path", None), "data": path and str(path)},
        "own": True,
        "labels": True,
        "classes": [],
        "columns": [],
        "label": "",
        "part": None,
        "out": None,
        **more,
    }


def expected(model_file: Path, x: Array) -> Array:
    return np.asarray(softmax().predict(read_tensors(model_file), x))


def npz(path: Path, **arrays: Array) -> dict[str, Any]:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return {"data": {"kind": "npz", "name": "", "options": {"test_fraction": 0.2}}, "path": path}


@pytest.mark.parametrize(("part", "count"), [(None, 360), ("training", 1437), ("all", 1797)])
def test_the_part_that_was_asked_for(model_file: Path, part: str | None, count: int) -> None:
    out = model_file.with_name("out.npz")
    said = predict(order(model_file, part=part, out=str(out)))
    assert (said["part"], said["examples"]) == (part or "held-out", count)
    assert said["outputs"] == [count, 10]
    data = load_data("builtin", "digits")
    x = {None: data.x_test, "training": data.x, "all": np.concatenate([data.x, data.x_test])}[part]
    with np.load(out) as arrays:
        assert np.allclose(arrays["outputs"], expected(model_file, x), atol=1e-6)
        assert np.array_equal(arrays["classes"], arrays["outputs"].argmax(axis=1))


def test_another_file_is_answered_row_by_row(model_file: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.random((7, 64), np.float32), np.array([3, 1, 4, 1, 5, 9, 2])
    out = tmp_path / "out.npz"
    said = predict(
        order(model_file, **npz(tmp_path / "new.npz", x=x, y=y), own=False, out=str(out))
    )
    assert (said["part"], said["data"], said["examples"]) == ("all", "new.npz", 7)
    with np.load(out) as arrays:
        assert np.allclose(arrays["outputs"], expected(model_file, x), atol=1e-6)
        assert said["metrics"]["accuracy"] == (arrays["classes"] == y).mean()


def test_rows_of_a_csv_stay_in_their_order(model_file: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((2, 64))
    path = tmp_path / "new.csv"
    np.savetxt(path, np.column_stack([x, [7, 8]]), delimiter=",")
    data = {"kind": "csv", "name": "", "options": {"label": -1, "delimiter": ","}}
    out = tmp_path / "out.csv"
    said = predict(order(model_file, data=data, path=path, own=False, out=str(out)))
    assert said["examples"] == 2
    head, *rows = out.read_text().splitlines()
    assert head == ",".join([*(f"output_{number}" for number in range(10)), "class"])
    values = np.array([[float(cell) for cell in row.split(",")] for row in rows])
    assert np.allclose(values[:, :10], expected(model_file, x), atol=1e-5)
    assert np.array_equal(values[:, 10], values[:, :10].argmax(axis=1))


def mean_grey(tmp_path: Path) -> Path:
    """A model whose output is the mean grey value of an image."""
    source = tmp_path / "grey.py"
    source.write_text(
        "def init(rng, example): return {'W1': rng.random((64, 10)), 'b1': rng.random(10)}\n"
        "def predict(params, x): return 255 * x.mean(axis=(1, 2))\n"
        "def gradients(params, x, y): return 0.5, params\n"
    )
    return source


@pytest.mark.parametrize(("own", "part"), [(False, None), (True, "all")])
def test_images_of_a_folder_are_answered_class_by_class_in_the_order_of_their_names(
    own: bool,
    part: str | None,
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind, shade in (("black", 0), ("grey", 100), ("white", 200)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "photos" / kind / f"{i}.png"
            Image.new("L", (8, 8), shade + i).save(path)
    options = {"size": [8, 8], "grey": True, "test_fraction": 0.25}
    out = tmp_path / "out.npz"
    said = predict(
        order(
            model_file,
            data={"kind": "images", "name": "", "options": options},
            path=tmp_path / "photos",
            model={"kind": "file", "name": "", "options": {}},
            model_path=str(mean_grey(tmp_path)),
            own=own,
            part=part,
            out=str(out),
        )
    )
    forget()
    assert (said["part"], said["examples"]) == ("all", 12)
    with np.load(out) as arrays:
        shades = [shade + i for shade in (0, 100, 200) for i in range(4)]
        assert np.allclose(arrays["outputs"], shades, atol=1e-3)


@pytest.mark.parametrize(("test_set", "part", "count"), [(False, "all", 5), (True, "held-out", 2)])
def test_a_folder_of_idx_files_is_whole_without_a_test_set(
    test_set: bool, part: str, count: int, model_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for name, n in (("train", 5), *([("t10k", 2)] if test_set else [])):
        shades = np.arange(n, dtype=np.uint8)
        images = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 8, 8) + np.repeat(shades, 64).tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, n) + shades.tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    out = tmp_path / "out.npz"
    said = predict(
        order(
            model_file,
            data={"kind": "idx", "name": "", "options": {"test_fraction": 0.2}},
            path=folder,
            model={"kind": "file", "name": "", "options": {}},
            model_path=str(mean_grey(tmp_path)),
            own=False,
            out=str(out),
        )
    )
    forget()
    assert (said["part"], said["examples"]) == (part, count)
    with np.load(out) as arrays:
        assert np.allclose(arrays["outputs"], np.arange(count), atol=1e-3)


def test_examples_without_labels_have_outputs_and_no_metrics(
    model_file: Path, tmp_path: Path
) -> None:
    new = npz(tmp_path / "new.npz", x=np.ones((1, 64)))
    said = predict(order(model_file, **new, own=False))
    assert (said["examples"], said["metrics"]) == (1, None)


def test_a_model_that_is_made_in_init_has_outputs_of_examples_without_labels(
    model_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "made.py"
    source.write_text(
        "made = []\n"
        "def init(rng, example): made.append(example); return {}\n"
        "def predict(params, x): return x @ params['W1'] * len(made)\n"
        "def gradients(params, x, y): return 0.5, params\n"
    )
    model = {"kind": "file", "name": "", "options": {}}
    out = tmp_path / "out.npz"
    new = npz(tmp_path / "new.npz", x=np.ones((3, 64)))
    predict(order(model_file, **new, own=False, model=model, model_path=str(source), out=str(out)))
    forget()
    with np.load(out) as arrays:
        assert np.allclose(arrays["outputs"], read_tensors(model_file)["W1"].sum(axis=0), 1e-4)


def test_held_out_examples_of_another_file_are_taken_if_it_has_some(
    model_file: Path, tmp_path: Path
) -> None:
    x, y = np.ones((5, 64)), np.arange(5)
    new = npz(tmp_path / "new.npz", x=x, y=y, x_test=x[:2], y_test=y[:2])
    said = predict(order(model_file, **new, own=False))
    assert (said["part"], said["examples"]) == ("held-out", 2)


def test_a_model_that_is_another_is_named(model_file: Path) -> None:
    mlp = {"kind": "builtin", "name": "mlp", "options": {"hidden": [16]}}
    with pytest.raises(UserCodeError, match="does not fit the model") as caught:
        predict(order(model_file, model=mlp))
    assert caught.value.details == (
        "the file has no W2",
        "the file has no b2",
        "W1 has shape (64, 10) in the file, (64, 16) in the model",
        "b1 has shape (10,) in the file, (16,) in the model",
    )


def test_examples_of_another_form_are_named(model_file: Path, tmp_path: Path) -> None:
    new = npz(tmp_path / "new.npz", x=np.ones((5, 63)), y=np.arange(5))
    with pytest.raises(UserCodeError, match=r"does not fit new\.npz") as caught:
        predict(order(model_file, **new, own=False))
    assert caught.value.details[0].startswith("W1 has shape (64, 10) in the file, (63, ")


def test_one_output_an_example_is_no_class(model_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "line.py"
    source.write_text(
        "def init(rng, example): return {'W1': rng.random((64, 10)), 'b1': rng.random(10)}\n"
        "def predict(params, x): return x.sum(axis=1)\n"
        "def gradients(params, x, y): return 0.5, params\n"
    )
    model = {"kind": "file", "name": "", "options": {}}
    out = tmp_path / "out.csv"
    said = predict(order(model_file, model=model, model_path=str(source), out=str(out)))
    forget()
    assert said["outputs"] == [360]
    assert said["metrics"] == {"loss": 0.5}
    assert out.read_text().startswith("output_0\n")


def header(entries: object, body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**40) + b"{}",
        header([]),
        header({"W": 1}),
        header({"W": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        header({"W": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"W": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
        header({"W": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserCodeError, match=r"not a whole \.safetensors file"):
        read_tensors(path)


def test_arrays_are_what_was_saved(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 3)), "one": np.array(2.0)}
    save_file(arrays, tmp_path / "some.safetensors", metadata={"dsgd.run": "x"})
    found = read_tensors(tmp_path / "some.safetensors")
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_a_place_that_cannot_be_written_is_a_sentence(model_file: Path) -> None:
    with pytest.raises(DsgdError, match="cannot write the outputs"):
        predict(order(model_file, out=f"{model_file}/out.npz"))


def three_classes(tmp_path: Path) -> Path:
    """A model whose class is the largest of three features."""
    path = tmp_path / "three.safetensors"
    save_file({"W1": np.eye(3, dtype=np.float32), "b1": np.zeros(3, np.float32)}, path)
    return path


def test_classes_are_numbered_as_in_the_run_and_written_by_name(tmp_path: Path) -> None:
    """Other data may lack some of the run's classes: that must not shift the numbers."""
    model = three_classes(tmp_path)
    names = ["cat", "dog", "eel"]
    rows = ["0,1,0,dog", "0,0,1,eel"] * 3
    path = tmp_path / "new.csv"
    path.write_text("\n".join(rows))  # dogs and eels alone
    data = {"kind": "csv", "name": "", "options": {}}
    told = {"data": data, "path": path, "own": False, "classes": names}
    said = predict(order(model, **told, out=str(tmp_path / "out.csv")))
    assert said["metrics"]["accuracy"] == 1.0
    written = (tmp_path / "out.csv").read_text().splitlines()
    assert [row.rpartition(",")[2] for row in written] == ["class", *["dog", "eel"] * 3]
    predict(order(model, **told, out=str(tmp_path / "out.npz")))
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["class_names"][arrays["classes"]].tolist() == ["dog", "eel"] * 3
    path.write_text("\n".join(rows).replace("eel", "emu"))
    with pytest.raises(UserCodeError, match="'emu' is none of the classes") as caught:
        predict(order(model, **told))
    assert caught.value.remedy == "they are cat, dog, eel"


def table(path: Path, text: str, **options: Any) -> dict[str, Any]:
    path.write_text(text)
    options = {"label": -1, "delimiter": ",", "test_fraction": 0.2, **options}
    return {"data": {"kind": "csv", "name": "", "options": options}, "path": path, "own": False}


def test_a_table_without_labels_does_not_fit_unless_that_is_said(tmp_path: Path) -> None:
    """Its last column is taken for the label, and what is left is not wide enough."""
    new = table(tmp_path / "new.csv", "\n".join(["0.5,1.5,0.25"] * 6))
    with pytest.raises(UserCodeError, match=r"does not fit new\.csv") as caught:
        predict(order(three_classes(tmp_path), **new))
    assert caught.value.remedy.endswith("if no column is their label: --no-labels")
    out = tmp_path / "out.csv"
    said = predict(order(three_classes(tmp_path), **new, labels=False, out=str(out)))
    assert (said["part"], said["examples"], said["metrics"]) == ("all", 6, None)
    assert [row[-2:] for row in out.read_text().splitlines()[1:]] == [",1"] * 6


@pytest.mark.parametrize("text", ["a;b;c\n1;2;0\n3;0;1\n", "a;b;c\n1;2;0\n\n3;0;1"])
def test_a_table_that_lacks_the_labels_column_has_none(tmp_path: Path, text: str) -> None:
    new = table(tmp_path / "new.csv", text, label="kind", delimiter=";")
    out = tmp_path / "out.npz"
    model = three_classes(tmp_path)
    said = predict(order(model, **new, classes=["x", "y", "z"], out=str(out)))
    assert (said["examples"], said["metrics"]) == (2, None)
    with np.load(out) as arrays:
        x = np.array([[1, 2, 0], [3, 0, 1]])
        assert np.allclose(arrays["outputs"], expected(model, x))
        assert arrays["class_names"][arrays["classes"]].tolist() == ["y", "x"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,2,0,4\n", "no column 'kind'"),  # no names at all: which of them would be missing?
        ("a,b,c\n1,x,3\n", r"new\.csv:2: column 'b': 'x' is not a number"),
        ("a,b,c\n1,nan,3\n", r"new\.csv:2: column 'b': nan is not finite"),
        ("a,b,c\n", "no rows below the header"),
        ("a,b\n1,2\n", "new.csv|shapes|matmul"),
        ("", "the file is empty"),
    ],
)
def test_a_table_without_labels_that_is_wrong_is_a_sentence(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(UserCodeError, match=why):
        predict(order(three_classes(tmp_path), **table(tmp_path / "new.csv", text, label="kind")))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("c,kind,b,a\n" + "2,y,0.5,0\n" * 2, {"label": "kind"}),
        ("c,b,a\n" + "2,0.5,0\n" * 2, {"label": "kind"}),  # no labels
        ("c,id,b,a\n" + "2,7,0.5,0\n" * 2, {"label": "kind"}),  # and more than the model knows
        ("c,id,b,a\n" + "2,n7,0.5,0\n" * 2, {"label": "kind", "ignore": ["name"]}),
        ("id,c,b,a\n" + "n7,2,0.5,0\n" * 2, {}),
        ("kind,c,b,a,flag\n" + "y,2,0.5,0,1\n" * 2, {}),  # wherever it is
        ("c,kind,b,a\n" + "2,y,0.5,0\n" * 2, {"label": "kind", "labels": False}),
        ("c,b,a,kind\n" + "2,0.5,0,y\n" * 2, {}),  # the last one
        ("0,0.5,2\n" * 2, {"labels": False}),  # no names
        ("n1,0,0.5,2\n" * 2, {"labels": False, "ignore": [0]}),
        ("0,n1,0.5,2\n" * 2, {"labels": False, "label": 0, "ignore": [2]}),
        ("0,n1,0.5,2\n" * 2, {"labels": False, "label": -1, "ignore": [-4]}),
        ("0,0.5,2,n1\n" * 2, {"labels": False, "label": -2, "ignore": [-1]}),
    ],
)
def test_columns_are_taken_by_their_names(
    tmp_path: Path, text: str, options: dict[str, Any]
) -> None:
    labels = {"labels": options.pop("labels")} if "labels" in options else {}
    new = table(tmp_path / "new.csv", text, **options)
    out = tmp_path / "out.npz"
    names = {"columns": ["a", "b", "c"], "classes": ["x", "y", "z"], "label": "kind"}
    names |= labels
    model = three_classes(tmp_path)
    predict(order(model, **new, **names, out=str(out)))
    with np.load(out) as arrays:
        assert np.allclose(arrays["outputs"], expected(model, np.array([[0, 0.5, 2]] * 2)))


def test_the_label_is_found_by_its_name(tmp_path: Path) -> None:
    """The run's was the last column; here another one is."""
    text = "c,kind,b,a,flag\n" + "2,z,0.5,0,1\n3,y,9,0,0\n"
    names = {"columns": ["a", "b", "c"], "classes": ["x", "y", "z"], "label": "kind"}
    said = predict(order(three_classes(tmp_path), **table(tmp_path / "new.csv", text), **names))
    assert (said["examples"], said["metrics"]["accuracy"]) == (2, 1.0)
    text = "c,b,a,flag\n" + "2,0.5,0,1\n" * 2
    said = predict(order(three_classes(tmp_path), **table(tmp_path / "new.csv", text), **names))
    assert (said["examples"], said["metrics"]) == (2, None)


KNOWN = {"columns": ["a", "b", "c"], "label": "k"}


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("1,2,3,0\n" * 4, {"classes": ["x", "y", "z"]}, "labels are numbers, and the model's"),
        ("1,2,3,x\n" * 4, {}, "labels are texts, and the run has no names"),
        ("a,a,c,k\n1,2,3,0\n", KNOWN, "column 'a' is there twice"),
        (
            "a,b,c\n1,2,3\n",
            {"columns": ["a", "b", "c"], "label": "k", "part": "held-out"},
            "no held-",
        ),
        (
            "a,b,c,k\n1,2,3,0\n",
            {"columns": ["a", "b", "c"], "label": "k", "ignore": ["b"]},
            "no column 'b'",
        ),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(
    tmp_path: Path, text: str, more: dict[str, Any], message: str
) -> None:
    options = {"ignore": more["ignore"]} if "ignore" in more else {}
    more = {key: value for key, value in more.items() if key != "ignore"}
    with pytest.raises(UserCodeError, match=message):
        predict(
            order(three_classes(tmp_path), **table(tmp_path / "new.csv", text, **options), **more)
        )


def test_positions_of_a_table_that_has_lost_its_labels_must_be_known(tmp_path: Path) -> None:
    """The column 1 may have been on either side of the last but one."""
    new = table(tmp_path / "new.csv", "1,2,3\n" * 4, label=-2, ignore=[1])
    with pytest.raises(UserCodeError, match="nobody knows which one is 1"):
        predict(order(three_classes(tmp_path), **new, labels=False))


def test_an_npz_without_labels_must_be_finite(model_file: Path, tmp_path: Path) -> None:
    x = np.ones((3, 64))
    x[1, 2] = np.nan
    with pytest.raises(UserCodeError, match=r"new\.npz: x\[1, 2\] is nan"):
        predict(order(model_file, **npz(tmp_path / "new.npz", x=x), own=False))


def test_a_column_that_the_model_needs_is_named(tmp_path: Path) -> None:
    new = table(tmp_path / "new.csv", "c,z,a,kind\n" + "1,2,3,0\n" * 4)
    with pytest.raises(UserCodeError, match="no column 'b', which the model was") as caught:
        predict(order(three_classes(tmp_path), **new, columns=["a", "b", "c"], label="kind"))
    assert caught.value.remedy.startswith("it needs a, b, c;")


def photographs(folder: Path, shades: dict[str, int]) -> Path:
    for name, shade in shades.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(folder / name)
    return folder


def of_images(folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    options = {"size": [8, 8], "grey": True, "test_fraction": 0.25}
    return {
        "data": {"kind": "images", "name": "", "options": options},
        "path": folder,
        "model": {"kind": "file", "name": "", "options": {}},
        "model_path": str(model),
        **more,
    }


@pytest.mark.parametrize("said", [False, True])
def test_images_without_labels_are_answered_by_name(
    said: bool, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without folders says so itself; one with folders must not mean classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = {"c/x.png": 4, "c/y.png": 3} if said else {}
    shades = {"a.png": 9, "b.png": 7, **more, "d.png": 5}
    folder = photographs(tmp_path / "photos", shades)
    (folder / "README").write_text("no image")
    out = tmp_path / "out.csv"
    new = of_images(folder, mean_grey(tmp_path), own=False, labels=not said, out=str(out))
    found = predict(order(model_file, **new))
    forget()
    assert (found["part"], found["examples"], found["metrics"]) == ("all", len(shades), None)
    head, *rows = (row.split(",") for row in out.read_text().splitlines())
    assert head == ["file", "output_0"]
    assert {name: round(float(value)) for name, value in rows} == shades
    assert [name for name, _ in rows] == sorted(shades)


def test_a_single_example_is_enough(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other data nothing has to be held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    new = table(tmp_path / "new.csv", "0.5,1.5,0.25,1\n")
    said = predict(order(three_classes(tmp_path), **new))
    assert (said["examples"], said["metrics"]["accuracy"]) == (1, 1.0)
    said = predict(
        order(model_file, **npz(tmp_path / "new.npz", x=np.ones((1, 64)), y=[3]), own=False)
    )
    assert said["examples"] == 1 and said["metrics"]["loss"] > 0
    folder = photographs(tmp_path / "photos", {"a/x.png": 50, "b/y.png": 60})  # one of each class
    said = predict(order(model_file, **of_images(folder, mean_grey(tmp_path), own=False)))
    forget()
    assert (said["part"], said["examples"]) == ("all", 2)


@pytest.mark.parametrize(("part", "count"), [("training", 6), ("held-out", 2), ("all", 8)])
def test_each_images_file_is_named_in_every_part(
    part: str, count: int, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shades = {f"{kind}/{i}.png": 10 * i + at for at, kind in enumerate("ab") for i in range(4)}
    out = tmp_path / "out.npz"
    folder = photographs(tmp_path / "photos", shades)
    new = of_images(folder, mean_grey(tmp_path), part=part, out=str(out))
    assert predict(order(model_file, **new))["examples"] == count
    forget()
    with np.load(out) as arrays:
        assert np.allclose([shades[name] for name in arrays["files"]], arrays["outputs"], atol=0.01)
        assert len(set(arrays["files"])) == count


def test_labels_that_are_to_be_ignored_are(model_file: Path, tmp_path: Path) -> None:
    x, y = np.ones((5, 64)), np.arange(5)
    new = npz(tmp_path / "new.npz", x=x, y=y, x_test=x[:2], y_test=y[:2])
    said = predict(order(model_file, **new, own=False, labels=False))
    assert (said["examples"], said["metrics"]) == (7, None)
    path = tmp_path / "new.svm"
    path.write_text("".join(f"0 64:{i}.5\n" for i in range(4)))  # the format wants a label
    data = {"kind": "svmlight", "name": "", "options": {}}
    out = tmp_path / "out.npz"
    told = {"data": data, "path": path, "own": False, "labels": False, "out": str(out)}
    said = predict(order(model_file, **told))
    assert (said["part"], said["examples"], said["metrics"]) == ("all", 4, None)
    with np.load(out) as arrays:
        x = np.zeros((4, 64))
        x[:, 63] = np.arange(4) + 0.5
        assert np.allclose(arrays["outputs"], expected(model_file, x))
