"""Where every parameter lives: one flat vector, cut into blocks, and the blocks into shards.

Invariant: the blocks tile the vector in order, all of `block_elements` elements but the last, which
may be shorter; the shards tile the blocks in order and differ by at most one block, and hardly at
all in size, because blocks are as large as lets every shard have as many. Everybody who
is told the same shapes, dtype and number of servers computes the same layout, so only those travel.
Tensors are not padded and may straddle blocks and shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import SpecError

DTYPES = ("float32", "float64")
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named array of the model; `offset` and `size` are in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ShardRange:
    """What one server holds: blocks [first_block, last_block), elements [start, stop)."""

    index: int
    first_block: int
    last_block: int
    start: int
    stop: int

    @property
    def blocks(self) -> int:
        return self.last_block - self.first_block


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole map. Blocks are numbered through the vector; a shard counts its own from 0."""

    tensors: tuple[Tensor, ...]
    size: int
    dtype: str
    block_elements: int
    shards: tuple[ShardRange, ...]

    @property
    def blocks(self) -> int:
        return self.shards[-1].last_block

    def bounds(self, block: int) -> tuple[int, int]:
        """The elements [start, stop) of a block of the whole vector."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"block {block} of {self.blocks}")
        start = block * self.block_elements
        return start, min(start + self.block_elements, self.size)

    def tensor_at(self, element: int) -> Tensor:
        """The tensor that an element of the vector belongs to (to name it in an error)."""
        for tensor in self.tensors:
            if tensor.offset <= element < tensor.offset + tensor.size:
                return tensor
        raise IndexError(f"element {element} of {self.size}")


def cut(
    shapes: Sequence[tuple[str, Sequence[int]]],
    dtype: str,
    servers: int,
    max_block_bytes: int = 1 << 20,
) -> Layout:
    """The layout of a model on `servers` servers. Raises SpecError where there is none."""
    if dtype not in DTYPES:
        raise SpecError(f"dtype {dtype!r} is not supported", remedy="use float32 or float64")
    if servers < 1:
        raise SpecError(f"{servers} servers: a run needs at least one")
    item_bytes = np.dtype(dtype).itemsize
    if max_block_bytes < item_bytes or max_block_bytes % item_bytes:
        raise SpecError(f"blocks of {max_block_bytes} bytes do not hold whole {dtype} numbers")
    tensors = _place(shapes)
    size = sum(tensor.size for tensor in tensors)
    if size == 0:
        raise SpecError("the model has no parameters", remedy="let init return at least one array")
    block_elements, blocks = _blocks(size, item_bytes, servers, max_block_bytes)
    if blocks < servers:
        raise _too_many_servers(size, item_bytes, servers, max_block_bytes, blocks)
    shards = _shards(size, block_elements, blocks, servers)
    return Layout(tensors, size, dtype, block_elements, shards)


def flatten(layout: Layout, params: Mapping[str, Any], out: NDArray[Any]) -> None:
    """Copies the arrays into the vector `out`, casting floats to its dtype."""
    if out.shape != (layout.size,):
        raise ValueError(f"the vector has shape {out.shape}, the layout ({layout.size},)")
    if params.keys() != {tensor.name for tensor in layout.tensors}:
        expected = [tensor.name for tensor in layout.tensors]
        raise ValueError(f"the arrays are {sorted(params)}, the layout has {expected}")
    for tensor in layout.tensors:
        array = np.asarray(params[tensor.name])
        if array.shape != tensor.shape:
            raise ValueError(f"{tensor.name} has shape {array.shape}, the layout {tensor.shape}")
        view = out[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        np.copyto(view, array, casting="same_kind")


def unflatten(layout: Layout, flat: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Named views into the vector: nothing is copied, writing to them writes to `flat`."""
    if flat.shape != (layout.size,):
        raise ValueError(f"the vector has shape {flat.shape}, the layout ({layout.size},)")
    return {
        tensor.name: flat[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        for tensor in layout.tensors
    }


def _place(shapes: Sequence[tuple[str, Sequence[int]]]) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    offset = 0
    for name, shape in shapes:
        if any(tensor.name == name for tensor in tensors):
            raise SpecError(f"the model has two arrays named {name!r}")
        if any(length < 0 for length in shape):
            raise SpecError(f"{name} has the shape {tuple(shape)}")
        size = math.prod(shape)
        tensors.append(Tensor(name, tuple(shape), offset, size))
        offset += size
    return tuple(tensors)


def _blocks(size: int, item_bytes: int, servers: int, max_block_bytes: int) -> tuple[int, int]:
    """(elements per block, number of blocks): as many of one size as let the shards be even."""
    fair = -(-size * item_bytes // servers)
    block_bytes = -(-fair // -(-fair // max_block_bytes))
    aligned = -(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    block_elements = min(max_block_bytes, aligned) // item_bytes
    return block_elements, -(-size // block_elements)


def _too_many_servers(
    size: int, item_bytes: int, servers: int, max_block_bytes: int, blocks: int
) -> SpecError:
    fits = next(
        n
        for n in range(min(servers, blocks), 0, -1)
        if _blocks(size, item_bytes, n, max_block_bytes)[1] >= n
    )
    block_s = "1 block" if blocks == 1 else f"{blocks} blocks"
    return SpecError(
        f"{servers} servers but the model has only {block_s}: "
        f"{size} parameters are {size * item_bytes} bytes, a block has at least {ALIGNMENT_BYTES}",
        remedy=f"set servers: {fits}",
    )


def _shards(size: int, block_elements: int, blocks: int, servers: int) -> tuple[ShardRange, ...]:
    each, longer = divmod(blocks, servers)  # the first `longer` shards have one block more
    shards = []
    first = 0
    for index in range(servers):
        last = first + each + (index < longer)
        start, stop = first * block_elements, min(last * block_elements, size)
        shards.append(ShardRange(index, first, last, start, stop))
        first = last
    return tuple(shards)
