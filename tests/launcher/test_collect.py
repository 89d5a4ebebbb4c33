"""Slices become one safetensors file that another library reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsgd_cli.launcher.collect import header, make_run_dir


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_header_and_the_raw_bytes_are_a_model(tmp_path: Path, dtype: str) -> None:
    shapes = [("W1", [3, 5]), ("b", [5]), ("scale", [])]
    vector = np.arange(21, dtype=dtype)
    layout = {"dtype": dtype, "tensors": shapes}
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(layout, {"dsgd.run": "x"}) + vector.tobytes())
    model = load_file(path)
    assert {name: list(model[name].shape) for name in model} == dict(shapes)
    assert all(array.dtype == dtype for array in model.values())
    assert np.array_equal(model["W1"], vector[:15].reshape(3, 5))
    assert np.array_equal(model["b"], vector[15:20])
    assert model["scale"] == 20


def test_the_bytes_begin_at_a_multiple_of_eight() -> None:
    for length in range(1, 20):
        head = header({"dtype": "float32", "tensors": [["w" * length, [1]]]}, {})
        assert len(head) % 8 == 0


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    folders = {make_run_dir("lab", tmp_path / "runs") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)
