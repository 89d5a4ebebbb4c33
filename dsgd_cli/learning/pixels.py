"""Images as bytes that become numbers from 0 to 1 where they are computed with, a batch at a time.

Four times smaller than floats; and where the bytes are a memory map, a worker holds what it
touches, and all workers of a host share it. Whoever takes, slices or converts gets floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
WHITE = 255


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """`raw`: (examples, height, width[, channels]) bytes."""

    raw: NDArray[np.uint8]
    dtype: np.dtype[Any] = np.dtype(np.float32)  # noqa: RUF009 - immutable
    source: str = ""  # what tells these bytes from others without reading them; "": nothing does

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def ndim(self) -> int:
        return self.raw.ndim

    @property
    def flags(self) -> Any:
        return self.raw.flags

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: Any) -> Array:
        return self._scaled(self.raw[rows])

    def take(self, rows: Array, axis: int = 0) -> Array:
        return self._scaled(self.raw.take(rows, axis))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        made = self._scaled(self.raw)
        return made if dtype is None else made.astype(dtype, copy=False)

    def astype(self, dtype: str) -> Pixels:
        return replace(self, dtype=np.dtype(dtype))

    def _scaled(self, raw: NDArray[np.uint8]) -> Array:
        made: Array = np.divide(raw, WHITE, dtype=self.dtype)
        return made


def part_of(x: Array | Pixels, rows: Any) -> Array | Pixels:
    """Some of the examples; of pixels the bytes, of a slice a view."""
    return replace(x, raw=x.raw[rows], source="") if isinstance(x, Pixels) else x[rows]


def joined(first: Array | Pixels, second: Array | Pixels) -> Array | Pixels:
    """One behind the other; of pixels the bytes, so that they stay a quarter of the size."""
    if isinstance(first, Pixels) and isinstance(second, Pixels):
        return Pixels(np.concatenate([first.raw, second.raw]), first.dtype)
    return np.concatenate([first, second])
