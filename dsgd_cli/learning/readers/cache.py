"""What is made from the user's data once and read often, in the host's cache: `data/<key>`.

An entry is whole or not there at all: it is made beside its place and renamed, and never changed.
One process makes entries at a time, the others wait for it. What nobody used for a month goes when
the next one is made; losing an entry costs nothing but time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.pixels import Array

Made = TypeVar("Made")
UNUSED_S = 30 * 86_400.0


def data_cache() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/dsgd/data: beside what was sent to this host."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "dsgd" / "data"


def kept(key: str, read: Callable[[Path], Made | None], make: Callable[[Path], None]) -> Made:
    """What `read` finds in the entry; where it finds None, `make` fills a folder first."""
    folder = Path("the cache")
    try:
        folder = data_cache()
        place = folder / key
        if (found := _used(place, read)) is not None:
            return found
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if (found := _used(place, read)) is None:  # somebody else may have been quicker
                _make(place, make)
                found = _used(place, read)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = getattr(error, "strerror", None) or str(error)
        raise UserCodeError(
            f"cannot keep decoded data in {folder}: {reason}",
            remedy="make room there, or let XDG_CACHE_HOME name another folder (`workers: {env: "
            "{XDG_CACHE_HOME: /path}}`)",
        ) from error
    assert found is not None
    return found


def look_up(key: str, read: Callable[[Path], Made | None]) -> Made | None:
    """What `kept` would find; makes nothing."""
    with suppress(RuntimeError):  # there is no home
        return _used(data_cache() / key, read)
    return None


def _used(place: Path, read: Callable[[Path], Made | None]) -> Made | None:
    found = read(place)
    if found is not None:
        with suppress(OSError):
            os.utime(place)
    return found


def _make(place: Path, make: Callable[[Path], None]) -> None:
    """With the lock: parts that are there were left by a process that was killed."""
    for path in place.parent.glob(".*.part"):
        shutil.rmtree(path, ignore_errors=True)
    for path in place.parent.iterdir():
        if path == place or (path.is_dir() and time.time() - path.stat().st_mtime > UNUSED_S):
            shutil.rmtree(path)
    part = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=place.parent))
    try:
        make(part)
        part.rename(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def begin(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """An .npy file of which the numbers, in C's order, will be written. Not mapped: a full disk is
    an error then, and not the end of the process."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def mapped(file: Path) -> Array:
    """What was written so, read-only by memory map. Raises ValueError where it is not whole."""
    try:
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # a damaged file makes numpy raise almost anything
        raise ValueError(f"{file}: {error}") from error
    return array


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Whoever holds it may end as it likes: the lock ends with it."""
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
