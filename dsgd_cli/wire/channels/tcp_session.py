"""What a server answers to the frames of one tcp connection. No sockets: frames in, frames out.

Each block is applied and the fresh one sealed under the block's lock, so that what goes back is
what the version says; no lock is held while a peer is waited for. Everything is allocated once. The
body of a frame is used only after it was opened. Whoever breaks the order of frames is Broken;
what the shard refuses is answered, and the rest of that exchange is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dsgd_cli.wire.channels import frames
from dsgd_cli.wire.channels.base import (
    OPERATIONS,
    Header,
    HeldShard,
    Holding,
    Reason,
    Refused,
    Route,
    State,
    Take,
)
from dsgd_cli.wire.channels.frames import HEAD, OPENING, STATE, Broken, Kind, Run, Seal


class Session:
    """One connection's place in its exchange."""

    def __init__(self, holding: Holding, route: Route, held: HeldShard, down: Seal) -> None:
        self._holding = holding
        self._route = route
        self._held = held
        self._shape = shape = held.shape
        self.down = down
        self._inline = frames.is_inline(shape)
        self._runs = frames.runs(shape, range(shape.blocks))
        self._done = memoryview(bytearray(STATE.size * shape.blocks + self._inline_bytes()))
        several = max((stop - first for first, stop in self._runs), default=1) > 1
        longest = frames.bounds(shape, self._runs[0])[1]
        self._gathered = memoryview(bytearray(longest if several and not self._inline else 0))
        self._out = memoryview(frames.aligned(2 * HEAD.size + _room(held, self._done) + longest))
        self._used = 0
        self._header: Header | None = None
        self._next_run = 0  # of a push: what must come next

    def _inline_bytes(self) -> int:
        return self._shape.size_bytes if self._inline else 0

    @property
    def begun(self) -> bool:
        """Whether more frames of an exchange must come."""
        return self._header is not None

    def expected(self) -> int:
        """The likely length of the next frame's body, or less."""
        if self._header is not None:
            start, stop = frames.bounds(self._shape, self._runs[self._next_run])
            return stop - start
        return OPENING.size + self._inline_bytes()

    def take(self, kind: Kind, body: memoryview) -> Iterator[memoryview]:
        """Answers a frame; each item must have been sent before the next is asked for."""
        if self._inline and kind is Kind.EXCHANGE:
            header, rest, since_count = self._opening(body)
            if header.operation.sends or not since_count:
                return iter((self._all_at_once(header, rest),))
        return self._taken(kind, body)

    def _taken(self, kind: Kind, body: memoryview) -> Iterator[memoryview]:
        try:
            if kind is Kind.EXCHANGE:
                yield from self._opened(body)
            elif kind is not Kind.DATA:
                raise Broken(f"{kind.name} from a worker")
            elif self._header is not None:
                yield from self._values(self._header, body)
        except Refused as refused:
            yield self._refusal(refused)
        else:
            if self._used:
                yield self._flush()

    def _refusal(self, refused: Refused) -> memoryview:
        """Ends the exchange. What is sealed already goes out with it: its number is used."""
        self._header = None
        self._put(Kind.REFUSED, frames.refusal_body(refused))
        return self._flush()

    # ── the opening frame ──

    def _opening(self, body: memoryview) -> tuple[Header, memoryview, int]:
        """(header, what follows it, versions in that)."""
        self._header = None
        if len(body) < OPENING.size:
            raise Broken("a short opening")
        number, since_count, seq, tag = OPENING.unpack_from(body)
        operation = OPERATIONS.get(number)
        if operation is None:
            raise Broken(f"operation {number}")
        return Header(self._route, seq, operation, tag), body[OPENING.size :], since_count

    def _admit(self, header: Header) -> None:
        if self._holding.admit(header) is not self._held:
            raise Refused(Reason.WRONG_EPOCH, "this channel is of another run")

    def _opened(self, body: memoryview) -> Iterator[memoryview]:
        header, rest, since_count = self._opening(body)
        self._admit(header)
        if not header.operation.sends:
            yield from self._pulled(rest, since_count)
        elif len(rest):
            raise Broken("values in the opening of a large shard")
        else:
            self._header, self._next_run = header, 0

    def _all_at_once(self, header: Header, values: memoryview) -> memoryview:
        """The whole exchange of a small shard."""
        operation, blocks = header.operation, self._shape.blocks
        if len(values) != (self._shape.size_bytes if operation.sends else 0):
            raise Broken("an opening of another length")
        at = STATE.size * blocks
        fresh = self._done[at:] if operation.fetches else None
        try:
            self._admit(header)
            if operation.sends:
                self._apply(header, (0, blocks), values, fresh)
            else:
                self._gather((0, blocks), self._done[at:])
            self._put(Kind.DONE, self._done if operation.fetches else self._done[:at])
        except Refused as refused:
            return self._refusal(refused)
        return self._flush()

    # ── values that come ──

    def _values(self, header: Header, body: memoryview) -> Iterator[memoryview]:
        run = self._runs[self._next_run]
        start, stop = frames.bounds(self._shape, run)
        if len(body) != stop - start:
            raise Broken("values of another length")
        if not header.operation.fetches:
            self._apply(header, run, body, None)
        elif run[1] - run[0] == 1:
            self._block(header, run[0], body, self._put_values)
        else:
            self._apply(header, run, body, self._gathered)
            self._put_values(self._gathered[: len(body)])
        self._next_run += 1
        if self._next_run == len(self._runs):
            self._header = None
            self._put(Kind.DONE, self._done[: STATE.size * self._shape.blocks])
        elif self._used:
            yield self._flush()

    def _apply(
        self, header: Header, run: Run, values: memoryview, fresh: memoryview | None
    ) -> None:
        """Some blocks, whose fresh values are gathered in `fresh`."""
        size = self._shape.block_bytes
        for place, block in enumerate(range(*run)):
            part = slice(place * size, min((place + 1) * size, len(values)))
            self._block(header, block, values[part], None if fresh is None else _into(fresh[part]))

    def _block(self, header: Header, block: int, values: memoryview, take: Take | None) -> None:
        self._note(block, self._held.change(header, block, values, take))

    # ── values that go ──

    def _pulled(self, rest: memoryview, since_count: int) -> Iterator[memoryview]:
        blocks = self._shape.blocks
        if len(rest) != 8 * since_count:
            raise Broken("an opening of another length")
        if since_count and since_count != blocks:
            raise Refused(Reason.WRONG_SIZE, f"{since_count} versions for {blocks}")
        at = STATE.size * blocks
        runs = self._runs
        if since_count:
            picked = self._newer(struct.unpack(f"<{since_count}Q", rest))
            self._put(Kind.PICK, struct.pack(f"<{len(picked)}I", *picked))
            yield self._flush()
            runs = frames.runs(self._shape, picked)
        for run in runs:
            if run[1] - run[0] == 1:
                state = self._held.read(self._route.worker, run[0], self._put_values)
                self._note(run[0], state)
            else:
                self._put_values(self._gather(run, self._gathered_for(run)))
            yield self._flush()
        self._put(Kind.DONE, self._done[:at])

    def _newer(self, since: tuple[int, ...]) -> list[int]:
        picked = []
        for block, version in enumerate(since):
            state = self._held.read(self._route.worker, block)
            self._note(block, state)
            if state[0] > version:
                picked.append(block)
        return picked

    def _gather(self, run: Run, fresh: memoryview) -> memoryview:
        size = self._shape.block_bytes
        for place, block in enumerate(range(*run)):
            part = fresh[place * size : (place + 1) * size]
            self._note(block, self._held.read(self._route.worker, block, _into(part)))
        return fresh

    def _gathered_for(self, run: Run) -> memoryview:
        start, stop = frames.bounds(self._shape, run)
        room = self._done[STATE.size * self._shape.blocks :] if self._inline else self._gathered
        return room[: stop - start]

    def _note(self, block: int, state: State) -> None:
        version, (incarnation, seq) = state
        STATE.pack_into(self._done, STATE.size * block, version, incarnation, seq)

    # ── frames that go ──

    def _put_values(self, values: memoryview) -> None:
        self._put(Kind.DATA, values)

    def _put(self, kind: Kind, body: bytes | memoryview) -> None:
        self._used += self.down.close(kind, body, self._out[self._used :])

    def _flush(self) -> memoryview:
        used, self._used = self._used, 0
        return self._out[:used]


def _room(held: HeldShard, done: memoryview) -> int:
    """For the largest frame but values, which follows a frame of values at most."""
    about = max(len(done), 4 * held.shape.blocks, frames.REFUSAL.size + frames.MAX_MESSAGE_BYTES)
    return about + 2 * frames.TAG_BYTES


def _into(place: memoryview) -> Take:
    def copy(values: memoryview) -> None:
        place[:] = values

    return copy
