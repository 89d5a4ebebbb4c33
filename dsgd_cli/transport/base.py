"""What a road to a host is: one verb, `open(argv)`, that gives a duplex byte stream.

Invariants that every implementation keeps, and that `tests/transport/contract.py` proves: bytes
arrive whole and in order, both directions flow at once, every wait has a deadline, whatever the
program writes to stderr is drained (so that it never blocks on it), and closing is idempotent.
Nothing here knows what runs at the other end. Errors of libraries never pass: only those of
`contract.errors`, and the built-in TimeoutError of `Stream.read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Stream(Protocol):
    """The standard streams of one program on a host.

    One reader thread and one writer thread may use it at once; `close` may come from any thread
    and wakes them both.
    """

    def write(self, data: bytes, timeout_s: float = 30.0) -> None:
        """Send all of `data`.

        Raises DeadlinePassed when no byte could be sent for `timeout_s` (progress starts it anew:
        a slow network is not a dead one), ConnectFailed when the other side no longer takes
        anything: its program ended, the connection broke, or the stream was closed.
        """

    def read(self, max_bytes: int, timeout_s: float | None) -> bytes:
        """At least one byte, as soon as there is one; b"" at the end, or after `close`.

        Raises the built-in TimeoutError when nothing came for `timeout_s`; nothing is lost then.
        None waits for ever (and ends with the connection). Raises ConnectFailed when the
        connection broke, so that a broken connection is never taken for the end.
        """

    def stderr_tail(self) -> str:
        """The last 8 KiB or less of what the program wrote to stderr so far."""

    def wait(self, timeout_s: float) -> int:
        """The program's exit status; negative: the number of the signal that ended it.

        Raises DeadlinePassed, or ConnectFailed when it can no longer be known. A program that does
        not exist on the host has the status 127, as in a shell.
        """

    def close(self) -> None:
        """Give everything back, now. Idempotent, never raises, safe from any thread.

        The program sees the end of its stdin; a local one is killed with its process group.
        """


class Transport(Protocol):
    """A road to one host. Opens any number of streams, from any thread."""

    @property
    def host(self) -> str:
        """The host's name in the cluster description: how errors call it."""

    def open(self, argv: Sequence[str]) -> Stream:
        """Start `argv` on the host, no shell in between: each element arrives as it is.

        Raises HostError (ConnectFailed, AuthenticationFailed, HostKeyRejected) or DeadlinePassed.
        """

    def close(self) -> None:
        """Close all streams and the connection. Idempotent, never raises."""
