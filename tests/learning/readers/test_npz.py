"""numpy's .npz, and a sentence for each way such a file can be wrong."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data

Array = np.ndarray[Any, Any]


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
    for path in (text, npy, cut):
        with pytest.raises(UserCodeError, match=f"{path.name}: not a readable .npz file"):
            load_data("npz", path=path)
    with pytest.raises(UserCodeError, match=r"/missing\.npz: there is no such file$"):
        load_data("npz", path=tmp_path / "missing.npz")


def _npz(path: Path, x: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", x)
    return path


def _npy(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def test_npz_with_damage_inside(tmp_path: Path) -> None:
    header = _npz(tmp_path / "header.npz", b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16)
    text = _npz(tmp_path / "text.npz", b"hello")
    encrypted = _npz(tmp_path / "encrypted.npz", _npy((0,)))
    content = bytearray(encrypted.read_bytes())
    content[6] |= 1
    content[content.find(b"PK\x01\x02") + 8] |= 1
    encrypted.write_bytes(content)
    for path in (header, text, encrypted):
        with pytest.raises(UserCodeError, match=f"{path.name}: not a readable .npz file"):
            load_data("npz", path=path)


def test_npz_that_announces_more_than_fits_into_memory(tmp_path: Path) -> None:
    path = _npz(tmp_path / "data.npz", _npy((10**15,)))
    with pytest.raises(UserCodeError, match=r"data\.npz: this host has too little memory"):
        load_data("npz", path=path)
