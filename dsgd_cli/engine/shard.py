"""The part of the parameters that one server holds: a state machine without sockets or clocks.

Invariant: each acknowledged push is in each block exactly once. A block carries the parameters, the
optimizer's slots, a version (the number of updates in it) and, per worker, the last push that it
contains as `(incarnation, seq)`:

    seq ≤ applied → skip · the next seq → apply · a gap → OutOfOrder · an older incarnation → Fenced

A refused push changes nothing and consumes no seq; one that is dropped because it comes too late
(`staleness`) consumes its seq and changes nothing else. What workers contribute to one update
together is summed (`sums`) until `commit`. Blocks are numbered from 0 in the shard.

Any number of threads: numpy releases the GIL in the middle of an update, so each block has a lock,
and data, slots, version and `applied` change and are read under it. `fence` and `freeze` are
barriers: when they return, no update that they forbid is under way.
"""

from __future__ import annotations

import contextvars
import math
import platform
import threading
from collections.abc import Callable, MutableSequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.engine.optimizers import CHUNK, SCRATCH_ROWS, Optimizer
from dsgd_cli.engine.rate import Rate
from dsgd_cli.engine.staleness import Staleness, Verdict
from dsgd_cli.engine.sums import Late, Sums

STAMP_OF_WRITE = 1 << 40
NOTHING = (0, 0)  # the (incarnation, seq) of a worker that a block has not heard of
GOOD = Verdict()

State: TypeAlias = tuple[int, tuple[int, int]]  # version, applied[worker]
Take: TypeAlias = Callable[[memoryview], object]  # is called under the block's lock


class PushRefused(DsgdError):
    """A push (or write) that was not applied; the block is as it was."""


class Fenced(PushRefused):
    """The sender's incarnation is over: a newer one exists, or the coordinator has fenced it."""

    def __init__(self, worker: int, incarnation: int, oldest: int) -> None:
        super().__init__(f"worker/{worker}: incarnation {incarnation} is over, now it is {oldest}")
        self.oldest = oldest


class OutOfOrder(PushRefused):
    """A push is missing before this one; `expected` is the seq to send."""

    def __init__(self, worker: int, block: int, seq: int, expected: int) -> None:
        super().__init__(f"worker/{worker}: block {block} expects push {expected}, got {seq}")
        self.expected = expected


class NotFinite(PushRefused):
    """NaN or infinity at `element` of the block."""

    def __init__(self, block: int, element: int, value: float) -> None:
        super().__init__(f"block {block}: element {element} is {value}")
        self.block = block
        self.element = element


class Frozen(PushRefused):
    """The shard takes no updates now."""


class Mismatched(PushRefused):
    """No such block, or not the block's size or dtype."""


class Trained(PushRefused):
    """A late initialisation: the block has updates in it, which a write would lose."""


class RoundOver(PushRefused):
    """A contribution to an update that is made already, or is being tried anew."""


class _Own(threading.local):
    """What each thread has for itself: scratch, and a context in which numbers may overflow.

    `quiet.run` costs a tenth of `np.errstate`, which is as long as the update of a small block.
    """

    def __init__(self, size: int, dtype: Any) -> None:
        self.scratch = np.empty((SCRATCH_ROWS, size), dtype)
        self.quiet = contextvars.copy_context()
        self.quiet.run(np.seterr, all="ignore")


_turnstile = threading.Lock()


def _barrier() -> None:
    """Stores before it are seen before those after it, by other processes, too."""
    with _turnstile:
        pass
    with _turnstile:
        pass


# x86 keeps stores in order by itself, and the interpreter does.
_in_order: Callable[[], None] = (
    (lambda: None) if platform.machine() in ("x86_64", "AMD64") else _barrier
)


def all_finite(vector: NDArray[Any]) -> bool:
    """Whether a flat vector has neither NaN nor infinity. numpy may warn of overflow in it.

    One pass of BLAS; a square of finite numbers may overflow, so a bad answer is looked into.
    """
    return math.isfinite(vector.dot(vector)) or bool(np.isfinite(vector).all())


class Shard:
    """`values` is the shard's slice of the parameters; the shard owns it from now on.

    `stamps` (one per block) are for who only sees the memory: 2 x version in the lower 40 bits, the
    number of first values written above, and odd while the block changes. `rate` is the schedule of
    the learning rate, `rounds` whether workers contribute to updates together, `usual_parts` how
    many parts an update then has, so that one of fewer advances the schedule by less; None: all do
    alike.
    """

    def __init__(
        self,
        values: NDArray[Any],
        block_elements: int,
        optimizer: Optimizer,
        stamps: MutableSequence[int] | memoryview | None = None,
        *,
        rate: Rate | None = None,
        staleness: Staleness | None = None,
        rounds: bool = False,
        usual_parts: float | None = None,
    ) -> None:
        if values.ndim != 1 or not values.flags.c_contiguous or not values.flags.writeable:
            raise ValueError("the values must be one contiguous writable vector")
        if values.size == 0 or block_elements < 1:
            raise ValueError("a shard has at least one element, and so has a block")
        slots = [np.full_like(values, first) for first in optimizer.slot_init]
        parts = [
            slice(start, min(start + block_elements, values.size))
            for start in range(0, values.size, block_elements)
        ]
        self.blocks = len(parts)
        self._dtype = values.dtype
        self._update = optimizer.apply
        self._rate = rate
        self._factor = 1.0  # of the learning rate, from outside
        self._staleness = staleness if staleness is not None and staleness.matters else None
        self._sums = Sums(values.size, values.dtype, parts) if rounds else None
        self._usual_parts = usual_parts
        self._committing = 0  # the round of the last commit
        self._lacked = self._lacks = 0.0  # usual updates' worth of parts: before it, and with it
        self._own = _Own(min(CHUNK, block_elements, values.size), values.dtype)
        self._data = [values[part] for part in parts]
        self._slots = [tuple([slot[part] for slot in slots]) for part in parts]
        self._bytes = [data.data.cast("B").toreadonly() for data in self._data]
        self._version = [0] * self.blocks
        self._applied: list[dict[int, tuple[int, int]]] = [{} for _ in parts]
        self._stamps: Any = [0] * self.blocks if stamps is None else stamps
        self._locks = [threading.Lock() for _ in parts]
        self._fence: dict[int, int] = {}
        self._fence_lock = threading.Lock()
        self._frozen = False

    def apply(
        self,
        worker: int,
        incarnation: int,
        seq: int,
        block: int,
        gradient: NDArray[Any],
        base: int = 0,
    ) -> bool:
        """Applies one block of a push: True, or False where the block already has it.

        `base`: the version of the shard's first block that the gradient was computed with, plus the
        worker's own pushes since then.
        """
        self._check_block(block)
        with self._locks[block]:
            return self._apply(worker, incarnation, seq, block, gradient, base)

    def push(
        self,
        worker: int,
        incarnation: int,
        seq: int,
        block: int,
        gradient: NDArray[Any],
        take: Take | None = None,
        base: int = 0,
    ) -> State:
        """`apply`, then `observe`, with nothing in between."""
        self._check_block(block)
        with self._locks[block]:
            self._apply(worker, incarnation, seq, block, gradient, base)
            if take is not None:
                take(self._bytes[block])
            return self._version[block], (incarnation, self._applied[block][worker][1])

    @property
    def judges(self) -> bool:
        """Whether anything follows from a push being late."""
        return self._staleness is not None

    def dropped(self, worker: int, incarnation: int, seq: int) -> bool:
        """Whether this, the worker's newest push, was dropped because it came too late."""
        return self._staleness is not None and self._staleness.dropped(worker, (incarnation, seq))

    def contribute(
        self,
        worker: int,
        incarnation: int,
        round_: int,
        part: int,
        block: int,
        gradient: NDArray[Any],
    ) -> bool:
        """Adds one block of a part to the round's sum; False where it is in there already.

        Raises RoundOver when there is a newer round. Allowed while the shard is frozen: nothing of
        it is in the parameters before `commit`.
        """
        self._check_block(block)
        sums = self._the_sums()
        with self._locks[block]:
            self._check_fence(worker, incarnation, self._applied[block].get(worker, NOTHING)[0])
            try:
                if not sums.is_new(block, round_, part):
                    return False
            except Late as late:
                raise RoundOver(f"worker/{worker}: {late}") from None
            self._check_array(block, gradient)
            if not self._own.quiet.run(all_finite, gradient):
                raise _not_finite(block, gradient)
            self._own.quiet.run(sums.add, block, round_, part, gradient)
            return True

    def commit(self, round_: int, parts: int, scale: float) -> None:
        """One update of every block, by `scale` times the sum of the round's parts.

        Repeating it is harmless. Raises Incomplete (`sums`) and Frozen, and then changes no block
        from the one on where it was raised.
        """
        sums = self._the_sums()
        if round_ != self._committing:  # else it is repeated
            self._committing, self._lacked = round_, self._lacks
            if self._usual_parts is not None:
                self._lacks += 1.0 - parts / self._usual_parts
        for block in range(self.blocks):
            with self._locks[block]:
                total = sums.total(block, round_, parts)
                if total is None:
                    continue
                if self._frozen:
                    raise Frozen("the shard is frozen")
                self._own.quiet.run(self._commit, block, total, scale)
                sums.take(block, round_)

    def squares(self, round_: int, parts: int, scale: float) -> float:
        """The squared norm of `scale` times the sum of the round's parts, for clipping."""
        sums = self._the_sums()
        found = 0.0
        for block in range(self.blocks):
            with self._locks[block]:
                total = sums.total(block, round_, parts)
                if total is not None:
                    found += float(np.dot(total, total.astype(np.float64, copy=False)))
        return found * scale * scale

    # ── for `vectors` ──

    @property
    def sizes(self) -> list[int]:
        """Elements of each block."""
        return [data.size for data in self._data]

    def values(self, block: int) -> NDArray[Any]:
        """The block's parameters, to be read by who knows that nobody changes them."""
        return self._data[block]

    def assign(self, block: int, values: NDArray[Any]) -> None:
        """Sets the block's parameters, as an update. Raises Frozen."""
        with self._locks[block]:
            if self._frozen:
                raise Frozen("the shard is frozen")
            self._stamps[block] += 1
            _in_order()
            np.copyto(self._data[block], values)
            _in_order()
            self._stamps[block] += 1
            self._version[block] += 1

    def summed(self, block: int, round_: int, parts: int) -> NDArray[Any]:
        """The sum of the round's parts. Raises Incomplete (`sums`)."""
        total = self._the_sums().total(block, round_, parts)
        assert total is not None
        return total

    def set_rate(self, factor: float) -> None:
        """Multiplies the learning rate from now on, beside its schedule."""
        self._factor = factor

    def observe(self, worker: int, block: int, take: Take | None = None) -> State:
        """The block's version and `applied[worker]`; `take` gets the bytes that belong to them."""
        self._check_block(block)
        with self._locks[block]:
            if take is not None:
                take(self._bytes[block])
            return self._version[block], self._applied[block].get(worker, NOTHING)

    def write(self, block: int, values: NDArray[Any]) -> None:
        """Initialises a block. Repeating it is harmless until the first update."""
        self._check_block(block)
        with self._locks[block]:
            if self._version[block]:
                raise Trained(f"block {block} has {self._version[block]} updates in it")
            if self._frozen:
                raise Frozen("the shard is frozen")
            self._check_array(block, values)
            if not self._own.quiet.run(all_finite, values):
                raise _not_finite(block, values)
            self._stamps[block] += 1
            _in_order()
            np.copyto(self._data[block], values)
            _in_order()
            self._stamps[block] += STAMP_OF_WRITE - 1

    def read(self, block: int) -> memoryview:
        """The block's bytes, read-only and live: valid until the next update of the block."""
        self._check_block(block)
        return self._bytes[block]

    def version(self, block: int) -> int:
        """The number of updates in the block."""
        self._check_block(block)
        return self._version[block]

    def applied(self, worker: int, block: int) -> tuple[int, int]:
        """(incarnation, seq) of the worker's last push in the block; (0, 0) when there is none."""
        self._check_block(block)
        return self._applied[block].get(worker, NOTHING)

    def fence(self, worker: int, incarnation: int) -> None:
        """Refuses incarnations of the worker that are older than this one, from the return on."""
        self._raise_fence(worker, incarnation)
        self._settle()

    def freeze(self) -> None:
        """No updates, from the return until `thaw`; repeats of applied ones are still answered."""
        self._frozen = True
        self._settle()

    def thaw(self) -> None:
        self._frozen = False

    def _apply(
        self,
        worker: int,
        incarnation: int,
        seq: int,
        block: int,
        gradient: NDArray[Any],
        base: int,
    ) -> bool:
        last_incarnation, last_seq = self._applied[block].get(worker, NOTHING)
        oldest = self._check_fence(worker, incarnation, last_incarnation)
        if incarnation > last_incarnation:
            last_seq = 0
        if 1 <= seq <= last_seq:
            return False
        if seq != last_seq + 1:
            raise OutOfOrder(worker, block, seq, last_seq + 1)
        if self._frozen:
            raise Frozen("the shard is frozen")
        self._check_array(block, gradient)
        verdict = GOOD
        if self._staleness is not None:
            late = self._lateness(base)
            verdict = self._staleness.judge(worker, (incarnation, seq), late)
        if not verdict.dropped:
            self._own.quiet.run(self._checked_update, block, gradient, verdict.factor)
        self._applied[block][worker] = (incarnation, seq)
        if incarnation > oldest:
            self._raise_fence(worker, incarnation)
        return True

    def _lateness(self, base: int) -> Callable[[], int]:
        return lambda: self._version[0] - base

    def _check_fence(self, worker: int, incarnation: int, last_incarnation: int) -> int:
        """The oldest incarnation that is not over. Raises Fenced."""
        oldest = self._fence.get(worker, 0)
        if incarnation < oldest:
            raise Fenced(worker, incarnation, oldest)
        if incarnation < last_incarnation:
            raise Fenced(worker, incarnation, last_incarnation)
        return oldest

    def _checked_update(self, block: int, gradient: NDArray[Any], factor: float) -> None:
        if not all_finite(gradient):
            raise _not_finite(block, gradient)
        self._update_block(block, gradient, factor)

    def _commit(self, block: int, total: NDArray[Any], scale: float) -> None:
        if scale != 1.0:
            np.multiply(total, scale, out=total)
        self._update_block(block, total, 1.0)

    def _update_block(self, block: int, gradient: NDArray[Any], factor: float) -> None:
        version = self._version[block] + 1
        rate = self._factor * factor
        if self._rate is not None:
            rate *= self._rate(version - self._lacked if self._lacked else version)
        self._stamps[block] += 1
        _in_order()
        self._update(
            self._data[block], self._slots[block], gradient, self._own.scratch, version, rate
        )
        _in_order()
        self._stamps[block] += 1
        self._version[block] = version

    def _the_sums(self) -> Sums:
        if self._sums is None:
            raise Mismatched("nothing is summed here: this run has no rounds")
        return self._sums

    def _raise_fence(self, worker: int, incarnation: int) -> None:
        with self._fence_lock:
            self._fence[worker] = max(incarnation, self._fence.get(worker, 0))

    def _settle(self) -> None:
        """Waits for the updates that are under way."""
        for lock in self._locks:
            with lock:
                pass

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self.blocks:
            raise Mismatched(f"block {block} of a shard with {self.blocks}")

    def _check_array(self, block: int, array: NDArray[Any]) -> None:
        shape = self._data[block].shape
        if array.shape != shape or array.dtype != self._dtype:
            raise Mismatched(
                f"block {block} holds {shape[0]} elements of {self._dtype}, "
                f"got {array.dtype} of shape {array.shape}"
            )


def _not_finite(block: int, vector: NDArray[Any]) -> NotFinite:
    element = int(np.argmin(np.isfinite(vector)))
    return NotFinite(block, element, float(vector[element]))
