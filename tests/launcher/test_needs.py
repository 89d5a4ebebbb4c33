"""Which packages go to which host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher import needs
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.environment import Extra, Wheel


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """host -> the extras that were asked for."""
    asked: dict[str, list[str]] = {}

    def wheels_for(host: str, facts: Any, note: Any, extras: Sequence[Extra]) -> tuple[Wheel, ...]:
        asked[host] = [str(each) for each in extras]
        kinds = ["", *(Path(each).stem for each in extras)]
        return tuple(Wheel(Path(f"{kind}.whl"), kind.ljust(32, "0"), 1) for kind in kinds)

    monkeypatch.setattr(needs, "wheels_for", wheels_for)
    return asked


def needs_of(**fields: Any) -> needs.Needs:
    where = {"servers": {"count": 1, "on": ["a"]}, "workers": {"count": 2, "on": ["b", "local"]}}
    spec = ClusterSpec.model_validate({"hosts": ["a", "b", "local"], **where, **fields})
    cluster = Cluster(spec, lambda _: None)
    observed: Any = dict.fromkeys(cluster.used, SimpleNamespace(raw={}))
    screen: Any = SimpleNamespace(note=lambda text: None)
    return needs.needs_of(cluster, observed, screen)


def test_what_reads_images_goes_to_the_hosts_of_workers(sent: dict[str, list[str]]) -> None:
    found = needs_of(train={"data": {"images": "host:/srv/photos"}})
    assert sent == {"a": [], "b": ["images"]}
    assert found.env_hashes("b") == ("0" * 32, "images".ljust(32, "0"))
    assert found.env_hashes("local") == ()
    assert found.file_path("b", "/cache", "data") == "/srv/photos"


def test_nobody_else_gets_it(sent: dict[str, list[str]]) -> None:
    needs_of(train={"data": {"npz": "host:/srv/a.npz"}})
    assert sent == {"a": [], "b": []}
    sent.clear()
    images = {"data": {"images": "host:/srv/photos"}}
    assert needs_of(train=images, env="existing").env_hashes("b") == ()
    assert sent == {}


def test_what_the_model_imports_goes_to_the_hosts_of_workers_too(
    sent: dict[str, list[str]],
) -> None:
    env = {"requirements": "/home/me/needed.txt"}
    found = needs_of(env=env)
    assert sent == {"a": [], "b": ["/home/me/needed.txt"]}
    assert found.env_hashes("b") == ("0" * 32, "needed".ljust(32, "0"))
    needs_of(env=env, train={"data": {"images": "host:/srv/photos"}})
    assert sent == {"a": [], "b": ["images", "/home/me/needed.txt"]}


def test_a_folder_is_found_in_the_cache_of_a_host(
    sent: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "mnist").mkdir()
    found = needs_of(train={"data": {"idx": str(tmp_path / "mnist")}})
    bundle = found.bundles["data"]
    assert found.file_path("b", "/cache", "data") == f"/cache/files/{bundle.hash}/mnist"
    assert found.file_path("local", "/cache", "data") == str(tmp_path / "mnist")
