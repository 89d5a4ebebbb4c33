"""Every test that takes `kind` or `new_worker` runs for each kind of channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsgd_cli.wire.channels.base import Shape
from tests.wire.channels.kinds import KINDS, Kind, Worker
from tests.wire.conftest import Shard

# In one frame; several blocks in each of two frames; a frame for each block. Last blocks shorter.
SHAPES = {
    "tiny": Shape(4000, 64),
    "middling": Shape(1_500_008, 4096),
    "large": Shape((3 << 20) + 4000, 1 << 20),
}


@pytest.fixture(params=KINDS, ids=repr)
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture
def configured(shard: Shard, shape: Shape) -> Shard:
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    return shard


@pytest.fixture
def new_worker(configured: Shard, shape: Shape, kind: Kind) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**more: Any) -> Worker:
        made.append(Worker(kind, configured, more.pop("shape", shape), **more))
        return made[-1]

    yield make
    for worker in made:
        worker.channel.close()
