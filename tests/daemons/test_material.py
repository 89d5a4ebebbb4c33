"""What workers compare of their material before they train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.daemons import material

MODEL = """
import numpy as np
def init(rng, example): return {"w": np.zeros(1)}
def gradients(params, x, y): return 0.0, {"w": np.zeros(1)}
def predict(params, x): return np.zeros(len(x))
"""


def digest(folder: Path, write: Any) -> str:
    """Of what a host has whose examples `write` writes; its parameters fit any."""
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    kind, path, options = write(folder)
    model = reference("file", folder / "model.py", {})
    data = reference(kind, path, options)
    train = {"dtype": "float32", "batch_size": 4, "model": model, "data": data}
    return material.load(train, 0, {}).digest


def reference(kind: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "name": "", "path": str(path), "on_host": True, "options": options}


def npz(x: Any, y: Any) -> Any:
    def write(folder: Path) -> tuple[str, Path, dict[str, Any]]:
        np.savez(folder / "part.npz", x=x, y=y)
        return "npz", folder / "part.npz", {"test_fraction": 0.2}

    return write


def csv(*names: str) -> Any:
    def write(folder: Path) -> tuple[str, Path, dict[str, Any]]:
        rows = [f"{i},{names[i % len(names)]}" for i in range(10)]
        (folder / "part.csv").write_text("\n".join(rows))
        return "csv", folder / "part.csv", {"label": -1, "delimiter": ",", "test_fraction": 0.2}

    return write


FIRST = npz(np.ones((20, 4, 4), np.float32), np.arange(20) % 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FIRST, npz(np.ones((20, 4, 5), np.float32), np.arange(20) % 2)),
        (FIRST, npz(np.ones((20, 4, 4), np.float32), np.arange(20) / 2)),
        (FIRST, npz(np.ones((20, 4, 4), np.float32), np.zeros((20, 2), np.int64))),
        (csv("ant", "bee"), csv("ant", "cat")),
    ],
    ids=["shape", "regression", "labels", "classes"],
)
def test_examples_of_another_form_or_other_classes_do_not_fit(
    tmp_path: Path, one: Any, other: Any
) -> None:
    assert digest(tmp_path / "one", one) != digest(tmp_path / "other", other)


def test_other_examples_of_the_same_form_do(tmp_path: Path) -> None:
    more = npz(np.zeros((30, 4, 4)), np.arange(30, dtype=np.int32) % 3)
    assert digest(tmp_path / "one", FIRST) == digest(tmp_path / "other", more)
