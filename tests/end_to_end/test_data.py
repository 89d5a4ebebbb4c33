"""`dsgd train` on files of one's own, each in a format that others write."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import dump_svmlight_file

from tests.end_to_end.conftest import User

Array = np.ndarray[Any, Any]

CLUSTER = """
name: NAME
servers: 2
workers: 2
train:
  model: MODEL
  data: DATA
  until: {accuracy: 0.9, max_epochs: 60}
"""


def write(user: User, model: str, data: str) -> None:
    user.write(CLUSTER.replace("MODEL", model).replace("DATA", data))


def shapes(user: User, run_dir: str) -> dict[str, tuple[int, ...]]:
    model = load_file(user.folder / run_dir / "model.safetensors")
    return {name: array.shape for name, array in model.items()}


def digits() -> tuple[Array, Array]:
    """(1797, 8, 8) grey values from 0 to 255, and labels."""
    with np.load("dsgd_cli/learning/data/digits.npz") as arrays:
        x = (arrays["x"].reshape(-1, 8, 8) * 15.9).astype(np.uint8)
        return x, arrays["y"].astype(np.uint8)


def write_idx(path: Path, array: Array) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files(user: User) -> None:
    folder = user.folder / "mnist"
    folder.mkdir()
    x, y = digits()
    for part, rows in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", x[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", y[rows])
    write(user, "mlp", "{idx: mnist}")
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert run.summary["value"] >= 0.9
    assert shapes(user, run.summary["run_dir"])["W1"] == (64, 128)
    user.assert_nothing_left()


def photos(folder: Path) -> None:
    """Two hundred noisy images of three colours."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(67):
            pixels = rng.integers(0, 100, (12, 10 + i % 5, 3), np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}")


def test_a_folder_of_images(user: User) -> None:
    photos(user.folder / "photos")
    write(user, "softmax", "{images: photos, size: [8, 6]}")
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert run.summary["value"] >= 0.9
    assert shapes(user, run.summary["run_dir"])["W1"] == (8 * 6 * 3, 3)
    kept = list((Path(user.env["XDG_CACHE_HOME"]) / "dsgd" / "data").glob("*/pixels.npy"))
    assert len(kept) == 1 and np.load(kept[0], mmap_mode="r").shape == (201, 8, 6, 3)
    user.assert_nothing_left()


def test_svmlight(user: User) -> None:
    x, y = digits()
    dump_svmlight_file(x.reshape(-1, 64) / 255, y, str(user.folder / "digits.svm"))
    write(user, "softmax", "digits.svm")
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert shapes(user, run.summary["run_dir"])["W1"][1] == 10
    user.assert_nothing_left()


def test_a_large_file_is_read_once_and_mapped_by_all(user: User) -> None:
    x, y = digits()
    x = np.tile(x.reshape(-1, 64), 12) / 255
    np.savez(user.folder / "digits.npz", x=x, y=y)
    write(user, "softmax", "{npz: digits.npz}")
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert shapes(user, run.summary["run_dir"])["W1"] == (64 * 12, 10)
    kept = list((Path(user.env["XDG_CACHE_HOME"]) / "dsgd" / "data").glob("*/x.npy"))
    assert len(kept) == 1
    mapped = np.load(kept[0], mmap_mode="r")
    assert (mapped.shape, mapped.dtype) == ((1438, 64 * 12), np.float32)
    user.assert_nothing_left()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{images: photos}", "photos/red/5.jpg: not a readable image: "),
        ("{csv: ages.csv}", "ages.csv:5: column 'age': 'abc' is not a number"),
        ("{idx: photos}", "photos: no train-images-idx3-ubyte in it"),
    ],
)
def test_what_is_wrong_is_said_before_any_server_starts(
    user: User, data: str, message: str
) -> None:
    photos(user.folder / "photos")
    torn = user.folder / "photos" / "red" / "5.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    (user.folder / "ages.csv").write_text("age,class\n1,0\n2,1\n3,0\nabc,1\n")
    write(user, "softmax", data)
    run = user.dsgd("train", "cluster.yaml", timeout_s=20)
    assert run.code == 6, run.err
    assert message in run.err
    user.assert_nothing_left()
