"""The layout: blocks tile the vector, shards tile the blocks, views are views."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.engine.layout import Layout, cut, flatten, unflatten

MLP = [("W1", (64, 128)), ("b1", (128,)), ("W2", (128, 10)), ("b2", (10,))]  # 9,610 parameters


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    dtype=st.sampled_from(["float32", "float64"]),
    servers=st.integers(1, 12),
    max_block_bytes=st.sampled_from([8, 64, 72, 1024, 1 << 20]),
)
def test_blocks_and_shards_tile_the_vector(
    sizes: list[int], dtype: str, servers: int, max_block_bytes: int
) -> None:
    shapes = [(f"p{i}", (n,)) for i, n in enumerate(sizes)]
    try:
        layout = cut(shapes, dtype, servers, max_block_bytes)
    except SpecError as error:
        assert sum(sizes) == 0 or error.remedy.startswith("set servers: ")
        if sum(sizes):  # and the remedy works
            fits = int(error.remedy.removeprefix("set servers: "))
            assert 1 <= fits < servers
            cut(shapes, dtype, fits, max_block_bytes)
        return
    item_bytes = np.dtype(dtype).itemsize
    assert layout.block_elements * item_bytes <= max_block_bytes
    bounds = [layout.bounds(block) for block in range(layout.blocks)]
    assert bounds[0][0] == 0 and bounds[-1][1] == layout.size == sum(sizes)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(stop - start == layout.block_elements for start, stop in bounds[:-1])
    assert 0 < bounds[-1][1] - bounds[-1][0] <= layout.block_elements
    counts = [shard.blocks for shard in layout.shards]
    assert len(counts) == servers and sum(counts) == layout.blocks
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    for i, shard in enumerate(layout.shards):
        assert shard.index == i
        assert shard.start == bounds[shard.first_block][0]
        assert shard.stop == bounds[shard.last_block - 1][1]
        assert shard.first_block == (layout.shards[i - 1].last_block if i else 0)


def test_the_block_is_a_fair_share_rounded_up_to_64_bytes() -> None:
    layout = cut(MLP, "float32", 2)
    assert layout.size == 9610
    assert layout.block_elements * 4 == 19264  # ceil(38440 / 2) = 19220 -> 19264
    assert [(s.start, s.stop) for s in layout.shards] == [(0, 4816), (4816, 9610)]


def test_large_models_have_blocks_of_at_most_one_mebibyte() -> None:
    layout = cut([("W", (11_000_000,))], "float32", 4)
    assert layout.block_elements == 250_000
    assert [s.blocks for s in layout.shards] == [11, 11, 11, 11]


@pytest.mark.parametrize("size", [270_000, 614_400, 2_000_003, 11_000_000, 75_124_202])
@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_shards_are_even_whatever_the_size(size: int, servers: int) -> None:
    """A server that has twice as much as another one is waited for by everybody."""
    layout = cut([("W", (size,))], "float32", servers)
    sizes = [shard.stop - shard.start for shard in layout.shards]
    assert sum(sizes) == size
    assert max(sizes) * servers < 1.02 * size
    assert layout.block_elements <= 1 << 18


def test_a_test_can_ask_for_tiny_blocks() -> None:
    layout = cut(MLP, "float32", 3, max_block_bytes=64)
    assert layout.block_elements == 16 and layout.blocks == 601


def test_a_shard_that_would_be_empty_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        cut([("W", (5, 8)), ("b", (8,))], "float32", 4)
    assert str(caught.value) == (
        "4 servers but the model has only 3 blocks: "
        "48 parameters are 192 bytes, a block has at least 64"
    )
    assert caught.value.remedy == "set servers: 3"
    assert caught.value.exit_code == 3
    with pytest.raises(SpecError, match="2 servers but the model has only 1 block:"):
        cut([("w", ())], "float64", 2)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([], "float32", "no parameters"),
        ([("W", (0, 10))], "float32", "no parameters"),
        ([("W", (2,)), ("W", (3,))], "float32", "two arrays named 'W'"),
        ([("W", (2,))], "float16", "dtype 'float16' is not supported"),
        ([("W", (-2,))], "float32", "W has the shape"),
    ],
)
def test_what_has_no_layout(
    shapes: list[tuple[str, tuple[int, ...]]], dtype: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        cut(shapes, dtype, 1)


def test_no_servers_and_ragged_blocks_are_refused() -> None:
    with pytest.raises(SpecError, match="at least one"):
        cut(MLP, "float32", 0)
    with pytest.raises(SpecError, match="whole float64"):
        cut(MLP, "float64", 1, max_block_bytes=60)


@pytest.fixture
def small() -> Layout:
    return cut([("W", (2, 3)), ("none", (0, 4)), ("s", ()), ("b", (3,))], "float32", 1)


def test_flatten_and_unflatten_are_inverse(small: Layout) -> None:
    params = {
        "W": np.arange(6.0).reshape(2, 3),
        "none": np.zeros((0, 4)),
        "s": np.array(6.0),
        "b": np.arange(7.0, 10.0),
    }
    flat = np.empty(10, np.float32)
    flatten(small, params, flat)
    assert flat.tolist() == list(range(10))
    back = unflatten(small, flat)
    assert list(back) == ["W", "none", "s", "b"]
    for name, array in params.items():
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_unflatten_gives_views(small: Layout) -> None:
    flat = np.zeros(10, np.float32)
    views = unflatten(small, flat)
    views["W"][1, 2] = 5
    views["s"][()] = 6
    assert flat[5] == 5 and flat[6] == 6


def test_flatten_never_broadcasts_or_truncates(small: Layout) -> None:
    params = {name: np.zeros(shape) for name, shape in [("W", (2, 3)), ("none", (0, 4)), ("s", ())]}
    flat = np.empty(10, np.float32)
    with pytest.raises(ValueError, match="the layout has"):
        flatten(small, params, flat)
    with pytest.raises(ValueError, match=r"b has shape \(1,\), the layout \(3,\)"):
        flatten(small, params | {"b": np.zeros(1)}, flat)
    with pytest.raises(TypeError):
        flatten(small, params | {"b": np.zeros(3, complex)}, flat)
    with pytest.raises(ValueError, match="vector"):
        flatten(small, params | {"b": np.zeros(3)}, flat[:9])
    with pytest.raises(ValueError, match="vector"):
        unflatten(small, flat[:9])


def test_an_element_names_its_tensor(small: Layout) -> None:
    assert [small.tensor_at(i).name for i in (0, 5, 6, 7, 9)] == ["W", "W", "s", "b", "b"]
    with pytest.raises(IndexError):
        small.tensor_at(10)
    with pytest.raises(IndexError):
        small.bounds(1)
