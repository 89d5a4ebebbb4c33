"""Placement: even, contiguous, bounded by slots, and the same each time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.placement import gpus, mistakes, place


def spec(**fields: Any) -> ClusterSpec:
    return ClusterSpec.model_validate(fields)


def on(made: ClusterSpec, role: str) -> list[str]:
    return [item.host for item in place(made) if item.process.startswith(f"{role}/")]


def test_blocks_are_contiguous_and_even() -> None:
    made = spec(hosts=["a", "b", "c"], servers=2, workers=8)
    assert on(made, "server") == ["a", "b"]
    assert on(made, "worker") == list("aaabbbcc")
    assert on(made, "coordinator") == ["a"]
    assert [item.process for item in place(made)][:4] == [
        "coordinator/0",
        "server/0",
        "server/1",
        "worker/0",
    ]


def test_only_where_it_is_said() -> None:
    made = spec(
        hosts=["ps1", "gpu1", "gpu2"],
        servers={"count": 1, "on": "ps1"},
        workers={"count": 2, "on": ["gpu*"]},
    )
    assert on(made, "server") == ["ps1"]
    assert on(made, "worker") == ["gpu1", "gpu2"]


def test_a_range_is_a_pattern_too() -> None:
    made = spec(hosts=[f"gpu{i}" for i in range(1, 13)], workers={"count": 2, "on": ["gpu[11-12]"]})
    assert on(made, "worker") == ["gpu11", "gpu12"]


def test_slots_bound_the_workers() -> None:
    made = spec(hosts=[{"address": "a", "slots": 1}, "b", {"address": "c", "slots": 2}], workers=8)
    assert Counter(on(made, "worker")) == {"a": 1, "b": 5, "c": 2}


def test_each_worker_on_a_host_with_gpus_has_one_of_its_own() -> None:
    made = spec(
        hosts=[{"address": "a", "slots": {"gpu": 2}}, "b", {"address": "c", "slots": {"gpu": 1}}],
        servers={"count": 1, "on": "a"},
        workers=5,
    )
    assert on(made, "worker") == list("aabbc")
    assert gpus(place(made), made.hosts) == {"worker/0": 0, "worker/1": 1, "worker/4": 0}


@pytest.mark.parametrize(
    ("fields", "path", "said"),
    [
        (
            {"servers": {"count": 1, "on": ["gpv1"]}, "hosts": ["gpu1"]},
            ("servers", "on", 0),
            "no host matches 'gpv1' – did you mean 'gpu1'?",
        ),
        (
            {"workers": {"count": 1, "on": ["gpu[3-1]"]}, "hosts": ["gpu1"]},
            ("workers", "on", 0),
            "'gpu[3-1]' is a range that goes backwards – write [1-3]",
        ),
        (
            {"workers": 5, "hosts": [{"address": "a", "slots": 4}]},
            ("workers", "count"),
            "5 workers, but their hosts have 4 slots – add hosts or slots, or use fewer workers",
        ),
    ],
)
def test_what_cannot_be_placed(fields: Any, path: tuple[str | int, ...], said: str) -> None:
    made = spec(**fields)
    (mistake,) = mistakes(made)
    assert (mistake.path, str(mistake)) == (path, said)
    with pytest.raises(SpecError) as caught:
        place(made)
    assert caught.value.message == said


@given(
    st.lists(st.none() | st.integers(0, 5), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_everything_is_placed_or_refused(
    slots: list[int | None], servers: int, workers: int
) -> None:
    hosts = [{"address": f"h{i}", "slots": slot} for i, slot in enumerate(slots)]
    made = spec(hosts=hosts, servers=servers, workers=workers)
    if None not in slots and sum(slot or 0 for slot in slots) < workers:
        with pytest.raises(SpecError):
            place(made)
        return
    names = [f"h{i}" for i in range(len(slots))]
    placed = on(made, "worker")
    assert len(placed) == workers
    assert placed == sorted(placed, key=names.index)
    shares = Counter(placed)
    free = [shares[name] for name, slot in zip(names, slots, strict=True) if slot is None]
    assert max(free, default=0) - min(free, default=0) <= 1
    for name, slot in zip(names, slots, strict=True):
        assert slot is None or shares[name] <= slot
    assert len(on(made, "server")) == servers
