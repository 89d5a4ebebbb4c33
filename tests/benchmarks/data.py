"""The two data sets of the end-to-end comparison, as .npz files that both sides read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsgd_cli.learning.datasets import digits

SEED_AUTHORS = (800, 600, 400, 350, 250)  # their layers, for 64x64x3 inputs and 101 classes


def write_digits(path: Path) -> None:
    """UCI digits, split as dsgd splits them."""
    data = digits()
    np.savez(path, x=data.x, y=data.y, x_test=data.x_test, y_test=data.y_test)


def write_images(path: Path, examples: int = 4096, held_out: int = 256) -> None:
    """Random images: for speed only."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples + held_out, 64, 64, 3), np.float32)
    y = rng.integers(0, 101, examples + held_out)
    y[:101] = np.arange(101)
    np.savez(path, x=x[:examples], y=y[:examples], x_test=x[examples:], y_test=y[examples:])
