"""Sums of contributions: rounds, parts, repeats; against a model that forgets nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dsgd_cli.engine.sums import Incomplete, Late, Sums

ONES = np.ones(2)


def sums_of(blocks: int) -> Sums:
    return Sums(2 * blocks, "float64", [slice(2 * b, 2 * b + 2) for b in range(blocks)])


def add(sums: Sums, round_: int, part: int, times: float = 1.0, block: int = 0) -> bool:
    new = sums.is_new(block, round_, part)
    if new:
        sums.add(block, round_, part, times * ONES)
    return new


def total(sums: Sums, round_: int, parts: int, block: int = 0) -> list[float] | None:
    found = sums.total(block, round_, parts)
    return None if found is None else found.tolist()


def test_each_part_counts_once() -> None:
    sums = sums_of(1)
    assert [add(sums, 1, part, 10.0**part) for part in (2, 0, 2, 1, 0)] == [
        *(True, True, False, True, False)
    ]
    assert total(sums, 1, 3) == [111.0, 111.0]


def test_a_newer_round_begins_anew_without_anything_of_the_older_one() -> None:
    sums = sums_of(1)
    add(sums, 1, 0, 5.0)
    assert add(sums, 4, 0)  # rounds may be left out
    assert add(sums, 4, 1)
    with pytest.raises(Late, match="round 1 is over, now it is 4"):
        sums.is_new(0, 1, 1)
    assert total(sums, 4, 2) == [2.0, 2.0]


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_sum_of_fewer_or_more_parts_than_expected_is_not_given(parts: int) -> None:
    sums = sums_of(1)
    add(sums, 1, 0)
    add(sums, 1, 1)
    with pytest.raises(Incomplete, match=f"block 0: 2 of {parts} parts of round 1"):
        sums.total(0, 1, parts)


def test_a_round_that_nobody_has_begun_has_no_parts() -> None:
    sums = sums_of(1)
    add(sums, 1, 0)
    with pytest.raises(Incomplete, match="0 of 1 parts of round 2"):
        sums.total(0, 2, 1)


def test_what_is_taken_is_over_and_asking_again_is_harmless() -> None:
    sums = sums_of(1)
    add(sums, 1, 0)
    sums.take(0, 1)
    assert total(sums, 1, 1) is None
    with pytest.raises(Late, match="round 1 is over, now it is 2"):
        sums.is_new(0, 1, 0)  # a repeat, too
    assert add(sums, 2, 0, 3.0)
    assert total(sums, 1, 1) is None
    assert total(sums, 2, 1) == [3.0, 3.0]


def test_blocks_are_sums_of_their_own() -> None:
    sums = sums_of(2)
    add(sums, 1, 0, block=0)
    add(sums, 2, 0, 7.0, block=1)
    sums.take(1, 2)
    assert total(sums, 1, 1, block=0) == [1.0, 1.0]
    assert add(sums, 1, 1, block=0)


def test_the_gradient_stays_its_owners() -> None:
    """A sum that grew in the first contributor's buffer would be sent once more by him."""
    sums, first = sums_of(1), ONES.copy()
    sums.add(0, 1, 0, first)
    sums.add(0, 1, 1, ONES)
    first[:] = 100.0
    assert total(sums, 1, 2) == [2.0, 2.0]


@pytest.mark.parametrize("seed", range(50))
def test_random_contributions_equal_those_of_a_model(seed: int) -> None:
    rng, sums = random.Random(seed), sums_of(3)
    kept: list[dict[int, dict[int, float]]] = [{}, {}, {}]  # of a block: round -> part -> value
    over = [0, 0, 0]
    for _ in range(200):
        block, round_, part = rng.randrange(3), rng.randrange(1, 12), rng.randrange(4)
        rounds = kept[block]
        newest = max(over[block] + 1, *rounds, 1)
        if rng.random() < 0.8:
            if round_ < newest:
                with pytest.raises(Late):
                    sums.is_new(block, round_, part)
                continue
            value = float(rng.randrange(100))
            assert add(sums, round_, part, value, block) == (part not in rounds.get(round_, {}))
            rounds.setdefault(round_, {}).setdefault(part, value)
        elif newest in rounds and newest > over[block]:
            values = rounds[newest].values()
            assert total(sums, newest, len(values), block) == [sum(values)] * 2
            if rng.random() < 0.5:
                sums.take(block, newest)
                over[block] = newest
