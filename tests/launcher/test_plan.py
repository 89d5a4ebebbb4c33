"""Observed and desired -> a plan, as text."""

from __future__ import annotations

from typing import Any

import pytest

from dsgd_cli.launcher.observe import ObservedHost, Wanted
from dsgd_cli.launcher.placement import Placed
from dsgd_cli.launcher.plan import fingerprint, plan

PLACED = (
    Placed("coordinator/0", "a"),
    Placed("server/0", "a"),
    Placed("worker/0", "a"),
    Placed("worker/1", "b"),
)
PRINT = "0123456789ab"


def host(name: str, **changes: Any) -> ObservedHost:
    """A host on which nothing runs, with changes."""
    values: dict[str, Any] = {
        "host": name,
        "host_id": f"{name}-id",
        "cluster_id": None,
        "agent_alive": False,
        "remains": False,
        "processes": {},
        "spec": None,
        "missing": Wanted(),
        "ssh_connection": None,
        "cache": "/cache",
        "state": "/state",
        "run_dir": f"/state/run/lab@{name}",
        "raw": {},
    }
    return ObservedHost(**{**values, **changes})


def living(name: str, *processes: str, dead: tuple[str, ...] = (), **changes: Any) -> ObservedHost:
    """A host with a living agent of the described cluster."""
    known = dict.fromkeys(processes, True) | dict.fromkeys(dead, False)
    values: dict[str, Any] = {
        "agent_alive": True,
        "cluster_id": "c1",
        "processes": known,
        "spec": {"fingerprint": PRINT},
    }
    return host(name, **{**values, **changes})


def text(*hosts: ObservedHost) -> str:
    return str(plan(PLACED, PRINT, {each.host: each for each in hosts}))


def test_a_cold_start_ships_then_starts_agents_then_processes() -> None:
    bare = host("b", missing=Wanted("c0de", ("w1", "w2"), ("f1",)))
    assert text(host("a"), bare) == (
        "+ b  send code, 2 wheels, 1 files  (not in its cache)\n"
        "+ a  agent  (not running)\n"
        "+ b  agent  (not running)\n"
        "+ coordinator/0@a  (not running)\n"
        "+ server/0@a  (not running)\n"
        "+ worker/0@a  (not running)\n"
        "+ worker/1@b  (not running)"
    )


def test_a_running_cluster_needs_nothing() -> None:
    a = living("a", "coordinator/0", "server/0", "worker/0")
    todo = plan(PLACED, PRINT, {"a": a, "b": living("b", "worker/1")})
    assert todo.steps == ()
    assert todo.cluster_id == "c1"
    assert not todo.replaces


def test_only_what_died_is_started_again() -> None:
    a = living("a", "coordinator/0", "server/0", dead=("worker/0",))
    assert text(a, living("b", "worker/1")) == "+ worker/0@a  (died)"


def test_a_host_that_lost_its_agent_is_cleared_and_started_again() -> None:
    a = living("a", "coordinator/0", "server/0", "worker/0")
    assert text(a, host("b", remains=True)) == (
        "- b  clear  (left by a cluster whose agent is gone)\n"
        "+ b  agent  (not running)\n"
        "+ worker/1@b  (not running)"
    )


def test_another_description_replaces_the_whole_cluster() -> None:
    a = living("a", "coordinator/0", "server/0", "worker/0", spec={"fingerprint": "other"})
    b = living("b", "worker/1", spec={"fingerprint": "other"})
    todo = plan(PLACED, PRINT, {"a": a, "b": b})
    assert todo.replaces
    assert todo.cluster_id is None
    assert str(todo).splitlines()[:2] == [
        "- a  clear  (the cluster there differs from this description)",
        "- b  clear  (the cluster there differs from this description)",
    ]
    assert {step.process for step in todo.starts} == {item.process for item in PLACED}


def test_agents_of_two_different_ups_are_both_replaced() -> None:
    a = living("a", "coordinator/0", "server/0", "worker/0")
    assert plan(PLACED, PRINT, {"a": a, "b": living("b", "worker/1", cluster_id="c2")}).replaces


@pytest.mark.parametrize("change", [{"threads": 2}, {"code": "other"}, {"placed": []}])
def test_the_fingerprint_sees_each_change(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"placed": [["worker/0", "a"]], "code": "c0de", "threads": 1}
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert fingerprint(base) != fingerprint({**base, **change})
