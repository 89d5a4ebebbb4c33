"""MNIST's format, written by hand: four files, as they are or packed."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import load_data

Array = np.ndarray[Any, Any]

X = np.random.default_rng(0).integers(0, 256, (20, 6, 5), np.uint8)
Y = (np.arange(20) % 10).astype(np.uint8)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def written(array: Array) -> bytes:
    """In IDX format."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def mnist(
    tmp_path: Path,
    pack: Callable[[bytes], bytes] = bytes,
    suffix: str = "",
    test: str = "t10k",
    before: str = "",
) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, n in (("train", 20), (test, 8)):
        if part:
            images, labels = written(X[:n]), written(Y[:n])
            (folder / f"{before}{part}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
            (folder / f"{before}{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))
    return folder


@pytest.mark.parametrize("kind", ["plain", "gz", "gz without the suffix", "EMNIST"])
def test_the_four_files(tmp_path: Path, kind: str) -> None:
    if kind == "EMNIST":
        folder = mnist(tmp_path, gzip.compress, ".gz", "test", "emnist-letters-")
    else:
        pack = bytes if kind == "plain" else gzip.compress
        folder = mnist(tmp_path, pack, ".gz" if kind == "gz" else "")
    data = load_data("idx", path=folder)
    assert (data.name, data.x.shape, data.x_test.shape) == ("mnist", (20, 6, 5), (8, 6, 5))
    np.testing.assert_array_equal(np.asarray(data.x), X / np.float32(255))
    assert (data.x[:1].dtype, data.y.dtype) == (np.float32, np.int64)
    assert data.y.tolist() == Y.tolist() and data.y_test.tolist() == Y[:8].tolist()


def test_without_test_files_a_part_is_held_out(tmp_path: Path) -> None:
    data = load_data("idx", path=mnist(tmp_path, test=""), options={"test_fraction": 0.25})
    assert (data.x.shape, data.x_test.shape) == ((15, 6, 5), (5, 6, 5))
    rows = {image.tobytes(): label for image, label in zip(X / np.float32(255), Y, strict=True)}
    assert all(rows[x.tobytes()] == y for x, y in zip(data.x_test[:], data.y_test, strict=True))


def test_the_packed_file_beside_the_plain_one_is_left_alone(tmp_path: Path) -> None:
    folder = mnist(tmp_path)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(b"not looked at")
    assert load_data("idx", path=folder).examples == 20


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced(IMAGES, written(X)[:-1]), f"{IMAGES}: cut off: 20 x 6 x 5 bytes .*, 599 are"),
        (replaced(IMAGES, written(X)[:10]), f"{IMAGES}: cut off: "),
        (replaced(IMAGES, written(X) + b"!"), f"{IMAGES}: it has more than the 20 x 6 x 5 bytes"),
        (replaced(IMAGES, b""), f"{IMAGES}: it begins with nothing; images .* 00000803"),
        (replaced(IMAGES, written(Y)), f"{IMAGES}: it begins with 00000801; images .* 00000803"),
        (replaced(LABELS, written(X)), f"{LABELS}: it begins with 00000803; labels .* 00000801"),
        (replaced(IMAGES, b"\0\0\x08\x03" + b"\xff" * 40), f"{IMAGES}: cut off: 4294967295 x "),
        (replaced(IMAGES, gzip.compress(written(X))[:-200]), f"{IMAGES}: not readable: Compr"),
        (replaced(IMAGES, gzip.compress(written(X))[:-4]), f"{IMAGES}: not readable: Compr"),
        (replaced(IMAGES, b"\x1f\x8brubbish"), f"{IMAGES}: not readable: "),
        (replaced(LABELS, written(Y[:19])), f"{IMAGES} has 20 images, {LABELS} has 19 labels"),
        (lambda folder: (folder / IMAGES).unlink(), f"mnist: no {IMAGES} in it"),
        (lambda folder: (folder / LABELS).unlink(), f"mnist: no {LABELS} in it"),
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
            "mnist: no t10k-labels-idx1-ubyte in it",
        ),
        (replaced(f"letters-{IMAGES}", written(X)), f"letters-{IMAGES} and {IMAGES} are both"),
        (replaced("t10k-images-idx3-ubyte", written(X[:8, 1:])), "one of x_test"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = mnist(tmp_path)
    spoil(folder)
    with pytest.raises(UserCodeError, match=message) as caught:
        load_data("idx", path=folder)
    assert caught.value.exit_code == 6


def test_damage_in_the_middle_of_a_packed_file(tmp_path: Path) -> None:
    folder = mnist(tmp_path, gzip.compress, ".gz")
    path = folder / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserCodeError, match=rf"{IMAGES}\.gz: "):
        load_data("idx", path=folder)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        with pytest.raises(UserCodeError, match=f"{name}: not a readable folder"):
            load_data("idx", path=tmp_path / name)
