"""What the steps of connecting share: whom we talk to, how long it may take, what may pass.

A step raises Transient for a failure that is worth another try, and an error of `contract.errors`
for one that is final. Nothing here touches the network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Server:
    """Whom we talk to; `host` is how the user calls it."""

    host: str
    address: str
    port: int
    user: str

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"

    @property
    def port_option(self) -> str:
        """For the command lines that we advise."""
        return "" if self.port == 22 else f"-p {self.port} "


class Transient(Exception):
    """A failure to connect that may pass: it is tried again before it becomes an error."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class Budget:
    """Time that may be spent on connecting. Waiting for one's turn does not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._spent_s = 0.0
        self._since: float | None = None

    @property
    def left_s(self) -> float:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return max(0.0, self.seconds - self._spent_s - running)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._spent_s += time.monotonic() - self._since
            self._since = None


def in_words(error: BaseException | None) -> str:
    if error is None:
        return "no reason given"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or ("it hung up" if type(error) is EOFError else type(error).__name__)


def short(path: Path | str) -> str:
    """A path as users write it: ~ for their home."""
    home = str(Path.home())
    return f"~{str(path)[len(home) :]}" if str(path).startswith(home + "/") else str(path)
