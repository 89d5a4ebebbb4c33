"""Parameters from a .safetensors file: a length, a JSON header, the raw bytes.

The header is not trusted: every offset must lie in the file and have the size that its shape says.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError

Array = NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
METADATA = "__metadata__"


def read_tensors(path: Path) -> dict[str, Array]:
    """The named arrays of a file. Raises UserCodeError for one that is damaged."""
    try:
        raw = np.fromfile(path, np.uint8).data
    except OSError as error:
        raise UserCodeError(f"{path}: {error.strerror}") from error
    try:
        (size,) = struct.unpack_from("<Q", raw)
        if size > len(raw) - 8:
            raise ValueError(f"a header of {size} bytes in a file of {len(raw)}")
        header = json.loads(bytes(raw[8 : 8 + size]))
        body = raw[8 + size :]
        return {name: _array(about, body) for name, about in header.items() if name != METADATA}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserCodeError(f"{path}: not a whole .safetensors file: {error}") from error


def _array(about: Mapping[str, Any], body: memoryview) -> Array:
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    begin, end = about["data_offsets"]
    if not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {begin} to {end} of {len(body)} for the shape {shape}")
    return np.asarray(body[begin:end]).view(dtype).reshape(shape)


def misfits(params: Mapping[str, Array], made: Mapping[str, Array]) -> list[str]:
    """What of a file's parameters is not as the model makes them; nothing when they fit."""
    found = [f"the model has no {name}" for name in params if name not in made]
    found += [f"the file has no {name}" for name in made if name not in params]
    for name, array in made.items():
        if name in params and params[name].shape != array.shape:
            found.append(
                f"{name} has shape {params[name].shape} in the file, {array.shape} in the model"
            )
    return found
