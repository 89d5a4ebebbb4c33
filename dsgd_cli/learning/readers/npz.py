"""numpy's .npz: the arrays as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import Dataset, hold_out


def npz(path: Path, test_fraction: float = 0.2) -> Dataset:
    """Arrays x and y, and x_test and y_test; without them `test_fraction` of x is held out."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise ValueError("it holds one array without a name")
            found = {name: arrays[name] for name in arrays}
            if odd := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{odd[0]!r} in it is no array")
    except MemoryError:
        raise
    except FileNotFoundError:
        raise UserCodeError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged file makes numpy and zipfile raise almost anything
        raise UserCodeError(
            f"{path.name}: not a readable .npz file: {error}",
            remedy="write it with numpy.savez(path, x=..., y=...); numbers only, no objects",
        ) from error
    for name in ("x", "y"):
        if name not in found:
            raise UserCodeError(
                f"{path.name}: no array {name!r}; it has {', '.join(found) or 'none'}",
                remedy="write it with numpy.savez(path, x=..., y=...)",
            )
    if ("x_test" in found) != ("y_test" in found):
        raise UserCodeError(f"{path.name}: only one of x_test and y_test is there")
    if "x_test" in found:
        return Dataset(path.name, found["x"], found["y"], found["x_test"], found["y_test"])
    return hold_out(path.name, found["x"], found["y"], test_fraction)
