from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsgd_cli.agent import paths
from tests.agent.client import Host, Lines


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    opened = Host(tmp_path)
    yield opened
    opened.close()
    for run_dir in tmp_path.glob("*/dsgd/run/*@*"):
        with contextlib.suppress(OSError):
            paths.socket_path(run_dir).unlink()
    paths.prune()


@pytest.fixture(scope="module")
def shared() -> Iterator[Lines]:
    """One bootstrap for tests that it refuses everything to."""
    host = Host(Path("/nonexistent"))
    yield host.connect()
    host.transport.close()
