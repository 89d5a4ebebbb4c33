"""Isolated SSH hosts for the tests of this folder, and a home that may log in on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ssh.hosts import CHECKOUT, Hosts, require

pytest.register_assert_rewrite("tests.transport.contract")


@pytest.fixture(scope="session")
def shared_hosts() -> Iterator[Hosts]:
    """Two hosts for all tests that leave them as they found them."""
    require()
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, no ssh agent, no XDG folders: the launcher's user is a new one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("SSH_AUTH_SOCK", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="session")
def launcher_cache() -> Path:
    """A launcher's cache that stays between runs: packages are downloaded once per checkout."""
    folder = CHECKOUT / ".cache" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
