"""Ranges of hosts, and what hosts take over from `ssh`."""

from __future__ import annotations

from typing import Any

import pytest

from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.hosts import expand, mistakes, with_defaults


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[01-03,12]", ["gpu01", "gpu02", "gpu03", "gpu12"]),
        ("gpu[8-10]", ["gpu8", "gpu9", "gpu10"]),
        ("gpu[08-10].lab", ["gpu08.lab", "gpu09.lab", "gpu10.lab"]),
        ("r[1-2]n[1, 2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu[7]", ["gpu7"]),
    ],
)
def test_ranges(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("gpu[4-1]", "backwards"),
        ("gpu[1-", "has no ']'"),
        ("gpu1]", "has no '['"),
        ("gpu]1[", "has no ']'"),
        ("gpu[[1]]", "is not a range"),
        ("gpu[]", "is not a range"),
        ("gpu[a-c]", "is not a range"),
        ("gpu[1-2-3]", "is not a range"),
        ("gpu[1-999999999]", "is too large"),
        ("g[1-200][1-200]", "is too large"),
        ("gpu[1-99999999999999999999]", "is not a range"),
    ],
)
def test_bad_ranges(text: str, what: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(text)
    assert what in caught.value.args[0]
    assert caught.value.args[1]


def spec(*hosts: Any, **ssh: Any) -> ClusterSpec:
    return ClusterSpec.model_validate({"hosts": list(hosts), "ssh": ssh})


def test_hosts_take_over_what_they_do_not_say() -> None:
    made = with_defaults(
        spec(
            "a",
            {
                "address": "b",
                "user": "me",
                "port": 23,
                "python": "/opt/python",
                "identity_file": "k",
            },
            "local",
            user="ml",
            port=2222,
            identity_file="key",
        )
    )
    a, b, local = made.hosts
    assert (a.user, a.port, a.identity_file, a.python) == ("ml", 2222, "key", "python3")
    assert (b.user, b.port, b.identity_file, b.python) == ("me", 23, "k", "/opt/python")
    assert (local.user, local.port, local.python) == (None, None, None)
    assert with_defaults(made) == made


@pytest.mark.parametrize(
    ("hosts", "path"),
    [
        (["a", "b", "a"], ("hosts", 2, "name")),
        (["a", {"name": "b", "address": "A"}], ("hosts", 1, "address")),
        (["local", {"name": "b", "transport": "local"}], ("hosts", 1, "address")),
    ],
)
def test_the_same_machine_twice(hosts: list[Any], path: tuple[str | int, ...]) -> None:
    assert [mistake.path for mistake in mistakes(spec(*hosts))] == [path]


def test_one_address_with_two_ports_is_two_machines() -> None:
    hosts = [{"name": f"h{port}", "address": "127.0.0.1", "port": port} for port in (2201, 2202)]
    assert not list(mistakes(spec(*hosts)))
