"""JSON lines, and raw bytes between them, on file descriptors.

`Input` is blocking and hands out lines, counted bytes, and what is left over for a bridge; no byte
is read past what it can give back. `split_lines` serves the agent's loop, which never blocks.
Refused is how a verb says no: it becomes {"error": {"kind", "message", ...}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]
CHUNK_BYTES = 256 * 1024
LINE_MAX_BYTES = 64 * 1024 * 1024


class Refused(Exception):
    """A request that cannot be fulfilled: `kind` for programs, `message` for people."""

    def __init__(self, kind: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.error: Message = {"kind": kind, "message": message, **more}


class InputEnded(Exception):
    """The other side closed the stream."""


def encode(message: Message) -> bytes:
    """One line. ASCII only, so that no terminal, shell or decoder can garble it."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Refused("invalid") when the line is not a JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid", f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise Refused("invalid", "not a JSON object")
    return message


def split_lines(buffer: bytearray, data: bytes) -> list[bytes]:
    """Append `data`; take the complete lines out of `buffer`, without their ends."""
    if b"\n" not in data:
        buffer += data
        return []
    *lines, rest = (bytes(buffer) + data).split(b"\n")
    buffer[:] = rest
    return lines


class Input:
    """A descriptor that is read by one thread, with a buffer of its own."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray()

    def line(self) -> bytes:
        """The next line without its end. Raises InputEnded."""
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > LINE_MAX_BYTES:
                raise Refused("invalid", "a line without end")
            self._fill()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def chunks(self, size: int) -> Iterator[bytes]:
        """Exactly `size` raw bytes. Raises InputEnded when they do not come."""
        while size:
            if not self._buffer:
                self._fill()
            chunk = bytes(self._buffer[:size])
            del self._buffer[: len(chunk)]
            size -= len(chunk)
            yield chunk

    def left_over(self) -> bytes:
        """What was read but not handed out yet: it now belongs to the caller."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def wait(self, timeout_s: float) -> bool:
        """True when `line` would not block for its first byte."""
        return bool(self._buffer or select.select([self.descriptor], [], [], timeout_s)[0])

    def _fill(self) -> None:
        data = os.read(self.descriptor, CHUNK_BYTES)
        if not data:
            raise InputEnded
        self._buffer += data


def write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def say(message: Message) -> None:
    """One line to stdout, complete at once. Raises BrokenPipeError when nobody listens."""
    write_all(1, encode(message))


def complain(text: str) -> None:
    """A line to stderr; a closed one is nobody's problem."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
