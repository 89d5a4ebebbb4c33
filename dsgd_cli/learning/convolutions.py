"""What a network does with an example before its dense layers: flatten it, or convolve an image.

A body has `weights` (the names that the penalty counts), turns a batch into rows, and the loss's
derivative by these rows into gradients. `Convolutions` keeps its buffers, and in them what
`backward` needs, from one call to the next: it is for one thread, and `backward` follows the
`forward` that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

from dsgd_cli.contract.errors import UserCodeError

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = Mapping[str, Array]

POOL = 2  # a side of the windows whose maximum is kept


class Body(Protocol):
    """The part of a network in front of its dense layers."""

    weights: tuple[str, ...]
    most_rows: int  # examples at a time in an evaluation, to bound its memory

    def init(self, rng: np.random.Generator, x: Array) -> dict[str, Array]:
        """Its first parameters, in float64."""

    def forward(self, params: Params, x: Array, dtype: DTypeLike) -> Array:
        """(n, ...) -> (n, features); valid until the next call."""

    def backward(self, params: Params, delta: Array, out: dict[str, Array]) -> None:
        """Writes its gradients; `delta`: the loss's derivative by the features before ReLU."""


class Flat:
    """Every number of an example is a feature. Nothing is learned."""

    weights: tuple[str, ...] = ()
    most_rows = 4096

    def init(self, rng: np.random.Generator, x: Array) -> dict[str, Array]:
        return {}

    def forward(self, params: Params, x: Array, dtype: DTypeLike) -> Array:
        return x.reshape(len(x), -1).astype(dtype, copy=False)

    def backward(self, params: Params, delta: Array, out: dict[str, Array]) -> None:
        pass


class Convolutions:
    """For each number of filters: a convolution of the same size, its maxima in 2x2, and ReLU.

    ReLU and maximum commute, so it is done last, on a quarter of the numbers. Each convolution is
    one matrix product with the windows of all images as rows.
    """

    most_rows = 256

    def __init__(self, filters: tuple[int, ...], kernel: int) -> None:
        self._filters = filters
        self._kernel = kernel
        self.weights = tuple(f"K{i}" for i in range(1, len(filters) + 1))
        self._layers = [_Layer(f"K{i}", f"b{i}") for i in range(1, len(filters) + 1)]

    def init(self, rng: np.random.Generator, x: Array) -> dict[str, Array]:
        _, height, width, channels = self._images(x).shape
        if min(height, width) < POOL ** len(self._filters):
            raise UserCodeError(
                f"cnn: images of {height}x{width} cannot be halved {len(self._filters)} times",
                remedy="give fewer `filters`; the shape of an image is (height, width, channels)",
            )
        params = {}
        for layer, filters in zip(self._layers, self._filters, strict=True):
            shape = (self._kernel, self._kernel, channels, filters)
            scale = np.sqrt(2.0 / (self._kernel**2 * channels))
            params[layer.weights] = rng.standard_normal(shape) * scale
            params[layer.bias] = np.zeros(filters)
            channels = filters
        return params

    def forward(self, params: Params, x: Array, dtype: DTypeLike) -> Array:
        value = self._images(x)
        for layer in self._layers:
            value = layer.forward(params, value, dtype)
        return value.reshape(len(x), -1)

    def backward(self, params: Params, delta: Array, out: dict[str, Array]) -> None:
        value: Array | None = delta
        for i in range(len(self._layers) - 1, -1, -1):
            assert value is not None
            value = self._layers[i].backward(params, value, out, further=i > 0)

    def _images(self, x: Array) -> Array:
        """(n, h, w, c), (n, h, w) or (n, h * h) -> (n, h, w, c), a view."""
        if x.ndim == 4:
            return x
        if x.ndim == 3:
            return x[..., np.newaxis]
        side = int(np.sqrt(x.shape[1])) if x.ndim == 2 else 0
        if not side or side * side != x.shape[1]:
            raise UserCodeError(
                f"cnn wants images, and an example has shape {x.shape[1:]}",
                remedy="give x as (n, height, width) or (n, height, width, channels);"
                " square images of one channel may be flat",
            )
        return x.reshape(len(x), side, side, 1)


class _Layer:
    """One convolution with what follows it. Images are (n, h, w, channels)."""

    def __init__(self, weights: str, bias: str) -> None:
        self.weights = weights
        self.bias = bias
        self._buffers: dict[str, Array] = {}
        # of the last `forward`
        self._columns: Array = np.empty(0)
        self._sums: Array = np.empty(0)
        self._pooled: Array = np.empty(0)

    def forward(self, params: Params, x: Array, dtype: DTypeLike) -> Array:
        n, h, w, c = x.shape
        weights = params[self.weights]  # (k, k, c, filters)
        k, filters = len(weights), weights.shape[-1]
        before = (k - 1) // 2
        padded = self._buffer("padded", (n, h + k - 1, w + k - 1, c), dtype)  # its rim stays 0
        padded[:, before : before + h, before : before + w] = x
        windows = sliding_window_view(padded, (k, k), axis=(1, 2))
        self._columns = self._buffer("columns", (n, h, w, k, k, c), dtype)
        self._columns[...] = windows.transpose(0, 1, 2, 4, 5, 3)
        self._sums = self._buffer("sums", (n, h, w, filters), dtype)
        np.matmul(
            self._columns.reshape(n * h * w, -1),
            weights.reshape(-1, filters),
            out=self._sums.reshape(n * h * w, filters),
        )
        self._pooled = self._buffer("pooled", (n, h // POOL, w // POOL, filters), dtype)
        first, *others = _corners(self._sums)
        self._pooled[...] = first
        for corner in others:
            np.maximum(self._pooled, corner, out=self._pooled)
        rectified = self._buffer("rectified", self._pooled.shape, dtype)
        np.add(self._pooled, params[self.bias], out=rectified)
        return np.maximum(rectified, 0.0, out=rectified)

    def backward(
        self, params: Params, delta: Array, out: dict[str, Array], *, further: bool
    ) -> Array | None:
        """`delta` is 0 where ReLU was; returns the same for the layer before, if there is one."""
        n, h, w, filters = self._sums.shape
        delta = delta.reshape(self._pooled.shape)
        np.add.reduce(delta.reshape(-1, filters), axis=0, out=out[self.bias])
        dsums = self._unpooled(delta).reshape(n * h * w, filters)
        columns = self._columns.reshape(n * h * w, -1)
        np.matmul(columns.T, dsums, out=out[self.weights].reshape(-1, filters))
        if not further:
            return None
        dcolumns = self._buffer("dcolumns", self._columns.shape, dsums.dtype)
        weights = params[self.weights].reshape(-1, filters)
        np.matmul(dsums, weights.T, out=dcolumns.reshape(n * h * w, -1))
        return self._overlapped(dcolumns)

    def _unpooled(self, delta: Array) -> Array:
        """The derivative by all sums: it goes to the first maximum of each window, and only there.

        Equal maxima are common (an empty corner of an image), so that each may not get all of it.
        """
        dsums = self._buffer("dsums", self._sums.shape, delta.dtype)  # an odd rim stays 0
        left = delta.copy()
        for corner, dcorner in zip(_corners(self._sums), _corners(dsums), strict=True):
            np.multiply(left, corner == self._pooled, out=dcorner)
            left -= dcorner
        return dsums

    def _overlapped(self, dcolumns: Array) -> Array:
        """The windows' derivatives, summed where they overlap; 0 where the input was not above 0.

        The input is what ReLU made of the layer before, and is still in the padded images.
        """
        n, h, w, k, _, _ = dcolumns.shape
        before = (k - 1) // 2
        inside = np.s_[:, before : before + h, before : before + w]
        padded = self._buffers["padded"][:n]
        dpadded = self._buffer("dpadded", padded.shape, dcolumns.dtype)
        dpadded[...] = 0.0
        for i in range(k):
            for j in range(k):
                dpadded[:, i : i + h, j : j + w] += dcolumns[:, :, :, i, j]
        return np.multiply(dpadded[inside], padded[inside] > 0)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Memory for a batch: made with zeros, and kept for all batches that are no larger."""
        kept = self._buffers.get(name)
        if (
            kept is None
            or kept.shape[1:] != shape[1:]
            or len(kept) < shape[0]
            or kept.dtype != dtype
        ):
            kept = self._buffers[name] = np.zeros(shape, dtype)
        return kept[: shape[0]]


def _corners(images: Array) -> Iterator[Array]:
    """The four views of every second row and column; an odd last one is in none of them."""
    _, h, w, _ = images.shape
    for i in range(POOL):
        for j in range(POOL):
            yield images[:, i : h // POOL * POOL : POOL, j : w // POOL * POOL : POOL]
