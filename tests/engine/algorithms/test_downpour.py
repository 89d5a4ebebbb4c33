"""Downpour's bookkeeping: the paper's schedule, and nothing left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.engine.algorithms.downpour import Action, Downpour

SHORT = {Action.NOTHING: ".", Action.PUSH: "p", Action.PULL: "f", Action.PUSH_PULL: "x"}


@pytest.mark.parametrize(
    ("push_every", "fetch_every", "actions"),
    [
        (1, 1, "xxxxxxxx"),
        (2, 2, ".x.x.x.x"),
        (1, 4, "pppxpppx"),
        (4, 1, "fffxfffx"),
        (2, 3, ".pfp.x.p"),
    ],
)
def test_the_papers_schedule(push_every: int, fetch_every: int, actions: str) -> None:
    downpour = Downpour(push_every, fetch_every)
    assert "".join(SHORT[downpour.after_gradient()] for _ in actions) == actions


def test_a_sum_begins_anew_after_each_push() -> None:
    downpour = Downpour(push_every=2)
    fresh = []
    for _ in range(4):
        fresh.append(downpour.fresh)
        downpour.after_gradient()
    assert fresh == [True, False, True, False]


def test_a_flush_sends_what_there_is_and_only_then() -> None:
    downpour = Downpour(push_every=3, fetch_every=3)
    assert downpour.flush() is Action.NOTHING
    downpour.after_gradient()
    assert downpour.flush() is Action.PUSH
    assert downpour.flush() is Action.NOTHING
    # The count to the next push starts anew, that to the next fetch goes on.
    assert [downpour.after_gradient() for _ in range(3)] == [
        Action.NOTHING,
        Action.PULL,
        Action.PUSH,
    ]


def test_gradients_that_are_not_finite_are_not_pushed() -> None:
    downpour = Downpour()
    assert downpour.after_gradient(finite=False) is Action.PULL
    assert downpour.fresh
    assert downpour.after_gradient() is Action.PUSH_PULL
    pair = Downpour(push_every=2, fetch_every=2)
    assert pair.after_gradient() is Action.NOTHING
    assert pair.after_gradient(finite=False) is Action.PUSH_PULL
    assert pair.fresh


def test_a_push_that_was_due_and_had_nothing_to_send_is_known() -> None:
    downpour = Downpour(push_every=2)
    skipped = []
    for finite, ends in [(False, False), (False, False), (True, False), (False, True)]:
        downpour.after_gradient(finite, ends)
        skipped.append(downpour.skipped)
    assert skipped == [False, True, False, False]
    downpour.after_gradient(False, ends=True)
    assert downpour.skipped


def test_a_pull_for_another_reason_counts() -> None:
    downpour = Downpour(push_every=9, fetch_every=2)
    downpour.after_gradient()
    downpour.pulled()
    assert downpour.after_gradient() is Action.NOTHING
    assert downpour.after_gradient() is Action.PULL


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.sampled_from(["finite", "finite", "nan", "flush"]), max_size=60),
)
def test_every_finite_gradient_is_pushed_once(
    push_every: int, fetch_every: int, steps: list[str]
) -> None:
    downpour = Downpour(push_every, fetch_every)
    total, pushed = 0, 0
    for step in [*steps, "flush"]:
        before = total
        total += step == "finite"
        assert downpour.fresh == (pushed == before)
        action = downpour.flush() if step == "flush" else downpour.after_gradient(step != "nan")
        if action in (Action.PUSH, Action.PUSH_PULL):
            assert total > pushed
            pushed = total
        assert total - pushed <= push_every
    assert pushed == total
