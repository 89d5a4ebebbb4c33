"""What a late push is worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.engine.staleness import MEMORY, Staleness, Verdict


def judged(staleness: Staleness, lates: list[int], worker: int = 0) -> list[Verdict]:
    """The verdicts on pushes 1, 2, …"""
    return [
        staleness.judge(worker, (1, seq), lambda late=late: late)  # type: ignore[misc]
        for seq, late in enumerate(lates, start=1)
    ]


def test_lateness_matters_only_if_it_is_asked_for() -> None:
    assert not Staleness().matters
    assert Staleness(0).matters
    assert Staleness(damping="relative").matters


def test_what_is_later_than_allowed_is_dropped() -> None:
    staleness = Staleness(most=2)
    verdicts = judged(staleness, [0, 2, 3, 100, 1])
    assert [verdict.dropped for verdict in verdicts] == [False, False, True, True, False]
    assert [verdict.factor for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert [verdict.late for verdict in verdicts] == [0, 2, 3, 100, 1]


def test_only_the_newest_push_is_remembered_and_of_each_worker() -> None:
    staleness = Staleness(most=0)
    judged(staleness, [1], worker=0)
    judged(staleness, [0], worker=1)
    assert staleness.dropped(0, (1, 1))
    assert not staleness.dropped(1, (1, 1))
    assert not staleness.dropped(0, (2, 1))
    assert not staleness.dropped(7, (1, 1))
    judged(staleness, [1, 0], worker=0)
    assert not staleness.dropped(0, (1, 1))
    assert not staleness.dropped(0, (1, 2))


def test_inverse_divides_by_the_lateness() -> None:
    verdicts = judged(Staleness(damping="inverse"), [0, 1, 2, 4, 10])
    assert [verdict.factor for verdict in verdicts] == [1, 1, 0.5, 0.25, 0.1]


def test_relative_leaves_the_usual_push_alone() -> None:
    staleness = Staleness(damping="relative")
    judged(staleness, [3] * 200)
    usual, later, sooner = judged(staleness, [3, 7, 0])
    assert usual.factor == pytest.approx(1.0, abs=1e-3)
    assert sooner.factor == 1.0
    mean = 3 + MEMORY * (7 - 3)
    assert later.factor == pytest.approx((mean + 1) / 8, abs=1e-3)


def test_what_is_dropped_leaves_no_trace_in_the_mean() -> None:
    plain, picky = Staleness(damping="relative"), Staleness(most=5, damping="relative")
    judged(plain, [2, 2, 2])
    judged(picky, [2, 100, 2, 100, 2])
    again = [judged(staleness, [4])[0].factor for staleness in (plain, picky)]
    assert again[0] == again[1] < 1.0


@pytest.mark.parametrize("damping", ["none", "inverse", "relative"])
def test_a_push_is_judged_once_whatever_comes_between(damping: str) -> None:
    staleness = Staleness(most=3, damping=damping)
    asked = []

    def late() -> int:
        asked.append(1)
        return len(asked)

    first = staleness.judge(0, (1, 1), late)
    staleness.judge(1, (1, 1), lambda: 50)
    assert [staleness.judge(0, (1, 1), late) for _ in range(5)] == [first] * 5
    assert len(asked) == 1
    staleness.judge(0, (2, 1), late)  # another incarnation's first
    assert len(asked) == 2


def test_a_base_from_the_future_is_not_early() -> None:
    assert judged(Staleness(most=0), [-3]) == [Verdict(0)]


@given(
    st.none() | st.integers(0, 20),
    st.sampled_from(["none", "inverse", "relative"]),
    st.lists(st.integers(0, 10**6), max_size=40),
)
def test_a_factor_damps_and_never_turns_round(
    most: int | None, damping: str, lates: list[int]
) -> None:
    for late, verdict in zip(lates, judged(Staleness(most, damping), lates), strict=True):
        assert verdict.dropped == (most is not None and late > most)
        assert 0.0 < verdict.factor <= 1.0 or (verdict.dropped and verdict.factor == 0.0)
