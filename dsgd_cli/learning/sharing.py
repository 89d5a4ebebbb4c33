"""A file's arrays once per host: what a reader made of it, checked, split and in the run's dtype.

The first process that needs a file reads it and writes the four arrays into the host's cache; all
processes map them. Their pages are the kernel's: shared, and given up when memory is short. So what
a process holds of data itself is a batch, or at most `SMALL_BYTES`: files that are as small, and
whose arrays are, are read by everyone and leave nothing behind. `images` has entries of its own
kind; what a module's `load` maps stays mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import ARRAYS, load_data
from dsgd_cli.learning.datasets import Dataset, pieces
from dsgd_cli.learning.pixels import Array, Pixels
from dsgd_cli.learning.readers import idx
from dsgd_cli.learning.readers.cache import begin, kept, look_up, mapped

SMALL_BYTES = 8 << 20
FACTS = "facts.json"  # digest, names, and "pixels": the names of arrays that are such
VERSION = 2  # of what is in the cache: of this module and of the readers

# reader -> the files that it will read
FILES: dict[str, Callable[[Path], Sequence[Path]]] = {
    "npz": lambda path: [path],
    "csv": lambda path: [path],
    "svmlight": lambda path: [path],
    "idx": idx.files,
}


def shared_data(
    kind: str, name: str, options: Mapping[str, Any], path: Path | None, dtype: str
) -> Dataset:
    """`load_data` with floats in `dtype`; arrays of a large file are mapped, and read-only."""

    def read() -> Dataset:
        return load_data(kind, name, options, path).as_dtype(dtype)

    if kind not in FILES or path is None or (files := _states(FILES[kind](path))) is None:
        return read()
    what = [VERSION, kind, dtype, options, files]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    entry = partial(_entry, name=path.name, dtype=dtype)
    data: Dataset | None = None
    if sum(size for _, size, *_ in files) <= SMALL_BYTES:
        if (found := look_up(key, entry)) is not None:
            return found
        data = read()
        if sum(_raw(data, each).nbytes for each in ARRAYS) <= SMALL_BYTES:
            return data  # else it is packed or sparse

    def make(folder: Path) -> None:
        _write(read() if data is None else data, folder)
        if _states(FILES[kind](path)) != files:
            raise UserCodeError(f"{path.name}: it changed while it was read", remedy="run again")

    return kept(key, entry, make)


def _states(files: Sequence[Path]) -> list[tuple[str, int, int, int]] | None:
    """(path, bytes, mtime_ns, ctime_ns) of each; None where one cannot be read, which its reader
    explains. Copies keep their mtime, but no two files of hosts that share a home have one ctime.
    """
    try:
        found = [(str(file.resolve()), file.stat()) for file in files]
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    return [(path, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for path, at in found]


def _raw(data: Dataset, name: str) -> Array:
    array: Array | Pixels = getattr(data, name)
    return array.raw if isinstance(array, Pixels) else array


def _write(data: Dataset, folder: Path) -> None:
    for name in ARRAYS:
        array = _raw(data, name)
        with (folder / f"{name}.npy").open("wb") as file:
            begin(file, array.dtype, array.shape)
            for rows in pieces(array):
                file.write(np.ascontiguousarray(array[rows]).data)
    pixels = [name for name in ARRAYS if isinstance(getattr(data, name), Pixels)]
    facts = {
        "digest": data.digest(),
        "classes": data.classes,
        "columns": data.columns,
        "label": data.label,
        "pixels": pixels,
    }
    (folder / FACTS).write_text(json.dumps(facts))


def _entry(folder: Path, name: str, dtype: str) -> Dataset | None:
    """The entry; None where it is not, or damaged."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        arrays: list[Any] = []
        for each in ARRAYS:
            raw = mapped(folder / f"{each}.npy")
            arrays.append(Pixels(raw, np.dtype(dtype)) if each in facts["pixels"] else raw)
        x, y, x_test, y_test = arrays
        classes, columns = (tuple(map(str, facts[what])) for what in ("classes", "columns"))
        label = str(facts["label"])
        names = (classes, columns, label)
        return Dataset(name, x, y, x_test, y_test, *names, known=facts["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
