"""Clusters of real processes. Nothing of them may be left, whatever the test did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemons.agent import Cluster, cluster


@pytest.fixture
def new_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as stack:

        def make(**more: Any) -> Cluster:
            return stack.enter_context(cluster(tmp_path, **more))

        yield make
