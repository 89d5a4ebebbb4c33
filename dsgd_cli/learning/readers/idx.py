"""The IDX files of MNIST and its relatives: a folder with images and labels, as they are or as .gz.

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

A file is a magic number, the sizes of its dimensions, and bytes.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import Dataset, hold_out
from dsgd_cli.learning.pixels import Array, Pixels

NAME = re.compile(r".*?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
DIMENSIONS = {"images": 3, "labels": 1}
TEST_SET = {("test", "images"), ("test", "labels")}
BYTES = 0x08  # the type of the values, in the magic number
GZIP = b"\x1f\x8b"
CHUNK_BYTES = 1 << 20
FOUR = "MNIST's four files, as they are or as .gz: train-images-idx3-ubyte and so on"


def idx(path: Path, test_fraction: float = 0.2) -> Dataset:
    """Grey values from 0 to 1, (examples, height, width). The test set is that of the `t10k` (or
    `test`) files; without them `test_fraction` is held out."""
    files = _find(path)
    x, y = _pair(path, files, "train")
    if files.keys() & TEST_SET:
        data = Dataset(path.name, x, y, *_pair(path, files, "test"))
    else:
        data = hold_out(path.name, x, y, test_fraction)
    return replace(data, x=Pixels(np.asarray(data.x)), x_test=Pixels(np.asarray(data.x_test)))


def files(path: Path) -> list[Path]:
    """Those of the folder that are read."""
    return list(_find(path).values())


def has_test_set(path: Path) -> bool:
    """Whether the folder says itself what is held out."""
    return bool(_find(path).keys() & TEST_SET)


def _find(folder: Path) -> dict[tuple[str, str], Path]:
    """(train | test, images | labels) -> the file, the plain one where there is a .gz beside it."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserCodeError(
            f"{folder.name}: not a readable folder: {error.strerror}", remedy=f"give {FOUR}"
        ) from error
    found: dict[tuple[str, str], Path] = {}
    for path in paths:
        if (match := NAME.fullmatch(path.name)) is None:
            continue
        part = "train" if match[1] == "train" else "test"
        other = found.setdefault((part, match[2]), path)
        if other is not path and path.name != f"{other.name}.gz":
            raise UserCodeError(
                f"{folder.name}: {other.name} and {path.name} are both there",
                remedy="give each data set a folder of its own",
            )
    return found


def _pair(folder: Path, files: dict[tuple[str, str], Path], part: str) -> tuple[Array, Array]:
    """Images and labels."""
    for what, dimensions in DIMENSIONS.items():
        if (part, what) not in files:
            first = "train" if part == "train" else "t10k"
            raise UserCodeError(
                f"{folder.name}: no {first}-{what}-idx{dimensions}-ubyte in it",
                remedy=f"give a folder with {FOUR}",
            )
    x, y = (_read(files[part, what], what) for what in DIMENSIONS)
    if len(x) != len(y):
        raise UserCodeError(
            f"{folder.name}: {files[part, 'images'].name} has {len(x)} images,"
            f" {files[part, 'labels'].name} has {len(y)} labels",
            remedy="are they of the same set?",
        )
    return x, y.astype(np.int64)


def _read(path: Path, what: str) -> Array:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            return _content(gzip.GzipFile(fileobj=file) if packed else file, path.name, what)
    except (OSError, EOFError, zlib.error) as error:
        raise UserCodeError(
            f"{path.name}: not readable: {error}", remedy="get the file once more"
        ) from error


def _content(file: IO[bytes] | gzip.GzipFile, name: str, what: str) -> Array:
    dimensions = DIMENSIONS[what]
    file = cast(IO[bytes], file)
    magic, sizes = file.read(4), file.read(4 * dimensions)
    expected = bytes([0, 0, BYTES, dimensions])
    if magic != expected:
        raise UserCodeError(
            f"{name}: it begins with {magic.hex() or 'nothing'}; {what} in IDX format begin with"
            f" {expected.hex()}",
            remedy=f"give {FOUR}",
        )
    shape = struct.unpack(f">{dimensions}I", sizes.ljust(4 * dimensions, b"\0"))
    wanted, data = math.prod(shape), bytearray()
    while len(data) <= wanted and (chunk := file.read(CHUNK_BYTES)):
        data += chunk
    if len(sizes) < 4 * dimensions or len(data) < wanted:
        raise UserCodeError(
            f"{name}: cut off: {_times(shape)} bytes are announced, {len(data)} are there",
            remedy="get the file once more",
        )
    if len(data) > wanted:
        raise UserCodeError(f"{name}: it has more than the {_times(shape)} bytes it announces")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
