"""What workers contribute to one update together: a sum for each block, each part of it once.

A round is one try to collect all parts; its number only grows. The first part of a newer round
begins the sum anew, so that whatever is left of an older one is gone without being zeroed; a part
of an older round is `Late`; a part that is there already is skipped. No locks: the shard's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Late(Exception):
    """The round is over: a newer one has begun, or it has been taken."""

    def __init__(self, round_: int, newest: int) -> None:
        super().__init__(f"round {round_} is over, now it is {newest}")


class Incomplete(Exception):
    """Parts of the round are missing."""


class Sums:
    """Of the blocks of one shard; `parts`: how the shard's vector is cut."""

    def __init__(self, size: int, dtype: Any, parts: list[slice]) -> None:
        whole = np.empty(size, dtype)
        self._sums = [whole[part] for part in parts]
        self._rounds = [0] * len(parts)
        self._parts: list[set[int]] = [set() for _ in parts]
        self._taken = [0] * len(parts)  # the newest round that is in the parameters

    def is_new(self, block: int, round_: int, part: int) -> bool:
        """Whether `add` would add it. Raises Late."""
        newest = max(self._rounds[block], self._taken[block] + 1)
        if round_ < newest:
            raise Late(round_, newest)
        return round_ > self._rounds[block] or part not in self._parts[block]

    def add(self, block: int, round_: int, part: int, gradient: NDArray[Any]) -> None:
        """Adds a part that is new."""
        if round_ > self._rounds[block]:
            self._rounds[block] = round_
            self._parts[block] = {part}
            np.copyto(self._sums[block], gradient)
        else:
            self._parts[block].add(part)
            np.add(self._sums[block], gradient, out=self._sums[block])

    def total(self, block: int, round_: int, parts: int) -> NDArray[Any] | None:
        """The sum of all parts; None where it has been taken already. Raises Incomplete."""
        if self._taken[block] >= round_:
            return None
        have = len(self._parts[block]) if self._rounds[block] == round_ else 0
        if have != parts:
            raise Incomplete(f"block {block}: {have} of {parts} parts of round {round_}")
        return self._sums[block]

    def take(self, block: int, round_: int) -> None:
        """The sum is in the parameters: nothing more is added to this round."""
        self._taken[block] = round_
