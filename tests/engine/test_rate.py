"""The schedules of the learning rate, value by value, and what holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsgd_cli.contract.options import DECAYS
from dsgd_cli.engine.algorithms.names import steps_per_update
from dsgd_cli.engine.rate import Rate, Scale, constant, cosine, make, step


def work(count: float, unit: str = "step") -> dict[str, Any]:
    return {"count": count, "unit": unit}


def rate(decay: dict[str, Any] | None = None, scale: Scale | None = None, **options: Any) -> Rate:
    made = make({"decay": decay, **options}, scale or Scale())
    assert made is not None
    return made


def steps(count: float, factor: float = 0.1, unit: str = "step") -> dict[str, Any]:
    return {"name": "step", "options": {"every": work(count, unit), "factor": factor}}


def cosines(count: float, floor: float = 0.0, unit: str = "step") -> dict[str, Any]:
    return {"name": "cosine", "options": {"over": work(count, unit), "floor": floor}}


def test_constant_is_1() -> None:
    assert [constant()(steps) for steps in (0, 1, 1e9)] == [1, 1, 1]


def test_step_falls_by_a_factor_again_and_again() -> None:
    made = step(every=10, factor=0.5)
    assert [made(s) for s in (0, 9, 9.99, 10, 19, 20, 35)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.125]


def test_cosine_falls_to_its_floor_and_stays() -> None:
    made = cosine(over=100, floor=0.2)
    assert [made(s) for s in (0, 50, 100, 101, 1e12)] == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    assert made(25) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("decay", [None, {"name": "constant", "options": {}}])
def test_what_is_always_1_is_nothing(decay: dict[str, Any] | None) -> None:
    assert make({"decay": decay, "warm_up": None}, Scale()) is None
    assert make({}, Scale()) is None


def test_a_plateau_is_the_coordinators() -> None:
    decay = {"name": "plateau", "options": {"patience": 3, "factor": 0.1}}
    assert make({"decay": decay}, Scale()) is None
    assert rate(decay, warm_up=work(4))(1) == 0.25


def test_updates_count_from_1() -> None:
    made = rate(steps(3))
    assert [made(update) for update in range(1, 8)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_the_rate_rises_from_0_and_is_whole_with_the_last_step_of_the_warm_up() -> None:
    made = rate(warm_up=work(4))
    assert [made(update) for update in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_warm_up_and_decay_are_multiplied() -> None:
    made = rate(steps(2, 0.5), warm_up=work(4))
    assert [made(update) for update in range(1, 6)] == [0.25, 0.5, 0.75 / 2, 0.5, 0.25]


def test_an_update_of_several_steps_moves_on_by_as_many() -> None:
    one, four = rate(steps(8), warm_up=work(8)), rate(steps(8), Scale(4), warm_up=work(8))
    assert [four(update) for update in (1, 2, 3)] == pytest.approx([0.5, 1, 0.1])
    assert four(3) == one(9)


def test_epochs_are_counted_in_steps() -> None:
    scale = Scale(steps_per_update=2, steps_per_epoch=2.5)
    assert scale.steps(work(4, "epoch")) == 10
    made = rate(steps(4, unit="epoch"), scale)
    assert [made(update) for update in (5, 6)] == pytest.approx([1, 0.1])
    assert rate(scale=scale, warm_up=work(4, "epoch"))(1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"name": "downpour", "push_every": 1}, 1),
        ({"name": "downpour", "push_every": 5}, 5),
        ({"name": "stale_synchronous", "push_every": 3}, 3),
        ({"name": "synchronous", "backup_workers": 1}, 3),
        ({"name": "synchronous", "backup_workers": 4}, 1),
        ({"name": "sandblaster"}, 1),
    ],
)
def test_how_many_steps_an_update_stands_for(algorithm: dict[str, Any], expected: int) -> None:
    assert steps_per_update(algorithm, workers=4) == expected


counts = st.floats(min_value=0, exclude_min=True, max_value=1e12)
units = st.sampled_from(["step", "epoch"])
factors = st.floats(min_value=0, exclude_min=True, max_value=1)
scales = st.builds(Scale, st.floats(1, 1e6), st.floats(1e-3, 1e9))
decays = st.one_of(
    st.just({"name": "constant", "options": {}}),
    st.just({"name": "plateau", "options": {}}),
    st.builds(steps, counts, factors, units),
    st.builds(cosines, counts, st.floats(0, 1), units),
)
warm_ups = st.none() | st.builds(work, counts, units)


@given(decays, warm_ups, scales, st.lists(st.integers(1, 10**12), min_size=2, max_size=8))
@example(steps(5e-324, 1.0, "epoch"), None, Scale(1.0, 0.5), [1, 2])  # half of that is no number
@example(cosines(5e-324, 0.0, "epoch"), None, Scale(1.0, 0.5), [1, 2])
@example({"name": "constant"}, work(5e-324, "epoch"), Scale(1.0, 0.5), [1, 2])
def test_no_rate_is_negative_or_more_than_1(
    decay: dict[str, Any], warm_up: dict[str, Any] | None, scale: Scale, updates: list[int]
) -> None:
    made = make({"decay": decay, "warm_up": warm_up}, scale)
    found = [1.0 if made is None else made(update) for update in sorted(updates)]
    assert all(0.0 <= factor <= 1.0 for factor in found)
    if warm_up is None:  # and without a warm-up it never rises
        assert found == sorted(found, reverse=True)


@given(st.sampled_from(list(DECAYS)), scales, st.integers(1, 10**9))
def test_the_defaults_of_the_yaml_make_a_schedule(name: str, scale: Scale, update: int) -> None:
    options = DECAYS[name]().model_dump(mode="json")
    made = make({"decay": {"name": name, "options": options}}, scale)
    assert made is None or 0.0 <= made(update) <= 1.0
